"""The networks that the benchmarks time, by size; the tests run the quick ones."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ddpm_fast.measure.baselines import Configuration
from ddpm_fast.measure.compare import PHASES

SEED = {"dim": 64, "dim_mults": (1, 2, 4, 8)}
EAGER = ("upstream", "upstream-channels-last")
COMPILED = ("upstream-compiled", "upstream-max-autotune")

# Seconds that compiling a baseline may take in one phase; it is left out where less is left.
COMPILE_SECONDS = {"upstream-compiled": 90, "upstream-max-autotune": 180}


@dataclass(frozen=True, eq=False)
class NetworkCase:
    """A configuration, the phases in which it is timed, and whom ours meets there; each is held equal to ours first.

    Args:
        name: what a report calls it.
        targets: phase → baseline → how many times as long as ours it is meant to take.
        memory: whether the memory that training takes is measured as well.
    """

    name: str
    configuration: Configuration
    baselines: tuple[str, ...]
    phases: tuple[str, ...] = PHASES
    targets: dict[str, dict[str, float]] = field(default_factory=dict)
    memory: bool = False

    def __str__(self) -> str:
        return str(self.configuration)


_TRAINING, _SAMPLING = PHASES
_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"

# Baselines that differ from ours in training alone; triage times sampling step by step.
TRAINING_ONLY = ("ours-low-memory", "ours-step-by-step")

# The most that training may take of upstream's memory.
MEMORY_TARGET = 1 / 2

# Sampling runs take few steps, all of them alike; the report gives seconds per 1,000. On a GPU, where a step is short,
# there are enough of them to make the fixed costs of a run count for nothing.
_TINY = Configuration(dim=16, dim_mults=(1, 2), image_size=8, batch=2, steps=3)
_CASES = {
    "full": [
        NetworkCase(
            "training",
            Configuration(**SEED, image_size=128, batch=32, dtype="bf16", steps=20),
            ("ours-step-by-step", *EAGER, *COMPILED),
            PHASES[:1],
        ),
        NetworkCase(
            "sampling",
            Configuration(**SEED, image_size=128, batch=4, dtype="bf16", steps=250),
            (*EAGER, *COMPILED),
            PHASES[1:],
        ),
        NetworkCase("fp32", Configuration(**SEED, image_size=128, batch=8, dtype="fp32", steps=50), EAGER),
        NetworkCase(
            "others",
            Configuration(**SEED, image_size=128, batch=16, dtype="bf16", steps=50),
            ("ours-step-by-step", "ours-low-memory", "upstream", "diffusers"),
        ),
    ],
    # In the order in which they are compiled and timed, for as long as there is time.
    "cpu": [
        NetworkCase(
            "32x32",
            Configuration(**SEED, image_size=32, batch=16, steps=6),
            ("ours-low-memory", *EAGER, "upstream-compiled"),
            targets={
                _TRAINING: {"upstream": 3.8 if _AVX512 else 3.5, "upstream-compiled": 3.2},
                _SAMPLING: {"upstream": 4.0 if _AVX512 else 3.6, "upstream-compiled": 3.2 if _AVX512 else 2.8},
            },
            memory=True,
        ),
        NetworkCase(
            "16x16",
            Configuration(dim=32, dim_mults=(1, 2, 4), image_size=16, batch=1, steps=100),
            (*EAGER, "diffusers"),
            targets={_TRAINING: {"upstream": 3.5}, _SAMPLING: {"upstream": 6.0}},
        ),
        NetworkCase(
            "128x128",
            Configuration(**SEED, image_size=128, batch=4, steps=3),
            (*EAGER, "upstream-compiled"),
            targets={
                _TRAINING: {"upstream": 4.0 if _AVX512 else 3.7, "upstream-compiled": 3.5 if _AVX512 else 3.6},
                _SAMPLING: {"upstream": 4.0 if _AVX512 else 3.5, "upstream-compiled": 3.0 if _AVX512 else 2.8},
            },
            memory=True,
        ),
    ],
    # Named like the full ones: the dry form of both reports.
    "quick": [
        NetworkCase(
            "training", _TINY, ("upstream", "diffusers"), PHASES[:1], {_TRAINING: {"upstream": 1.0}}, memory=True
        ),
        NetworkCase("sampling", _TINY, ("upstream", "diffusers"), PHASES[1:]),
    ],
}


def network_cases(size: str) -> list[NetworkCase]:
    """The cases of a size: "full", "cpu" or "quick"."""
    return _CASES[size]
