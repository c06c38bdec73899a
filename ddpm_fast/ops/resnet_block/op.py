"""A residual block of the UNet: public function, registration, eligibility.

    h = dropout(SiLU(norm(conv3x3(x, weight1) + bias1)·(1 + scale) + shift))
    out = SiLU(norm(conv3x3(h, weight2) + bias2)) + (x, or its 1×1 convolution)

with norm as in the op norm_silu. The native block keeps x and the two convolutions' outputs for backward, and computes
h again.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.utils.checkpoint import checkpoint

from ddpm_fast.ops.arguments import check_seed, check_tensors, why_not_on_cpu, why_steps_come_first
from ddpm_fast.ops.norm_linear.op import linear
from ddpm_fast.ops.operator import Operator
from ddpm_fast.ops.resnet_block import composite
from ddpm_fast.runtime.dispatch import COMPOSITE, Implementation, Op


def _fake(
    x: torch.Tensor, weight1: torch.Tensor, groups: int, keep: bool, **others: object
) -> tuple[torch.Tensor, ...]:
    B, _, H, W = x.shape

    def empty_map(dtype: torch.dtype) -> torch.Tensor:
        shape = (B, weight1.shape[0], H, W)
        return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)

    if not keep:
        return empty_map(x.dtype), *(x.new_empty(0, dtype=torch.float32) for _ in range(4))
    statistics = [x.new_empty((B, groups, 2) if groups else (B, H * W), dtype=torch.float32) for _ in range(2)]
    return empty_map(x.dtype), empty_map(torch.float32), statistics[0], empty_map(torch.float32), statistics[1]


_resnet_block = Operator(
    "resnet_block",
    # groups = 0 is RMSNorm. Without `keep` only out is returned, and empty tensors in place of the others.
    "Tensor x, Tensor? skip, Tensor weight1, Tensor bias1, Tensor gain1, Tensor? offset1, Tensor? scale, "
    "Tensor? shift, Tensor weight2, Tensor bias2, Tensor gain2, Tensor? offset2, Tensor? res_weight, Tensor? res_bias, "
    "Tensor? seed, int groups, float eps, float dropout_p, bool keep",
    returns="out, y1, statistics1, y2, statistics2",
    fake=_fake,
    backward="grad, x, skip, weight1, gain1, offset1, scale, shift, weight2, gain2, offset2, res_weight, seed, "
    "y1, statistics1, y2, statistics2, groups, eps, dropout_p, wants_dx",
    gradients="x, skip, weight1, bias1, gain1, offset1, scale, shift, weight2, bias2, gain2, offset2, res_weight, "
    "res_bias",
    maps="x, skip",
    rows={"bias1": "weight1", "bias2": "weight2", "res_bias": "res_weight"},
    wanted={"wants_dx": "x, skip"},
    gradient_list=True,
    native=True,
)


def resnet_block(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    gain1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    gain2: torch.Tensor,
    *,
    skip: torch.Tensor | None = None,
    x_bias: torch.Tensor | None = None,
    offset1: torch.Tensor | None = None,
    offset2: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    res_weight: torch.Tensor | None = None,
    res_bias: torch.Tensor | None = None,
    out_weight: torch.Tensor | None = None,
    out_bias: torch.Tensor | None = None,
    groups: int = 0,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    recompute: bool = False,
) -> torch.Tensor:
    """Two 3×3 convolutions with norms around a residual.

    Args:
        x: (B, C, H, W) float32, float16, bfloat16 (float64: not native). The native code takes channels-last.
        weight1, weight2: (K, C + C', 3, 3) and (K, K, 3, 3); bias1, bias2: (K,).
        gain1, gain2: the norms' gains, K elements in any shape.
        skip: (B, C', H, W), channels that follow those of x, as if the two were concatenated.
        x_bias: (C,), added to x: the bias of the convolution that made it, where no pass has added it.
        offset1, offset2: (K,), GroupNorm's shifts.
        scale, shift: (B, K); the first norm's output times (1 + scale) plus shift.
        res_weight, res_bias: (K, C + C', 1, 1) and (K,), the residual's convolution; needed where C + C' is not K.
        out_weight, out_bias: (O, K, 1, 1) and (O,), a 1×1 convolution of the block's output.
        groups: of GroupNorm with `eps`; 0 is RMSNorm.
        dropout_p, seed: dropout after the first activation, see `rms_norm_silu`.
        recompute: keep fewer maps for backward and compute them again there. The native block keeps its arguments
            alone; for the steps see composite.py.

    Returns:
        (B, K, H, W), or (B, O, H, W) with `out_weight`, of the dtype and memory format of x. Gradients flow to
        everything but seed, once.

    Raises:
        TypeError, ValueError: an argument does not match its description.
    """
    options: dict[str, Any] = {
        "skip": skip, "x_bias": x_bias, "offset1": offset1, "offset2": offset2, "scale": scale, "shift": shift,
        "res_weight": res_weight, "res_bias": res_bias, "out_weight": out_weight, "out_bias": out_bias,
        "groups": groups, "eps": eps, "dropout_p": dropout_p, "seed": seed, "recompute": recompute,
    }  # fmt: skip
    _check(x, weight1, bias1, gain1, weight2, bias2, gain2, **options)
    return unchecked_resnet_block(x, weight1, bias1, gain1, weight2, bias2, gain2, **options)


def _check(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    gain1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    gain2: torch.Tensor,
    **options: Any,
) -> None:
    """The checks of every implementation."""
    tensors = {"weight1": weight1, "bias1": bias1, "gain1": gain1, "weight2": weight2, "bias2": bias2, "gain2": gain2}
    optional = (
        "skip", "x_bias", "offset1", "offset2", "scale", "shift", "res_weight", "res_bias", "out_weight", "out_bias"
    )  # fmt: skip
    tensors |= {name: options[name] for name in optional if options[name] is not None}
    check_tensors({"x": x, **tensors})
    check_seed(options["dropout_p"], options["seed"], x.device)
    if x.dim() != 4 or weight1.dim() != 4:
        raise ValueError(
            f"x and weight1 must have four dimensions, got shapes {tuple(x.shape)} and {tuple(weight1.shape)}"
        )
    B, C, H, W = x.shape
    if "x_bias" in tensors and tensors["x_bias"].shape != (C,):
        raise ValueError(f"x_bias must have shape ({C},), got {tuple(tensors['x_bias'].shape)}")
    skip: torch.Tensor | None = options["skip"]
    if skip is not None:
        if skip.dim() != 4 or (skip.shape[0], *skip.shape[2:]) != (B, H, W):
            raise ValueError(f"skip must have shape ({B}, C, {H}, {W}), got {tuple(skip.shape)}")
        C += skip.shape[1]
    K, groups = weight1.shape[0], cast("int", options["groups"])
    shapes = {
        "weight1": (K, C, 3, 3), "weight2": (K, K, 3, 3), "bias1": (K,), "bias2": (K,), "offset1": (K,),
        "offset2": (K,), "scale": (B, K), "shift": (B, K), "res_weight": (K, C, 1, 1), "res_bias": (K,),
    }  # fmt: skip
    if "out_weight" in tensors:
        outputs = tensors["out_weight"].shape[0] if tensors["out_weight"].dim() else 0
        shapes |= {"out_weight": (outputs, K, 1, 1), "out_bias": (outputs,)}
    elif "out_bias" in tensors:
        raise ValueError("out_bias must not be given without out_weight")
    for name, shape in shapes.items():
        if name in tensors and tensors[name].shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensors[name].shape)}")
    for name in ("gain1", "gain2"):
        if tensors[name].numel() != K:
            raise ValueError(f"{name} must have {K} elements, got shape {tuple(tensors[name].shape)}")
    if C != K and "res_weight" not in tensors:
        raise ValueError(f"res_weight must be given where the block takes {C} channels to {K}")
    if groups < 0 or (groups > 0 and K % groups):
        raise ValueError(f"groups must divide the {K} channels of the block, got {groups}")
    if groups > 0 and not ("offset1" in tensors and "offset2" in tensors):
        raise ValueError("offset1 and offset2 must be given with groups > 0")
    if groups == 0 and ("offset1" in tensors or "offset2" in tensors):
        raise ValueError("offset1 and offset2 are GroupNorm's, and must not be given with groups = 0")


def _native(
    x: torch.Tensor,
    weight1: torch.Tensor, bias1: torch.Tensor, gain1: torch.Tensor,
    weight2: torch.Tensor, bias2: torch.Tensor, gain2: torch.Tensor,
    *,
    skip: torch.Tensor | None = None, x_bias: torch.Tensor | None = None,
    offset1: torch.Tensor | None = None, offset2: torch.Tensor | None = None,
    scale: torch.Tensor | None = None, shift: torch.Tensor | None = None,
    res_weight: torch.Tensor | None = None, res_bias: torch.Tensor | None = None,
    out_weight: torch.Tensor | None = None, out_bias: torch.Tensor | None = None,
    groups: int = 0, eps: float = 1e-5, dropout_p: float = 0.0, seed: torch.Tensor | None = None,
    recompute: bool = False,
) -> torch.Tensor:  # fmt: skip
    if skip is not None:
        skip = skip.contiguous(memory_format=torch.channels_last)  # the layout of its gradient
    arguments = (
        x, skip, weight1, bias1, gain1, offset1, scale, shift, weight2, bias2, gain2, offset2, res_weight, res_bias,
        seed if dropout_p > 0 else None, groups, eps, dropout_p,
    )  # fmt: skip
    keep = torch.is_grad_enabled()
    if recompute and keep:
        out = checkpoint(_run, *arguments, use_reentrant=False, preserve_rng_state=False)
    else:
        out = _resnet_block.native(*arguments, keep)[0]
    return out if out_weight is None else linear(out, out_weight, out_bias)


def _run(*arguments: torch.Tensor | float | None) -> torch.Tensor:
    """The native block; backward calls it with gradients enabled, too."""
    return _resnet_block.native(*arguments, True)[0]


def _native_refuses(
    x: torch.Tensor,
    weight1: torch.Tensor, bias1: torch.Tensor, gain1: torch.Tensor,
    weight2: torch.Tensor, bias2: torch.Tensor, gain2: torch.Tensor,
    *,
    skip: torch.Tensor | None = None, x_bias: torch.Tensor | None = None,
    offset1: torch.Tensor | None = None, offset2: torch.Tensor | None = None,
    scale: torch.Tensor | None = None, shift: torch.Tensor | None = None,
    res_weight: torch.Tensor | None = None, res_bias: torch.Tensor | None = None,
    **others: object,
) -> str | None:  # fmt: skip
    given = {
        "x": x, "weight1": weight1, "bias1": bias1, "gain1": gain1, "weight2": weight2, "bias2": bias2, "gain2": gain2,
        "skip": skip, "offset1": offset1, "offset2": offset2, "scale": scale, "shift": shift,
        "res_weight": res_weight, "res_bias": res_bias,
    }  # fmt: skip
    if x_bias is not None:
        return "x_bias is given, and native code takes x with its bias"
    return why_not_on_cpu(given, maps=("x",))


def _example(device: torch.device) -> tuple[tuple, dict]:
    x = torch.zeros(1, 8, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
    weight, row = torch.zeros(8, 8, 3, 3, device=device), torch.zeros(8, device=device)
    return (x, weight, row, row, weight, row, row), {}


# Without the checks, for callers whose arguments fit by construction: a network's modules.
unchecked_resnet_block = Op(
    "resnet_block",
    [
        Implementation("native", _native, _native_refuses, why_steps_come_first),
        Implementation(COMPOSITE, composite.resnet_block),
    ],
    _example,
)
