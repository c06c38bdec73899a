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
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ddpm_fast import noise as noise_function
from ddpm_fast.noise import STREAM_STEP
from ddpm_fast.ops.sampler_step import reference
from ddpm_fast.runtime import extension
from ddpm_fast.runtime.dispatch import Implementation, Op

COLUMNS = (
    *("p", "q", "r", "s", "u", "sigma", "u2", "u3", "lo", "hi", "e", "f"),
    *("A", "B", "w", "phi", "eta", "rho", "mu", "space", "kg", "kn", "kc", "h", "j"),
)
_WIDTHS = (6, 10, 12, 25)
_GUIDANCE = ("second_output", "gradient", "known", "mask", "update")
# The columns that make a row read a tensor, and its place among three earlier states and those of _GUIDANCE.
_READS = (
    *(("u", 0), ("u2", 1), ("u3", 2), ("w", 3), ("mu", 3), ("kn", 3), ("kc", 3), ("h", 4), ("j", 4), ("A", 5)),
    ("mu", 7),
)
_PREVIOUS = ("x_start_previous", "x_start_previous2", "x_start_previous3")
_STATES = ("x_start", "x_start2", "x_start3")
_STATE_DTYPES = (torch.float32, torch.float64)
_OUTPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

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
    _check(x, model_output, table, step, seed, _PREVIOUS, history, noise, start_index, stream, guidance, reduces)
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
    _check(x, model_output, table, step, seed, _STATES, history, noise, start_index, stream, guidance, reduces)
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


def _check(
    x: torch.Tensor,
    model_output: torch.Tensor,
    table: torch.Tensor,
    step: torch.Tensor,
    seed: torch.Tensor,
    names: tuple[str, ...],
    history: tuple[torch.Tensor | None, ...],
    noise: torch.Tensor | None,
    start_index: int,
    stream: int,
    guidance: tuple[torch.Tensor | None, ...],
    reduces: bool,
) -> None:
    """The checks of every implementation: shapes, dtypes and devices always, values where that costs no waiting.

    Args:
        names: of the tensors in `history`.
        guidance: the tensors of `_GUIDANCE`.
    """
    second_output, gradient, known, mask, update = guidance
    optional = [*zip(names, history, strict=True), ("noise", noise), ("gradient", gradient), ("known", known)]
    like_x = [(name, tensor) for name, tensor in (*optional, ("update", update)) if tensor is not None]
    required = [("x", x), ("model_output", model_output), ("table", table), ("step", step), ("seed", seed)]
    others = [("second_output", second_output), ("mask", mask)]
    given = required + like_x + [(name, tensor) for name, tensor in others if tensor is not None]
    for name, tensor in given:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if x.dtype not in _STATE_DTYPES:
        raise TypeError(f"x must be float32 (or float64), got {x.dtype}")
    noise_function.check_counter_range(tuple(x.shape), stream=stream, start_index=start_index)
    for name, tensor in given:
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")
    for name, tensor in like_x:
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")
        if tensor.shape != x.shape:
            raise ValueError(f"{name} must have the shape of x, {tuple(x.shape)}, got {tuple(tensor.shape)}")
    learned = _has_variance(x, model_output)
    if model_output.shape != x.shape and not learned:
        raise ValueError(
            f"model_output must have the shape of x, {tuple(x.shape)}, got {tuple(model_output.shape)}; with a learned "
            "variance it has twice the channels"
        )
    if model_output.dtype not in _OUTPUT_DTYPES:
        raise TypeError(f"model_output must be float32, float16, bfloat16 or float64, got {model_output.dtype}")
    if table.dtype not in (torch.float32, x.dtype):
        raise TypeError(f"table must be {' or '.join(sorted({'torch.float32', str(x.dtype)}))}, got {table.dtype}")
    if table.dim() != 2 or table.shape[0] < 1 or table.shape[1] not in _WIDTHS:
        raise ValueError(
            f"table must have shape (S, 6), (S, 10), (S, 12) or (S, 25), columns {', '.join(COLUMNS)}, got "
            f"{tuple(table.shape)}"
        )
    if learned and table.shape[1] == _WIDTHS[0]:
        raise ValueError(
            f"table must have the columns lo and hi for the variance in model_output, of shape "
            f"{tuple(model_output.shape)}, got {tuple(table.shape)}"
        )
    if any(tensor is not None for tensor in guidance):
        _check_guidance(x, model_output, table, guidance)
    if reduces and second_output is None:
        raise ValueError("second_output must be given where reduces is True, got None")
    for name, newer, older in zip(names[1:], history[:-1], history[1:], strict=True):
        if older is not None and newer is None:
            raise ValueError(f"{names[names.index(name) - 1]} must be given where {name} is, got None")
    for name, tensor in (("step", step), ("seed", seed)):
        if tensor.dtype != torch.int64 or tensor.numel() != 1:
            raise TypeError(
                f"{name} must be a one-element int64 tensor, got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
    # Not in a recording (runtime/recording.py): a replay looks at no value, and native code checks them itself.
    watched = torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None
    if x.device.type == "cpu" and not watched:
        _check_values(table, step, dict(zip((*names, *_GUIDANCE), (*history, *guidance), strict=True)), reduces)


def _check_guidance(
    x: torch.Tensor, model_output: torch.Tensor, table: torch.Tensor, guidance: tuple[torch.Tensor | None, ...]
) -> None:
    second_output, _, known, mask, _ = guidance
    if table.shape[1] != _WIDTHS[-1]:
        name = next(name for name, tensor in zip(_GUIDANCE, guidance, strict=True) if tensor is not None)
        raise ValueError(f"table must have shape (S, 25) where {name} is given, got {tuple(table.shape)}")
    if second_output is not None:
        if second_output.shape != x.shape and not _has_variance(x, second_output):
            raise ValueError(
                f"second_output must have the shape of x, {tuple(x.shape)}, or twice its channels, got "
                f"{tuple(second_output.shape)}"
            )
        if second_output.dtype != model_output.dtype:
            raise TypeError(
                f"second_output must have the dtype of model_output, {model_output.dtype}, got {second_output.dtype}"
            )
    if mask is None:
        if known is not None:
            raise ValueError("mask must be given where known is, got None")
        return
    if mask.dtype != x.dtype:
        raise TypeError(f"mask must have the dtype of x, {x.dtype}, got {mask.dtype}")
    sizes = zip(mask.shape, x.shape, strict=False)
    if mask.dim() != x.dim() or any(size != of_x and (size != 1 or i > 1) for i, (size, of_x) in enumerate(sizes)):
        raise ValueError(
            f"mask must have the shape of x, {tuple(x.shape)}, or 1 instead of its batch size or channels, got "
            f"{tuple(mask.shape)}"
        )


def _has_variance(x: torch.Tensor, model_output: torch.Tensor) -> bool:
    """Whether the output has a second half of channels."""
    shape = tuple(model_output.shape)
    return x.dim() >= 2 and shape != tuple(x.shape) and shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:])


def _check_values(
    table: torch.Tensor, step: torch.Tensor, tensors: dict[str, torch.Tensor | None], reduces: bool
) -> None:
    """The row exists, and every tensor is given that it reads.

    Args:
        tensors: the three earlier states and those of `_GUIDANCE`, in this order.
    """
    row = int(step.item())
    if not 0 <= row < table.shape[0]:
        raise ValueError(f"step must be in [0, {table.shape[0]}), the rows of table, got {row}")
    values = dict(zip(COLUMNS, table[row].tolist(), strict=False))
    names = list(tensors)
    for column, place in _READS:
        name, value, neutral = names[place], values.get(column, 0.0), 1.0 if column == "w" else 0.0
        is_read = column in values and value != neutral and (column != "A" or tensors["mask"] is not None)
        if is_read and tensors[name] is None:
            raise ValueError(
                f"{name} must be given where {column} of the table is not {neutral:g}, got None with {column} = "
                f"{value:g} in row {row}"
            )
    if not reduces and values.get("w", 1.0) != 1:
        for column, needs_sums in (
            ("phi", values["phi"] != 0),
            ("eta", values["eta"] != 1),
            ("rho", values["rho"] > 0),
        ):
            if needs_sums:
                raise ValueError(
                    f"reduces must be True where {column} of the table needs sums over a sample, got False with "
                    f"{column} = {values[column]:g} in row {row}"
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
        tensors = dict.fromkeys((*names, *_GUIDANCE))
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
