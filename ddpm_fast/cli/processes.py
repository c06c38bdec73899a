"""The options of `ddpm-fast train` that say what is diffused and how, and what each process makes of them."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ddpm_fast.cli.options import (
    Integer,
    Number,
    Objective,
    Process,
    Sampler,
    Schedule,
    Text,
    UserError,
    one_of,
)
from ddpm_fast.diffusion.rectified_flow import TIME_DISTRIBUTIONS
from ddpm_fast.diffusion.weightings import WEIGHTINGS

if TYPE_CHECKING:
    LossWeighting = str | None
    TimeDistribution = str | None
    NoiseSchedule = str | None
else:  # the names that are registered
    LossWeighting = one_of(tuple(WEIGHTINGS))
    TimeDistribution = one_of(TIME_DISTRIBUTIONS)
    NoiseSchedule = one_of(("linear", "cosine", "learned"))


@dataclasses.dataclass
class ProcessOptions:
    """What is diffused, what the network learns, and how the grids are sampled."""

    process: Annotated[
        Process,
        tyro.conf.arg(
            help="The diffusion process (ddpm). edm, continuous and v-continuous take a network with learned time "
            "embeddings, learned and weighted one with more outputs, and get it; classifier_free, as "
            "upstream's, needs --labels."
        ),
    ] = None
    timesteps: Integer = None
    """Steps of ddpm, classifier_free, learned and weighted (1000)."""
    objective: Objective = None
    """What the network of ddpm, classifier_free and learned predicts (pred_v of ddpm, else pred_noise)."""
    beta_schedule: Schedule = None
    """Noise schedule of ddpm, classifier_free, learned and weighted (data: sigmoid, digits cosine)."""
    zero_terminal_snr: bool = False
    """Let that schedule end in noise alone (Lin et al. 2023)."""
    noise_schedule: NoiseSchedule = None
    """Noise schedule of continuous (linear)."""
    sigma_data: Number = None
    """Standard deviation of the data, for edm (0.5)."""
    time_distribution: TimeDistribution = None
    """Of flow's times in training (uniform)."""
    optimal_transport: bool = False
    """Match noise and images of a batch by distance, for flow."""
    candidates: Integer = None
    """Train each image on the best of so many candidates of noise (1); with any process."""
    loss_weighting: LossWeighting = None
    """Weight of x0's squared error as a function of the signal-to-noise ratio; by default each process's own."""
    min_snr: bool = False
    """Clip the loss weight at a signal-to-noise ratio of 5."""
    super_resolution: Integer = None
    """Train to enlarge images by this factor; `ddpm-fast sample --upscale` then does."""
    noise_augmentation: Number = None
    """Largest standard deviation of the noise on the small images of --super-resolution (0.5)."""
    guidance: Number = None
    """Guidance scale of the grids, which the checkpoint keeps for `sample` (2 with classes or vectors)."""
    uncertainty_weighting: bool = False
    """Learn a weight for each level of noise beside the network."""
    sampler: Sampler = None
    """Sampler of the grids (the process's own: of ddpm it is ddim with fewer --sampling-timesteps than timesteps)."""
    spacing: Text = None
    """At which times that sampler calls the network; by default what suits it."""
    sampling_timesteps: Integer = None
    """Steps of that sampler (data: 250, digits 50; edm 32, flow 50)."""


# Option → argument of a process.
ARGUMENTS = {
    **{
        field.name: field.name
        for field in dataclasses.fields(ProcessOptions)
        if field.name not in ("process", "candidates")
    },
    "image_size": "image_size",
    "min_snr": "min_snr_loss_weight",
}

# What a process needs of Unet, by the channels of the images.
_NETWORKS = {
    **dict.fromkeys(("edm", "continuous", "v-continuous"), lambda channels: {"learned_sinusoidal_cond": True}),
    "learned": lambda channels: {"learned_variance": True},
    "weighted": lambda channels: {"out_dim": 2 * channels + 2},
}
# These have a number of steps that suits them; the data's is for ancestral sampling and DDIM.
_OWN_STEPS = ("edm", "flow")


def arguments_of(process: str, values: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a process from values of options.

    Raises:
        UserError: an option that the process has not.
    """
    known = _arguments(process)
    for option in values:
        if known.get(option) is None:
            has = ", ".join(
                _flag(name) for name in ProcessOptions.__dataclass_fields__ if name in (*known, "candidates")
            )
            raise UserError(f"{_flag(option)} is no option of --process {process}, which has {has}")
    return {known[option]: value for option, value in values.items()}


def defaults_of(process: str, data: dict[str, Any]) -> dict[str, Any]:
    """Values of options of a process for a run on data that has these."""
    known = _arguments(process)
    wanted = {name: data[name] for name in ("image_size", "timesteps", "beta_schedule", "sampling_timesteps")}
    if process in _OWN_STEPS:
        del wanted["sampling_timesteps"]
    return {name: value for name, value in wanted.items() if name in known}


def network_of(process: str, channels: int) -> dict[str, Any]:
    """Arguments of Unet that a process needs."""
    needs = _NETWORKS.get(process)
    return {} if needs is None else needs(channels)


def _arguments(process: str) -> dict[str, str]:
    """Option → argument of those that the process has."""
    from ddpm_fast.diffusion.processes import PROCESSES

    names = PROCESSES[process].arguments()
    steps = "sampling_timesteps" if "sampling_timesteps" in names else "num_sample_steps"
    arguments = {**ARGUMENTS, "sampling_timesteps": steps}
    return {option: argument for option, argument in arguments.items() if argument in names}


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"
