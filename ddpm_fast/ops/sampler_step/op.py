"""The universal sampler update: public functions, registration, eligibility.

    x0 = p·x + q·out, clipped to [−1, 1] where asked
    x ← r·x0 + s·x + u·x0_previous + u2·x0_previous2 + u3·x0_previous3 + σ·ε

A sampler is a table with a row per step, made by diffusion/samplers.py. Its first 6 columns are p, q, r, s, u, σ:
ancestral sampling (Ho et al. 2020, eq. 7), DDIM (Song et al. 2021, eq. 12), Heun (Karras et al. 2022, algorithm 2),
DPM-Solver++(2M) (Lu et al. 2022, algorithm 2). With 10 columns it has u2, u3 for methods of higher order, such as UniPC
(Zhao et al. 2023), and lo, hi for a learned variance v in the second half of the model's output (Nichol & Dhariwal
2021, eq. 15): σ is then σ·exp(lo + (hi − lo)·(v + 1)/2). With 12 columns it has e and f: where they are not 0, later
steps find e·x + f·x0 of this step (its ε, for e = 1/b and f = −a/b) in place of an earlier x0, as DEIS (Zhang & Chen
2023) needs. With 25 columns it guides with a second output out' (Ho & Salimans 2022), and with a gradient (Dhariwal &
Nichol 2021), and keeps the known region of an image (Lugmayr et al. 2022). Per sample, with the momentum u of `update`:

    y = out, or p·x + q·out where space = 1; y' the same of out'
    u ← (y − y') + mu·u;  v = t·u with t = min(1, rho/‖u‖) where rho > 0, else 1
    g = y + (w − 1)·(v − (1 − eta)·⟨v, y⟩/⟨y, y⟩·y);  g ← (phi·std(y)/std(g) + 1 − phi)·g
    x0_g = p·x + q·g, or g where space = 1;  x0' = p·x + q·out';  x0 = clip(x0_g + h·gradient)
    x ← (the sum above) + kg·x0_g + kn·x0' + kc·clip(x0') + j·gradient
    x ← mask·(A·known + B·ε) + (1 − mask)·x

w is the guidance scale, whose rows are a schedule or an interval (Kynkäänniemi et al. 2024); phi rescales (Lin et al.
2023, section 3.4); eta, rho and mu are projection, threshold and momentum (Sadat et al. 2024, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ddpm_fast.noise import STREAM_STEP
from ddpm_fast.ops.sampler_step import reference
from ddpm_fast.ops.sampler_step.checks import COLUMNS as COLUMNS
from ddpm_fast.ops.sampler_step.checks import GUIDANCE, check
from ddpm_fast.runtime import extension
from ddpm_fast.runtime.dispatch import Implementation, Op

_PREVIOUS = ("x_start_previous", "x_start_previous2", "x_start_previous3")
_STATES = ("x_start", "x_start2", "x_start3")

_ARGUMENTS = "Tensor model_output, Tensor table, Tensor step, Tensor seed"
_OPTIONS = "Tensor? noise, bool clip_x_start, int start_index, int stream"
_GUIDANCE_ARGUMENTS = (
    "Tensor? second_output=None, Tensor? gradient=None, Tensor? known=None, Tensor? mask=None, "
    "Tensor(e!)? update=None, bool reduces=False"
)

_library = torch.library.Library("ddpm_fast", "FRAGMENT")
_library.define(
    f"sampler_step(Tensor x, {_ARGUMENTS}, Tensor? x_start_previous, Tensor? x_start_previous2, "
    f"Tensor? x_start_previous3, {_OPTIONS}, {_GUIDANCE_ARGUMENTS}) -> (Tensor x_next, Tensor x_start)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"sampler_step_(Tensor(a!) x, {_ARGUMENTS}, Tensor(b!)? x_start, Tensor(c!)? x_start2, Tensor(d!)? x_start3, "
    f"{_OPTIONS}, {_GUIDANCE_ARGUMENTS}) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("ddpm_fast::sampler_step", lib=_library)
def _sampler_step_fake(
    x: torch.Tensor,
    model_output: torch.Tensor,
    table: torch.Tensor,
    step: torch.Tensor,
    seed: torch.Tensor,
    x_start_previous: torch.Tensor | None,
    x_start_previous2: torch.Tensor | None,
    x_start_previous3: torch.Tensor | None,
    noise: torch.Tensor | None,
    clip_x_start: bool,
    start_index: int,
    stream: int,
    second_output: torch.Tensor | None = None,
    gradient: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    update: torch.Tensor | None = None,
    reduces: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.register_fake("ddpm_fast::sampler_step_", lib=_library)
def _sampler_step_inplace_fake(
    x: torch.Tensor,
    model_output: torch.Tensor,
    table: torch.Tensor,
    step: torch.Tensor,
    seed: torch.Tensor,
    x_start: torch.Tensor | None,
    x_start2: torch.Tensor | None,
    x_start3: torch.Tensor | None,
    noise: torch.Tensor | None,
    clip_x_start: bool,
    start_index: int,
    stream: int,
    second_output: torch.Tensor | None = None,
    gradient: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    update: torch.Tensor | None = None,
    reduces: bool = False,
) -> None:
    return None


def sampler_step(
    x: torch.Tensor,
    model_output: torch.Tensor,
    table: torch.Tensor,
    step: torch.Tensor,
    seed: torch.Tensor,
    *,
    x_start_previous: torch.Tensor | None = None,
    x_start_previous2: torch.Tensor | None = None,
    x_start_previous3: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    clip_x_start: bool = True,
    start_index: int = 0,
    stream: int = STREAM_STEP,
    second_output: torch.Tensor | None = None,
    gradient: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    update: torch.Tensor | None = None,
    reduces: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of any sampler.

    Args:
        x: (B, ...) float32 (float64: reference only), the state before the step.
        model_output: shape of x, or twice its channels, the second half being the learned variance; float32, float16,
            bfloat16 or float64. Contiguous or channels-last is read in place.
        table: (S, 6), columns p, q, r, s, u, σ; (S, 10), and u2, u3, lo, hi; (S, 12), and e, f; (S, 25), and A, B, w,
            phi, eta, rho, mu, space, kg, kn, kc, h, j, all 0 but w and eta, which are 1, where they change nothing;
            dtype float32 (float64 with a float64 x).
        step: one int64 element, the row, read on the device. Outside [0, S): an error on the CPU, NaN elsewhere.
        seed: one int64 element, read on the device.
        x_start_previous: shape and dtype of x, the x0 of the step before; read only where u ≠ 0.
        x_start_previous2, x_start_previous3: of the steps before that one; read only where u2 ≠ 0 and u3 ≠ 0.
        noise: shape and dtype of x, the ε to use; read only where σ ≠ 0 or a mask is given and B ≠ 0. None generates
            it: the noise function of (seed, stream, sample = start_index + batch index, step).
        clip_x_start: clip x0 to [−1, 1]; NaN stays NaN.
        start_index: index of the first sample of the batch, in [0, 2^32 − B].
        stream: the noise stream, in [0, 2^32).
        second_output: the output without condition, or of a weaker network; shape of x, or twice its channels, of which
            the first half is used; dtype of model_output. Read only where w ≠ 1, mu ≠ 0, kn ≠ 0 or kc ≠ 0.
        gradient: shape and dtype of x, of the logarithm of a classifier's probability; read only where h or j ≠ 0.
        known: shape and dtype of x, the image of the known region; read only where A ≠ 0.
        mask: shape of x, or (B or 1, 1 or C, ...), dtype of x: 1 where x is known, 0 where it is not.
        update: shape and dtype of x, the momentum u; written where second_output is read for w or mu, in place, and
            read only where mu ≠ 0.
        reduces: whether a row with w ≠ 1 has phi, rho or eta other than 0, 0 and 1, which need sums over a sample.

    Returns:
        (x_next, x_start), both of the shape and dtype of x.

    Raises:
        TypeError, ValueError: an argument does not match its description.
    """
    history = (x_start_previous, x_start_previous2, x_start_previous3)
    guidance = (second_output, gradient, known, mask, update)
    check(x, model_output, table, step, seed, _PREVIOUS, history, noise, start_index, stream, guidance, reduces)
    return _sampler_step_op(
        x,
        model_output,
        table,
        step,
        seed,
        x_start_previous=x_start_previous,
        x_start_previous2=x_start_previous2,
        x_start_previous3=x_start_previous3,
        noise=noise,
        clip_x_start=clip_x_start,
        start_index=start_index,
        stream=stream,
        second_output=second_output,
        gradient=gradient,
        known=known,
        mask=mask,
        update=update,
        reduces=reduces,
    )


def sampler_step_(
    x: torch.Tensor,
    model_output: torch.Tensor,
    table: torch.Tensor,
    step: torch.Tensor,
    seed: torch.Tensor,
    *,
    x_start: torch.Tensor | None = None,
    x_start2: torch.Tensor | None = None,
    x_start3: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    clip_x_start: bool = True,
    start_index: int = 0,
    stream: int = STREAM_STEP,
    second_output: torch.Tensor | None = None,
    gradient: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    update: torch.Tensor | None = None,
    reduces: bool = False,
) -> torch.Tensor:
    """`sampler_step` in place: x becomes x_next.

    Args:
        x_start: shape and dtype of x; read as the x0 of the step before where u ≠ 0, then overwritten with this step's
            x0. It may be uninitialised where u = 0. None where neither is wanted.
        x_start2: the same for u2, then overwritten with what x_start was, or where e or f ≠ 0 with e·x + f·x0.
        x_start3: the same for u3, then overwritten with what x_start2 was.
        others: see `sampler_step`.

    Returns:
        x.

    Raises:
        TypeError, ValueError: an argument does not match its description.
    """
    history = (x_start, x_start2, x_start3)
    guidance = (second_output, gradient, known, mask, update)
    check(x, model_output, table, step, seed, _STATES, history, noise, start_index, stream, guidance, reduces)
    states = {"x": x, **dict(zip(_STATES, history, strict=True)), "update": update}
    given = [(name, tensor) for name, tensor in states.items() if tensor is not None]
    for i, (name, tensor) in enumerate(given):
        if any(tensor is other for _, other in given[:i]):
            raise ValueError(f"{name} must be another tensor than x and the other states, got the same")
    return _sampler_step_inplace_op(
        x,
        model_output,
        table,
        step,
        seed,
        x_start=x_start,
        x_start2=x_start2,
        x_start3=x_start3,
        noise=noise,
        clip_x_start=clip_x_start,
        start_index=start_index,
        stream=stream,
        second_output=second_output,
        gradient=gradient,
        known=known,
        mask=mask,
        update=update,
        reduces=reduces,
    )


def _native(
    x: torch.Tensor,
    model_output: torch.Tensor,
    table: torch.Tensor,
    step: torch.Tensor,
    seed: torch.Tensor,
    *,
    x_start_previous: torch.Tensor | None,
    x_start_previous2: torch.Tensor | None,
    x_start_previous3: torch.Tensor | None,
    noise: torch.Tensor | None,
    clip_x_start: bool,
    start_index: int,
    stream: int,
    second_output: torch.Tensor | None,
    gradient: torch.Tensor | None,
    known: torch.Tensor | None,
    mask: torch.Tensor | None,
    update: torch.Tensor | None,
    reduces: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    history = (x_start_previous, x_start_previous2, x_start_previous3)
    options = (noise, clip_x_start, start_index, stream)
    guidance = (second_output, gradient, known, mask, update, reduces)
    return torch.ops.ddpm_fast.sampler_step(x, model_output, table, step, seed, *history, *options, *guidance)


def _native_inplace(
    x: torch.Tensor,
    model_output: torch.Tensor,
    table: torch.Tensor,
    step: torch.Tensor,
    seed: torch.Tensor,
    *,
    x_start: torch.Tensor | None,
    x_start2: torch.Tensor | None,
    x_start3: torch.Tensor | None,
    noise: torch.Tensor | None,
    clip_x_start: bool,
    start_index: int,
    stream: int,
    second_output: torch.Tensor | None,
    gradient: torch.Tensor | None,
    known: torch.Tensor | None,
    mask: torch.Tensor | None,
    update: torch.Tensor | None,
    reduces: bool,
) -> torch.Tensor:
    history = (x_start, x_start2, x_start3)
    options = (noise, clip_x_start, start_index, stream)
    guidance = (second_output, gradient, known, mask, update, reduces)
    torch.ops.ddpm_fast.sampler_step_(x, model_output, table, step, seed, *history, *options, *guidance)
    return x


def _native_refuses(
    x: torch.Tensor,
    model_output: torch.Tensor,
    table: torch.Tensor,
    step: torch.Tensor,
    seed: torch.Tensor,
    *,
    noise: torch.Tensor | None,
    clip_x_start: bool,
    start_index: int,
    stream: int,
    reduces: bool,
    **tensors: torch.Tensor | None,
) -> str | None:
    reason = extension.why_not(x.device)
    if reason is not None:
        return reason
    if x.dtype != torch.float32:
        return f"x is {x.dtype}, and native code computes in float32"
    if model_output.dtype == torch.float64:
        return "model_output is torch.float64, and native code reads float32, float16 and bfloat16"
    outputs = {"model_output": model_output, "second_output": tensors.pop("second_output")}
    states = {"x": x, **tensors, "noise": noise}
    for name, tensor in {**states, "table": table}.items():
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} is not contiguous"
    for name, tensor in outputs.items():
        if tensor is not None and not _is_evenly_spaced(tensor):
            return f"{name} is neither contiguous nor channels-last, its strides are {tensor.stride()}"
    given = (*states.values(), *outputs.values())
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given):
        return "a gradient is wanted, and native code has none"
    return None


def _is_evenly_spaced(tensor: torch.Tensor) -> bool:
    """Whether one stride leads through all dimensions from the third on; batch and channel may have any."""
    pixels, spacing = 1, 0
    for size, stride in zip(reversed(tensor.shape[2:]), reversed(tensor.stride()[2:]), strict=True):
        if size == 1:
            continue
        spacing = stride if pixels == 1 else spacing
        if stride != pixels * spacing:
            return False
        pixels *= size
    return True


def _example(names: tuple[str, ...]) -> Callable[[torch.device], tuple[tuple, dict]]:
    def example(device: torch.device) -> tuple[tuple, dict]:
        image = torch.zeros(2, 3, 8, 8, device=device)
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        options = {"noise": None, "clip_x_start": True, "start_index": 0, "stream": STREAM_STEP, "reduces": False}
        tensors = dict.fromkeys((*names, *GUIDANCE))
        return (image, image, torch.zeros(1, 6, device=device), zero, zero), {**tensors, **options}

    return example


_sampler_step_op = Op(
    "sampler_step",
    [Implementation("native", _native, _native_refuses), Implementation("reference", reference.sampler_step)],
    _example(_PREVIOUS),
)
_sampler_step_inplace_op = Op(
    "sampler_step_",
    [Implementation("native", _native_inplace, _native_refuses), Implementation("reference", reference.sampler_step_)],
    _example(_STATES),
)
