"""The checks of the sampler step, and the names of its table's columns."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ddpm_fast import noise as noise_function

COLUMNS = (
    *("p", "q", "r", "s", "u", "sigma", "u2", "u3", "lo", "hi", "e", "f"),
    *("A", "B", "w", "phi", "eta", "rho", "mu", "space", "kg", "kn", "kc", "h", "j"),
)
_WIDTHS = (6, 10, 12, 25)
GUIDANCE = ("second_output", "gradient", "known", "mask", "update")
# The columns that make a row read a tensor, and its place among three earlier states and those of GUIDANCE.
_READS = (
    *(("u", 0), ("u2", 1), ("u3", 2), ("w", 3), ("mu", 3), ("kn", 3), ("kc", 3), ("h", 4), ("j", 4), ("A", 5)),
    ("mu", 7),
)
_STATE_DTYPES = (torch.float32, torch.float64)
_OUTPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check(
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
        guidance: the tensors of `GUIDANCE`.
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
        _check_values(table, step, dict(zip((*names, *GUIDANCE), (*history, *guidance), strict=True)), reduces)


def _check_guidance(
    x: torch.Tensor, model_output: torch.Tensor, table: torch.Tensor, guidance: tuple[torch.Tensor | None, ...]
) -> None:
    second_output, _, known, mask, _ = guidance
    if table.shape[1] != _WIDTHS[-1]:
        name = next(name for name, tensor in zip(GUIDANCE, guidance, strict=True) if tensor is not None)
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
        tensors: the three earlier states and those of `GUIDANCE`, in this order.
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
