"""RMSNorm and GroupNorm with everything around them in one pass: public functions, registration, eligibility.

    v = x + bias
    x̂ = v / max(‖v‖₂, 1e-12) · √C   (RMSNorm over channels, Zhang & Sennrich 2019, in the peer's form), or
    x̂ = (v − mean) / √(variance + eps) over a group of channels and all pixels   (GroupNorm, Wu & He 2018)
    y = (x̂·weight + bias_affine)·(1 + scale) + shift
    out = dropout(SiLU(y)) + residual

Backward keeps x and one (RMSNorm, per pixel) or two (GroupNorm, per group) floats, and computes the rest again.
"""

from __future__ import annotations

import torch

from ddpm_fast.ops.arguments import check_seed, check_tensors, why_not_on_cpu
from ddpm_fast.ops.norm_silu import reference
from ddpm_fast.runtime import triton_launch
from ddpm_fast.runtime.dispatch import Implementation, Op

_LARGEST_ROW = 8192  # channels that the RMSNorm kernels keep in one program's registers
_LARGEST_SAMPLE = 2**31 - 2**16  # elements that the kernels' 32-bit offsets reach within one sample

_ROWS = "Tensor weight, Tensor? bias_affine, Tensor? bias, Tensor? scale, Tensor? shift"
_library = torch.library.Library("ddpm_fast", "FRAGMENT")
for _name in ("norm_silu", "native_norm_silu"):  # the Triton kernels' operators and the extension's
    _library.define(
        # groups = 0 is RMSNorm.
        f"{_name}(Tensor x, {_ROWS}, Tensor? residual, Tensor? seed, int groups, float eps, bool activation, "
        "float dropout_p) -> (Tensor out, Tensor statistics)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    _library.define(
        f"{_name}_backward(Tensor grad, Tensor x, Tensor statistics, {_ROWS}, Tensor? seed, int groups, "
        "bool activation, float dropout_p) "
        "-> (Tensor dx, Tensor dweight, Tensor dbias_affine, Tensor dbias, Tensor dscale, Tensor dshift)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )


@torch.library.impl(_library, "norm_silu", "CPU")
@torch.library.impl(_library, "norm_silu", "CUDA")
def _norm_silu(x, weight, bias_affine, bias, scale, shift, residual, seed, groups, eps, activation, dropout_p):
    from ddpm_fast.ops.norm_silu import triton as kernel

    return kernel.forward(
        x, weight, bias_affine, bias, scale, shift, residual, seed, groups, eps, activation, dropout_p
    )


@torch.library.impl(_library, "norm_silu_backward", "CPU")
@torch.library.impl(_library, "norm_silu_backward", "CUDA")
def _norm_silu_backward(
    grad, x, statistics, weight, bias_affine, bias, scale, shift, seed, groups, activation, dropout_p
):
    from ddpm_fast.ops.norm_silu import triton as kernel

    dx, *gradients = kernel.backward(
        grad, x, statistics, weight, bias_affine, bias, scale, shift, seed, groups, activation, dropout_p
    )
    rows = (weight, bias_affine, bias, scale, shift)
    return dx, *(
        x.new_empty(0) if row is None else gradient.to(row.dtype).reshape(row.shape)
        for row, gradient in zip(rows, gradients, strict=True)
    )


@torch.library.register_fake("ddpm_fast::norm_silu", lib=_library)
@torch.library.register_fake("ddpm_fast::native_norm_silu", lib=_library)
def _norm_silu_fake(x, weight, bias_affine, bias, scale, shift, residual, seed, groups, eps, activation, dropout_p):
    B, _, H, W = x.shape
    return torch.empty_like(x), x.new_empty((B, groups, 2) if groups else (B, H * W), dtype=torch.float32)


@torch.library.register_fake("ddpm_fast::norm_silu_backward", lib=_library)
@torch.library.register_fake("ddpm_fast::native_norm_silu_backward", lib=_library)
def _norm_silu_backward_fake(
    grad, x, statistics, weight, bias_affine, bias, scale, shift, seed, groups, activation, dropout_p
):
    rows = (weight, bias_affine, bias, scale, shift)
    return torch.empty_like(x), *(x.new_empty(0) if row is None else row.new_empty(row.shape) for row in rows)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias_affine, bias, scale, shift, residual, seed, groups, _, activation, dropout_p = inputs
    ctx.save_for_backward(x, output[1], weight, bias_affine, bias, scale, shift, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the statistics
    ctx.options = (groups, activation, dropout_p)
    ctx.residual_dtype = None if residual is None else residual.dtype


def _backward_of(operator: str, kernel: str):
    def backward(ctx, grad, _):
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"norm_silu: the {kernel} kernel's gradient cannot be differentiated again (create_graph=True); "
                'use ddpm_fast.use_backend("reference") for second derivatives'
            )
        saved = ctx.saved_tensors  # asked for once: under torch's checkpoint a second time is an error
        dx, *rows = getattr(torch.ops.ddpm_fast, operator)(grad, *saved, *ctx.options)
        given = saved[2:7]
        rows = [None if tensor is None else row for tensor, row in zip(given, rows, strict=True)]
        dresidual = None if ctx.residual_dtype is None else grad.to(ctx.residual_dtype)
        return dx, *rows, dresidual, None, None, None, None, None

    return backward


for _name, _kernel in (("norm_silu", "Triton"), ("native_norm_silu", "native")):
    _backward = _backward_of(f"{_name}_backward", _kernel)
    torch.library.register_autograd(f"ddpm_fast::{_name}", _backward, setup_context=_setup_context, lib=_library)


def rms_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: bool = True,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """RMSNorm over the channels, and what stands around it.

    Args:
        x: (B, C, H, W) float32, float16, bfloat16 (float64: reference only). Statistics and arithmetic are float32.
            Channels-last is the fast layout; on CUDA contiguous runs as well; others run the reference.
        weight: the norm's gain, C elements in any shape; the peer's is (1, C, 1, 1).
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
        TypeError, ValueError: an argument is not what is said here.
    """
    _check(x, weight, None, bias, scale, shift, residual, dropout_p, seed)
    return _rms_norm_silu_op(
        x,
        weight,
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
    weight: torch.Tensor,
    bias_affine: torch.Tensor,
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
    """GroupNorm, and what stands around it.

    Args:
        weight, bias_affine: (C,), the norm's own affine map.
        groups: divides C.
        eps: added to the variance.
        others: see `rms_norm_silu`.

    Returns:
        Shape, dtype and memory format of x. Gradients flow to everything but seed.

    Raises:
        TypeError, ValueError: an argument is not what is said here.
    """
    _check(x, weight, bias_affine, bias, scale, shift, residual, dropout_p, seed)
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups must divide the {x.shape[1]} channels of x, got {groups}")
    return _group_norm_silu_op(
        x,
        weight,
        bias_affine,
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


def _check(x, weight, bias_affine, bias, scale, shift, residual, dropout_p, seed) -> None:
    """The checks of every implementation."""
    optional = {"bias_affine": bias_affine, "bias": bias, "scale": scale, "shift": shift, "residual": residual}
    given = {"x": x, "weight": weight, **{name: tensor for name, tensor in optional.items() if tensor is not None}}
    check_tensors(given)
    check_seed(dropout_p, seed, x.device)
    if x.dim() != 4:
        raise ValueError(f"x must have shape (B, C, H, W), got {tuple(x.shape)}")
    B, C, _, _ = x.shape
    if weight.numel() != C:
        raise ValueError(f"weight must have {C} elements, one per channel of x, got shape {tuple(weight.shape)}")
    shapes = {"bias_affine": (C,), "bias": (C,), "scale": (B, C), "shift": (B, C), "residual": tuple(x.shape)}
    for name, shape in shapes.items():
        if name in given and given[name].shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(given[name].shape)}")


def _rms(operator):
    def run(x, weight, *, bias, scale, shift, residual, activation, dropout_p, seed) -> torch.Tensor:
        seed = seed if dropout_p > 0 else None
        return operator(x, weight, None, bias, scale, shift, residual, seed, 0, 0.0, activation, dropout_p)[0]

    return run


def _group(operator):
    def run(
        x, weight, bias_affine, *, groups, eps, bias, scale, shift, residual, activation, dropout_p, seed
    ) -> torch.Tensor:
        seed = seed if dropout_p > 0 else None
        rows = (weight, bias_affine, bias, scale, shift)
        return operator(x, *rows, residual, seed, groups, eps, activation, dropout_p)[0]

    return run


def _triton_refuses(x, weight, bias_affine=None, **options) -> str | None:
    reason = triton_launch.why_not_triton(x.device)
    if reason is not None:
        return reason
    for name, tensor in {"x": x, "weight": weight, "bias_affine": bias_affine, **options}.items():
        if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
            return f"{name} is torch.float64, and the kernels compute in float32"
    if x.numel() == 0:
        return "x is empty"
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        return f"x is neither contiguous nor channels-last, its strides are {x.stride()}"
    if x.shape[1:].numel() > _LARGEST_SAMPLE:
        return f"a sample has {x.shape[1:].numel()} elements, and the kernels take at most {_LARGEST_SAMPLE}"
    return None


def _triton_rms_refuses(x, weight, **options) -> str | None:
    reason = _triton_refuses(x, weight, **options)
    if reason is None and x.shape[1] > _LARGEST_ROW:
        return f"x has {x.shape[1]} channels, and a program of the RMSNorm kernel holds at most {_LARGEST_ROW}"
    return reason


def _native_refuses(x, weight, bias_affine=None, **options) -> str | None:
    given = {name: option for name, option in options.items() if isinstance(option, torch.Tensor)}
    return why_not_on_cpu({"x": x, "weight": weight, "bias_affine": bias_affine, **given}, maps=("x",))


def _example(affine: bool):
    def example(device: torch.device) -> tuple[tuple, dict]:
        x = torch.zeros(2, 8, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
        row = torch.zeros(8, device=device)
        options = {"bias": None, "scale": None, "shift": None, "residual": None}
        options |= {"activation": True, "dropout_p": 0.0, "seed": None}
        return (x, row, row) if affine else (x, row), options | ({"groups": 2, "eps": 1e-5} if affine else {})

    return example


_triton_operator, _native_operator = torch.ops.ddpm_fast.norm_silu, torch.ops.ddpm_fast.native_norm_silu
_rms_norm_silu_op = Op(
    "rms_norm_silu",
    [
        Implementation("triton", _rms(_triton_operator), _triton_rms_refuses),
        Implementation("native", _rms(_native_operator), _native_refuses),
        Implementation("reference", reference.rms_norm_silu),
    ],
    _example(affine=False),
)
_group_norm_silu_op = Op(
    "group_norm_silu",
    [
        Implementation("triton", _group(_triton_operator), _triton_refuses),
        Implementation("native", _group(_native_operator), _native_refuses),
        Implementation("reference", reference.group_norm_silu),
    ],
    _example(affine=True),
)
