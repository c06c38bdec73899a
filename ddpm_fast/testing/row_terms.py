"""The terms of a row's gradient, to judge how exactly they were summed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class RowTerms(TorchFunctionMode):
    """While a reference runs: the rows that it broadcasts over pixels are maps, whose gradients are the terms.

    The gradient of a bias, gain, offset, scale or shift is a sum over pixels. Rounding errors of a sum are a share of
    the sum of its terms' magnitudes (Higham 1993, "The accuracy of floating point summation"), which says nothing of
    the sum itself where terms cancel.

    Args:
        rows: the tensors that may be broadcast, by name; leaves of the reference's graph.
        pixels: B, H and W of the maps.
    """

    def __init__(self, rows: Mapping[str, torch.Tensor], pixels: tuple[int, int, int]):
        super().__init__()
        self._names = {id(row): name for name, row in rows.items()}
        self._pixels = pixels
        self._maps: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def magnitudes(self) -> dict[str, torch.Tensor]:
        """Σ |term| of the gradients of all rows that were broadcast, after the backward of the reference's output."""
        sums = {}
        for name, (row, shaped, broadcast) in self._maps.items():
            assert broadcast.grad is not None, f"{name} has no gradient"
            sums[name] = broadcast.grad.abs().sum_to_size(shaped.shape).reshape(row.shape)
        return sums

    def _map(self, row: torch.Tensor, shaped: torch.Tensor | None = None) -> torch.Tensor:
        shaped = row.reshape(1, -1, 1, 1) if shaped is None else shaped  # (B or 1, C, 1, 1)
        B, H, W = self._pixels
        broadcast = shaped.expand(B, -1, H, W).clone()
        broadcast.retain_grad()
        self._maps[self._names[id(row)]] = (row, shaped, broadcast)
        return broadcast

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.conv2d and len(args) > 2 and id(args[2]) in self._names:
            x, weight, bias, *others = args
            return function(x, weight, None, *others, **kwargs) + self._map(bias)
        if function is torch.group_norm:
            x, groups, gain, offset, *others = args
            return function(x, groups, None, None, *others, **kwargs) * self._map(gain) + self._map(offset)
        out = function(*args, **kwargs)
        if function in (torch.Tensor.reshape, torch.Tensor.__getitem__) and id(args[0]) in self._names:
            return self._map(args[0], out) if out.shape[2:] == (1, 1) else out
        return out


def scales_of_gains(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """√(Σ term²) of the gradients of upstream's gains, by the parameter's name; filled by the backward of a loss.

    That is the size of a sum of such terms whose signs are random, and says how far one cancels.

    Args:
        model: upstream's network, whose norms multiply by a parameter g (1, C, 1, 1) that is nowhere 0.
    """
    sums: dict[str, torch.Tensor] = {}

    def keep(name: str, gain: torch.Tensor, out: torch.Tensor) -> None:
        def of_gradient(grad: torch.Tensor) -> None:
            sums[name] = (grad * out / gain).detach().square().sum_to_size(gain.shape).sqrt()

        out.register_hook(of_gradient)

    for path, module in model.named_modules():
        gain = getattr(module, "g", None)
        if isinstance(gain, torch.nn.Parameter):
            name = f"{path}.g" if path else "g"
            module.register_forward_hook(lambda module, args, out, name=name: keep(name, module.g, out))
    return sums
