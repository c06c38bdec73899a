"""RMSNorm and GroupNorm with everything around them in one pass: public functions, checks, eligibility.

    v = x + bias
    x̂ = v / max(‖v‖₂, 1e-12) · √C   (RMSNorm over channels, Zhang & Sennrich 2019, in upstream's form), or
    x̂ = (v − mean) / √(variance + eps) over a group of channels and all pixels   (GroupNorm, Wu & He 2018)
    y = (x̂·gain + offset)·(1 + scale) + shift
    out = dropout(SiLU(y)) + residual

What is kept for backward is declared in operators.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ddpm_fast.ops.arguments import check_seed, check_tensors, native_comes_first, why_not_on_cpu
from ddpm_fast.ops.branches import number_of_branches, with_branches
from ddpm_fast.ops.norm_silu import reference
from ddpm_fast.ops.norm_silu.operators import FirstNorm, LastNorm, LastNormConv, NormBeside, norm_silu, norm_silu_conv
from ddpm_fast.runtime import triton_launch
from ddpm_fast.runtime.dispatch import Implementation, Op, forced_backend, in_forward_mode

_OPTIONAL = ("offset", "bias", "scale", "shift", "residual")
_TENSORS = ("x", "gain", *_OPTIONAL)
_LARGEST_ROW = 8192  # channels that the RMSNorm kernels keep in one program's registers
_LARGEST_ROW_BEFORE_CONV = 256  # the same of the kernels with a 1×1 convolution
_MOST_OUTPUTS = 16  # of that
_LARGEST_ROWS = 2**31 - 2**16  # pixels that these kernels' 32-bit indices count
_LARGEST_SAMPLE = 2**31 - 2**16  # elements that the kernels' 32-bit offsets reach within one sample


def rms_norm_silu(
    x: torch.Tensor,
    gain: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: bool = True,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """RMSNorm over the channels, with bias, scale and shift, SiLU, dropout and residual.

    Args:
        x: (B, C, H, W) float32, float16, bfloat16 (float64: reference only). Statistics and arithmetic are float32.
            Channels-last or contiguous; others run the reference.
        gain: the norm's gain, C elements in any shape; upstream's is (1, C, 1, 1).
        bias: (C,), added before the norm: the bias of the convolution that made x.
        scale, shift: (B, C); y·(1 + scale) + shift after the norm.
        residual: shape of x, added last.
        activation: SiLU after scale and shift.
        dropout_p: probability in [0, 1] of an element to become 0 after the activation; the others are divided by
            1 − p. It is always applied: pass 0 when not training.
        seed: one int64 element on the device of x, needed where dropout_p > 0. Which elements are dropped is a function
            of seed, batch index and the element's index in C, H, W order.

    Returns:
        Shape, dtype and memory format of x. Gradients flow to everything but seed.

    Raises:
        TypeError, ValueError: an argument does not match its description.
    """
    if seed is None and dropout_p == 0 and native_comes_first(x):
        rows = (gain, None, bias, scale, shift)
        out = norm_silu.fitting()(x, *rows, residual, None, 0, 0.0, activation, 0.0)
        if out is not None:
            return out
    _check(x, gain, None, bias, scale, shift, residual, dropout_p, seed)
    return _rms_norm_silu_op(
        x,
        gain,
        bias=bias,
        scale=scale,
        shift=shift,
        residual=residual,
        activation=activation,
        dropout_p=dropout_p,
        seed=seed,
    )


def group_norm_silu(
    x: torch.Tensor,
    gain: torch.Tensor,
    offset: torch.Tensor,
    *,
    groups: int,
    eps: float = 1e-5,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: bool = True,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """GroupNorm, with bias, scale and shift, SiLU, dropout and residual.

    Args:
        gain, offset: (C,), the norm's own affine map.
        groups: divides C.
        eps: added to the variance.
        bias: (C,), or (B, C), a row for each sample; native code takes the first.
        others: see `rms_norm_silu`.

    Returns:
        Shape, dtype and memory format of x. Gradients flow to everything but seed.

    Raises:
        TypeError, ValueError: an argument does not match its description.
    """
    if seed is None and dropout_p == 0 and offset is not None and groups != 0 and native_comes_first(x):
        rows = (gain, offset, bias, scale, shift)
        out = norm_silu.fitting()(x, *rows, residual, None, groups, eps, activation, 0.0)
        if out is not None:
            return out
    if not isinstance(offset, torch.Tensor):
        raise TypeError(f"offset must be a tensor, got {type(offset).__name__}")
    _check(x, gain, offset, bias, scale, shift, residual, dropout_p, seed, bias_rows=True)
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups must divide the {x.shape[1]} channels of x, got {groups}")
    return _group_norm_silu_op(
        x,
        gain,
        offset,
        groups=groups,
        eps=eps,
        bias=bias,
        scale=scale,
        shift=shift,
        residual=residual,
        activation=activation,
        dropout_p=dropout_p,
        seed=seed,
    )


def group_norm_silu_beside(
    x: torch.Tensor, gain: torch.Tensor, offset: torch.Tensor, *, groups: int, eps: float, activation: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """`group_norm_silu`, and x for what else reads it: with Triton its gradient joins the norm's in one pass."""
    if _is_beside(x, gain, offset, groups, eps):
        return NormBeside.apply(x, gain, offset, groups, eps, activation)
    return group_norm_silu(x, gain, offset, groups=groups, eps=eps, activation=activation), x


def _is_beside(x: torch.Tensor, gain: torch.Tensor, offset: torch.Tensor, groups: int, eps: float) -> bool:
    """True where the norm runs by Triton and x takes a gradient; torch.compile and tracing see operators alone."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    if not (torch.is_grad_enabled() and x.requires_grad):
        return False
    options: dict[str, Any] = dict.fromkeys(("bias", "scale", "shift", "residual", "seed"))
    options |= {"groups": groups, "eps": eps, "activation": True, "dropout_p": 0.0}
    return _group_norm_silu_op.choose(x, gain, offset, **options).name == "triton"


def first_norm_silu(
    x: torch.Tensor,
    gain: torch.Tensor,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    seed: torch.Tensor | None,
    last: tuple[torch.Tensor | None, ...],
    *,
    groups: int,
    eps: float,
    dropout_p: float,
    last_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The first of two norms of maps of one shape, with SiLU and dropout; `groups` = 0 is RMSNorm.

    With Triton its backward also finishes the gradients of the parameters of the last norm, in one launch instead of
    two. A tensor that stands for that norm's partial sums takes them there, as its gradient.

    Args:
        last: gain, offset and bias of the last norm.
        last_weight: of the convolution where the last norm is `last_norm_silu_conv`.
        others: see `rms_norm_silu` and `group_norm_silu`.

    Returns:
        The output, and what `last_norm_silu` takes as `sums`: None where each norm has a backward of its own.
    """
    _check(x, gain, offset, bias, scale, shift, None, dropout_p, seed)
    options: dict[str, Any] = {"bias": bias, "scale": scale, "shift": shift, "residual": None, "activation": True}
    options |= {"dropout_p": dropout_p, "seed": seed}
    arguments, options, op = _call_of(x, gain, offset, groups, eps, options)
    chosen = op.choose(*arguments, **options)
    if chosen.name != "triton" or not _are_finished_together(x, (gain, offset, bias), last):
        return chosen.function(*arguments, **options), None
    seed = seed if dropout_p > 0 else None
    return FirstNorm.apply(x, gain, offset, bias, scale, shift, seed, *last, groups, eps, dropout_p, last_weight)


def last_norm_silu(
    x: torch.Tensor,
    gain: torch.Tensor,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    sums: torch.Tensor | None,
    *,
    groups: int,
    eps: float,
) -> torch.Tensor:
    """The last of two norms, see `first_norm_silu`, with SiLU and residual."""
    _check(x, gain, offset, bias, None, None, residual, 0.0, None)
    options: dict[str, Any] = {"bias": bias, "scale": None, "shift": None, "residual": residual, "activation": True}
    options |= {"dropout_p": 0.0, "seed": None}
    arguments, options, op = _call_of(x, gain, offset, groups, eps, options)
    chosen = op.choose(*arguments, **options)
    if chosen.name != "triton" or sums is None:
        return chosen.function(*arguments, **options)
    return with_branches(*LastNorm.apply(x, gain, offset, bias, residual, sums, groups, eps, number_of_branches()))


def last_norm_silu_conv(
    x: torch.Tensor,
    gain: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    products: torch.Tensor,
    sums: torch.Tensor | None,
) -> torch.Tensor:
    """The 1×1 convolution of SiLU(RMSNorm(x + bias)·gain), plus residual; `fits_conv` says whether by Triton, alone.

    Args:
        residual: (B, J, H, W).
        weight: (J, C, 1, 1).
        products: takes the weight's gradient, see `stand_in_for_products`.
        sums: of `first_norm_silu`, with this weight as `last_weight`; None without gradients.
    """
    if sums is None:
        assert not torch.is_grad_enabled(), "the first norm takes gradients of this one, see fits_conv"
        return norm_silu_conv.triton(x, gain, bias, residual, weight)[0]
    return LastNormConv.apply(x, gain, bias, residual, weight, sums, products)


def fits_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_takes_gradient: bool,
    first: tuple[torch.Tensor, torch.Tensor],
    last: tuple[torch.Tensor, torch.Tensor],
) -> bool:
    """True if `last_norm_silu_conv` of a map as large as x, with this weight, runs after a first norm.

    Args:
        x_takes_gradient: whether the first norm's input does.
        first, last: gain and bias of the two norms.
    """
    J, C = weight.shape[:2]
    if J > _MOST_OUTPUTS or C > _LARGEST_ROW_BEFORE_CONV or forced_backend() not in (None, "triton"):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or in_forward_mode():  # type: ignore[attr-defined]
        return False
    if triton_launch.why_not_triton(x.device) is not None or x.dtype == torch.float64 or x.numel() == 0:
        return False
    if not x.is_contiguous(memory_format=torch.channels_last) or x[:, 0].numel() > _LARGEST_ROWS:
        return False
    if not torch.is_grad_enabled():
        return True
    alike = all((a.dtype, a.numel()) == (b.dtype, b.numel()) for a, b in zip(first, last, strict=True))
    return x_takes_gradient and alike and any(row.requires_grad for row in last)


def _call_of(
    x: torch.Tensor, gain: torch.Tensor, offset: torch.Tensor | None, groups: int, eps: float, options: dict[str, Any]
) -> tuple[tuple[torch.Tensor | None, ...], dict[str, Any], Op]:
    """The positional and other arguments of the op that is meant, and the op."""
    if groups == 0:
        return (x, gain), options, _rms_norm_silu_op
    return (x, gain, offset), {"groups": groups, "eps": eps, **options}, _group_norm_silu_op


def _are_finished_together(
    x: torch.Tensor, first: tuple[torch.Tensor | None, ...], last: tuple[torch.Tensor | None, ...]
) -> bool:
    """True if one launch gives the gradients of gain, offset and bias of both norms, and any of the last is wanted.

    The first norm's backward must run anyway: x needs a gradient. torch.compile and tracing see operators alone.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    if not (torch.is_grad_enabled() and x.requires_grad):
        return False
    for one, other in zip(first, last, strict=True):
        if (one is None) != (other is None):
            return False
        if one is not None and other is not None and (one.dtype, one.numel()) != (other.dtype, other.numel()):
            return False
    return any(row is not None and row.requires_grad for row in last)


def _check(
    x: torch.Tensor,
    gain: torch.Tensor,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    dropout_p: float,
    seed: torch.Tensor | None,
    *,
    bias_rows: bool = False,
) -> None:
    """The checks of every implementation."""
    given = {"x": x, "gain": gain}
    optional = {"offset": offset, "bias": bias, "scale": scale, "shift": shift, "residual": residual}
    given |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    check_tensors(given)
    check_seed(dropout_p, seed, x.device)
    if x.dim() != 4:
        raise ValueError(f"x must have shape (B, C, H, W), got {tuple(x.shape)}")
    B, C, _, _ = whole = x.shape
    if gain.numel() != C:
        raise ValueError(f"gain must have {C} elements, one per channel of x, got shape {tuple(gain.shape)}")
    bias_shape = (B, C) if bias_rows and bias is not None and bias.dim() == 2 else (C,)
    shapes = ((C,), bias_shape, (B, C), (B, C), whole)
    for (name, tensor), shape in zip(optional.items(), shapes, strict=True):
        if tensor is not None and tensor.shape != shape:
            wanted = f"({C},) or {(B, C)}" if name == "bias" and bias_rows else f"{tuple(shape)}"
            raise ValueError(f"{name} must have shape {wanted}, got {tuple(tensor.shape)}")


def _rms(operator: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., torch.Tensor]:
    def run(
        x: torch.Tensor,
        gain: torch.Tensor,
        *,
        bias: torch.Tensor | None,
        scale: torch.Tensor | None,
        shift: torch.Tensor | None,
        residual: torch.Tensor | None,
        activation: bool,
        dropout_p: float,
        seed: torch.Tensor | None,
    ) -> torch.Tensor:
        seed = seed if dropout_p > 0 else None
        return operator(x, gain, None, bias, scale, shift, residual, seed, 0, 0.0, activation, dropout_p)[0]

    return run


def _group(operator: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., torch.Tensor]:
    def run(
        x: torch.Tensor,
        gain: torch.Tensor,
        offset: torch.Tensor,
        *,
        groups: int,
        eps: float,
        bias: torch.Tensor | None,
        scale: torch.Tensor | None,
        shift: torch.Tensor | None,
        residual: torch.Tensor | None,
        activation: bool,
        dropout_p: float,
        seed: torch.Tensor | None,
    ) -> torch.Tensor:
        seed = seed if dropout_p > 0 else None
        rows = (gain, offset, bias, scale, shift)
        return operator(x, *rows, residual, seed, groups, eps, activation, dropout_p)[0]

    return run


def _is_dense(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) or x.is_contiguous()


def _why_not_dense(x: torch.Tensor) -> str:
    return f"x is neither contiguous nor channels-last, its strides are {x.stride()}"


def _triton_refuses(
    x: torch.Tensor,
    gain: torch.Tensor,
    offset: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    **options: torch.Tensor | float | None,
) -> str | None:
    reason = triton_launch.why_not_triton(x.device)
    if reason is not None:
        return reason
    for name, tensor in zip(_TENSORS, (x, gain, offset, bias, scale, shift, residual), strict=True):
        if tensor is not None and tensor.dtype == torch.float64:
            return f"{name} is torch.float64, and the kernels compute in float32"
    if x.numel() == 0:
        return "x is empty"
    if not _is_dense(x):
        return _why_not_dense(x)
    if x.numel() > _LARGEST_SAMPLE and x.shape[1:].numel() > _LARGEST_SAMPLE:
        return f"a sample has {x.shape[1:].numel()} elements, and the kernels take at most {_LARGEST_SAMPLE}"
    return None


def _triton_rms_refuses(x: torch.Tensor, gain: torch.Tensor, **options: Any) -> str | None:
    reason = _triton_refuses(x, gain, None, **options)
    if reason is None and x.shape[1] > _LARGEST_ROW:
        return f"x has {x.shape[1]} channels, and a program of the RMSNorm kernel holds at most {_LARGEST_ROW}"
    return reason


def _native_refuses(
    x: torch.Tensor,
    gain: torch.Tensor,
    offset: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    **options: torch.Tensor | float | None,
) -> str | None:
    if bias is not None and bias.dim() == 2:
        return "bias has a row for each sample, and native code takes one row"
    reason = why_not_on_cpu(
        {"x": x, "gain": gain, "offset": offset, "bias": bias, "scale": scale, "shift": shift, "residual": residual}
    )
    return reason if reason is not None or _is_dense(x) else _why_not_dense(x)


def _example(offset: bool) -> Callable[[torch.device], tuple[tuple, dict]]:
    def example(device: torch.device) -> tuple[tuple, dict]:
        x = torch.zeros(2, 8, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
        row = torch.zeros(8, device=device)
        options: dict[str, float | None] = {"bias": None, "scale": None, "shift": None, "residual": None}
        options |= {"activation": True, "dropout_p": 0.0, "seed": None}
        return (x, row, row) if offset else (x, row), options | ({"groups": 2, "eps": 1e-5} if offset else {})

    return example


_rms_norm_silu_op = Op(
    "rms_norm_silu",
    [
        Implementation("triton", _rms(norm_silu.triton), _triton_rms_refuses),
        Implementation("native", _rms(norm_silu.native), _native_refuses),
        Implementation("reference", reference.rms_norm_silu),
    ],
    _example(offset=False),
)
_group_norm_silu_op = Op(
    "group_norm_silu",
    [
        Implementation("triton", _group(norm_silu.triton), _triton_refuses),
        Implementation("native", _group(norm_silu.native), _native_refuses),
        Implementation("reference", reference.group_norm_silu),
    ],
    _example(offset=True),
)
