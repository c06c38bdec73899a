"""A pre-activation residual block of a UNet: public function, registration, eligibility.

    h = SiLU(GroupNorm(x ‖ skip));  h and x ‖ skip resampled
    h = conv3x3(h, weight1) + bias1 + embedding
    h = dropout(SiLU(GroupNorm(h)·(1 + scale) + shift))
    out = (residual + conv3x3(h, weight2) + bias2)·output_scale

The residual is x ‖ skip, or its 1×1 or 3×3 convolution (He et al. 2016, "Identity mappings in deep residual networks",
with the embedding of Ho et al. 2020).
"""

from __future__ import annotations

from typing import Any

import torch

from ddpm_fast.ops.arguments import check_seed, check_tensors, why_not_on_cpu, why_steps_come_first
from ddpm_fast.ops.operator import Operator
from ddpm_fast.ops.preactivation_block import composite
from ddpm_fast.runtime.dispatch import COMPOSITE, Implementation, Op


def _fake(
    x: torch.Tensor, weight1: torch.Tensor, groups1: int, groups2: int, keep: bool, **others: object
) -> tuple[torch.Tensor, ...]:
    B, _, H, W = x.shape

    def empty_map(dtype: torch.dtype) -> torch.Tensor:
        shape = (B, weight1.shape[0], H, W)
        return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)

    if not keep:
        return empty_map(x.dtype), *(x.new_empty(0, dtype=torch.float32) for _ in range(3))
    statistics = [x.new_empty((B, groups, 2), dtype=torch.float32) for groups in (groups1, groups2)]
    return empty_map(x.dtype), statistics[0], empty_map(torch.float32), statistics[1]


_preactivation_block = Operator(
    "preactivation_block",
    # Without `keep` only out is returned, and empty tensors in place of the others.
    "Tensor x, Tensor? skip, Tensor weight1, Tensor? bias1, Tensor gain1, Tensor offset1, Tensor? embedding, "
    "Tensor? scale, Tensor? shift, Tensor weight2, Tensor? bias2, Tensor gain2, Tensor offset2, Tensor? res_weight, "
    "Tensor? res_bias, Tensor? seed, int groups1, int groups2, float eps1, float eps2, float output_scale, "
    "float dropout_p, bool keep",
    returns="out, statistics1, y1, statistics2",
    fake=_fake,
    backward="grad, x, skip, weight1, gain1, offset1, embedding, scale, shift, weight2, gain2, offset2, res_weight, "
    "seed, statistics1, y1, statistics2, groups1, groups2, output_scale, dropout_p, wants_dx",
    gradients="x, skip, weight1, bias1, gain1, offset1, embedding, scale, shift, weight2, bias2, gain2, offset2, "
    "res_weight, res_bias",
    maps="x, skip",
    rows={"bias1": "weight1", "bias2": "weight2", "res_bias": "res_weight"},
    wanted={"wants_dx": "x, skip"},
    gradient_list=True,
    native=True,
)

_OPTIONAL = ("bias1", "bias2", "skip", "embedding", "scale", "shift", "res_weight", "res_bias")


def preactivation_block(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    gain1: torch.Tensor,
    offset1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    gain2: torch.Tensor,
    offset2: torch.Tensor,
    *,
    groups1: int,
    groups2: int,
    eps1: float = 1e-5,
    eps2: float = 1e-5,
    skip: torch.Tensor | None = None,
    embedding: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    res_weight: torch.Tensor | None = None,
    res_bias: torch.Tensor | None = None,
    resample: str | None = None,
    output_scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Norm, SiLU, 3×3 convolution, twice, around a residual.

    Args:
        x: (B, C, H, W) float32, float16, bfloat16 (float64: not native). The native code takes channels-last.
        weight1, weight2: (K, C + C', 3, 3) and (K, K, 3, 3); bias1, bias2: (K,) or None.
        gain1, offset1: (C + C',), and gain2, offset2: (K,), the norms' affine maps.
        groups1, groups2, eps1, eps2: of the norms.
        skip: (B, C', H, W), channels that follow those of x, as if the two were concatenated.
        embedding: (B, K), added to every pixel of the first convolution's output.
        scale, shift: (B, K); the second norm's output times (1 + scale) plus shift.
        res_weight, res_bias: (K, C + C', 1, 1) or (K, C + C', 3, 3), and (K,): the residual's convolution; needed where
            C + C' is not K.
        resample: "up", each pixel becomes 2×2; "down", means of 2×2 pixels, an odd last row or column left out; or
            None. It is applied to the first convolution's input and to the residual's.
        output_scale: a factor of the output.
        dropout_p, seed: dropout before the second convolution, see `rms_norm_silu`.

    Returns:
        (B, K, H, W), (B, K, 2H, 2W) or (B, K, H/2, W/2), of the dtype and memory format of x. Gradients flow to
        everything but seed, once.

    Raises:
        TypeError, ValueError: an argument does not match its description.
    """
    options: dict[str, Any] = {
        "groups1": groups1, "groups2": groups2, "eps1": eps1, "eps2": eps2, "skip": skip, "embedding": embedding,
        "scale": scale, "shift": shift, "res_weight": res_weight, "res_bias": res_bias, "resample": resample,
        "output_scale": output_scale, "dropout_p": dropout_p, "seed": seed,
    }  # fmt: skip
    arguments = (x, weight1, bias1, gain1, offset1, weight2, bias2, gain2, offset2)
    _check(*arguments, **options)
    return unchecked_preactivation_block(*arguments, **options)


def _check(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    gain1: torch.Tensor,
    offset1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    gain2: torch.Tensor,
    offset2: torch.Tensor,
    *,
    groups1: int,
    groups2: int,
    resample: str | None,
    dropout_p: float,
    seed: torch.Tensor | None,
    **options: Any,
) -> None:
    """The checks of every implementation."""
    tensors: dict[str, torch.Tensor | None] = {
        "x": x, "weight1": weight1, "bias1": bias1, "gain1": gain1, "offset1": offset1, "weight2": weight2,
        "bias2": bias2, "gain2": gain2, "offset2": offset2,
    }  # fmt: skip
    tensors |= {name: options[name] for name in _OPTIONAL if name in options}
    check_tensors(tensors, _OPTIONAL)
    check_seed(dropout_p, seed, x.device)
    if x.dim() != 4 or weight1.dim() != 4:
        raise ValueError(
            f"x and weight1 must have four dimensions, got shapes {tuple(x.shape)} and {tuple(weight1.shape)}"
        )
    if resample not in (None, "up", "down"):
        raise ValueError(f'resample must be None, "up" or "down", got {resample!r}')
    B, C, H, W = x.shape
    skip = tensors["skip"]
    if skip is not None:
        if skip.dim() != 4 or (skip.shape[0], *skip.shape[2:]) != (B, H, W):
            raise ValueError(f"skip must have shape ({B}, C, {H}, {W}), got {tuple(skip.shape)}")
        C += skip.shape[1]
    K, res_weight = weight1.shape[0], tensors["res_weight"]
    side = 3 if res_weight is not None and res_weight.shape[2:] == (3, 3) else 1
    shapes = {
        "weight1": (K, C, 3, 3), "weight2": (K, K, 3, 3), "bias1": (K,), "bias2": (K,), "gain1": (C,), "offset1": (C,),
        "gain2": (K,), "offset2": (K,), "embedding": (B, K), "scale": (B, K), "shift": (B, K),
        "res_weight": (K, C, side, side), "res_bias": (K,),
    }  # fmt: skip
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if res_weight is None and C != K:
        raise ValueError(f"res_weight must be given where the block takes {C} channels to {K}")
    if res_weight is None and tensors["res_bias"] is not None:
        raise ValueError("res_bias must not be given without res_weight")
    for name, groups, channels in (("groups1", groups1, C), ("groups2", groups2, K)):
        if groups < 1 or channels % groups:
            raise ValueError(f"{name} must divide the {channels} channels that it normalises, got {groups}")


def _native(
    x: torch.Tensor,
    weight1: torch.Tensor, bias1: torch.Tensor | None, gain1: torch.Tensor, offset1: torch.Tensor,
    weight2: torch.Tensor, bias2: torch.Tensor | None, gain2: torch.Tensor, offset2: torch.Tensor,
    *,
    groups1: int, groups2: int, eps1: float = 1e-5, eps2: float = 1e-5,
    skip: torch.Tensor | None = None, embedding: torch.Tensor | None = None,
    scale: torch.Tensor | None = None, shift: torch.Tensor | None = None,
    res_weight: torch.Tensor | None = None, res_bias: torch.Tensor | None = None,
    resample: str | None = None, output_scale: float = 1.0,
    dropout_p: float = 0.0, seed: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    if skip is not None:
        skip = skip.contiguous(memory_format=torch.channels_last)  # the layout of its gradient
    return _preactivation_block.native(
        x, skip, weight1, bias1, gain1, offset1, embedding, scale, shift, weight2, bias2, gain2, offset2, res_weight,
        res_bias, seed if dropout_p > 0 else None, groups1, groups2, eps1, eps2, output_scale, dropout_p,
        torch.is_grad_enabled(),
    )[0]  # fmt: skip


def _native_refuses(
    x: torch.Tensor,
    weight1: torch.Tensor, bias1: torch.Tensor | None, gain1: torch.Tensor, offset1: torch.Tensor,
    weight2: torch.Tensor, bias2: torch.Tensor | None, gain2: torch.Tensor, offset2: torch.Tensor,
    *,
    groups1: int, groups2: int, eps1: float = 1e-5, eps2: float = 1e-5,
    skip: torch.Tensor | None = None, embedding: torch.Tensor | None = None,
    scale: torch.Tensor | None = None, shift: torch.Tensor | None = None,
    res_weight: torch.Tensor | None = None, res_bias: torch.Tensor | None = None,
    resample: str | None = None, output_scale: float = 1.0,
    dropout_p: float = 0.0, seed: torch.Tensor | None = None,
) -> str | None:  # fmt: skip
    given = {
        "x": x, "weight1": weight1, "bias1": bias1, "gain1": gain1, "offset1": offset1, "weight2": weight2,
        "bias2": bias2, "gain2": gain2, "offset2": offset2, "skip": skip, "embedding": embedding, "scale": scale,
        "shift": shift, "res_weight": res_weight, "res_bias": res_bias,
    }  # fmt: skip
    reason = why_not_on_cpu(given, maps=("x",))
    if reason is not None:
        return reason
    if resample is not None:
        return f'the native block does not resample, and resample is "{resample}"'
    if res_weight is not None and res_weight.shape[2] != 1:
        return "the residual has a 3×3 convolution, and the native block a 1×1 one"
    return "there is a skip and no res_weight" if skip is not None and res_weight is None else None


def _example(device: torch.device) -> tuple[tuple, dict]:
    x = torch.zeros(1, 8, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
    weight, row = torch.zeros(8, 8, 3, 3, device=device), torch.zeros(8, device=device)
    return (x, weight, row, row, row, weight, row, row, row), {"groups1": 2, "groups2": 2}


# Without the checks, for callers whose arguments fit by construction: a network's modules.
unchecked_preactivation_block = Op(
    "preactivation_block",
    [
        Implementation("native", _native, _native_refuses, why_steps_come_first),
        Implementation(COMPOSITE, composite.preactivation_block),
    ],
    _example,
)
