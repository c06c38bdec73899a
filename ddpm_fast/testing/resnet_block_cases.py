"""Shared by the tests of resnet_block's Triton kernels: the tensors of a block."""

from __future__ import annotations

import torch


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    *,
    scaled: bool = True,
    outputs: int = 0,
    biased: bool = False,
) -> dict[str, torch.Tensor]:
    """The arguments of a block.

    Args:
        shape: B, C0, C1 (of a skip connection, or 0), K, H, W.
        outputs: of a 1×1 convolution that follows the block; 0: none does.
        biased: x comes without its bias.
    """
    B, C0, C1, K, H, W = shape
    C = C0 + C1
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    tensors = {
        "x": 2 * normal(B, C0, H, W) + 0.5,
        "weight1": normal(K, C, 3, 3) / (9 * C) ** 0.5,
        "bias1": normal(K),
        "gain1": 1 + 0.3 * normal(K),
        "weight2": normal(K, K, 3, 3) / (9 * K) ** 0.5,
        "bias2": normal(K),
        "gain2": 1 + 0.3 * normal(1, K, 1, 1),
    }
    if C1:
        tensors["skip"] = normal(B, C1, H, W)
    if scaled:
        tensors |= {"scale": 0.3 * normal(B, K), "shift": normal(B, K)}
    if C != K or C1:
        tensors |= {"res_weight": normal(K, C, 1, 1) / C**0.5, "res_bias": normal(K)}
    if outputs:
        tensors |= {"out_weight": normal(outputs, K, 1, 1) / K**0.5, "out_bias": normal(outputs)}
    if biased:
        tensors["x_bias"] = normal(C0)
    tensors = {name: tensor.to(dtype).to(device) for name, tensor in tensors.items()}
    return {n: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for n, t in tensors.items()}
