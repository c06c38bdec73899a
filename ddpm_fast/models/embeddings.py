"""Embeddings of the timestep and of conditions, and their projections for the residual blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ddpm_fast.models.narrow_weights import Group, narrow, narrow_group
from ddpm_fast.models.stock import is_instance, is_unmodified, parameter, stock
from ddpm_fast.ops.norm_linear.op import linears
from ddpm_fast.runtime.autocast import no_autocast, to_autocast_dtype


@stock
class SinusoidalPosEmb(nn.Module):
    """Sinusoidal embedding of the timestep (Vaswani et al. 2017, section 3.5): (B,) → (B, dim), float32."""

    def __init__(self, dim: int, theta: float = 10000):
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"dim must be even and at least 4 for a sinusoidal embedding, got {dim}")
        self.dim = dim
        self.theta = theta

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half_dim = self.dim // 2
        exponent = math.log(self.theta) / (half_dim - 1)
        frequencies = torch.exp(torch.arange(half_dim, device=x.device) * -exponent)
        angles = x[:, None] * frequencies[None, :]
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


@stock
class RandomOrLearnedSinusoidalPosEmb(nn.Module):
    """Fourier features with random or learned frequencies (Tancik et al. 2020): (B,) → (B, dim + 1)."""

    def __init__(self, dim: int, is_random: bool = False):
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"learned_sinusoidal_dim must be even and at least 2, got {dim}")
        self.weights = nn.Parameter(torch.randn(dim // 2), requires_grad=not is_random)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, None]
        angles = x * self.weights[None, :] * 2 * math.pi
        return torch.cat((x, angles.sin(), angles.cos()), dim=-1)


@stock
class CondMLP(nn.Sequential):
    """Linear layers and activations, upstream's `classes_mlp`: (B, dim) → (B, 4·dim)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _through(self._modules.values(), x)

    def narrow_groups(self) -> list[Group]:
        """See `narrow_weights`."""
        layers = [layer for layer in self._modules.values() if is_instance(layer, nn.Linear)]
        return [(tensor,) for layer in layers for tensor in (layer.weight, layer.bias) if tensor is not None]

    def is_stock(self) -> bool:
        """True if nobody changed a module, so that the output depends on the input and the weights alone."""
        return is_unmodified(self, *self._modules.values())


@stock
class TimeMLP(CondMLP):
    """Embedding of the timestep and two linear layers, upstream's `time_mlp`: (B,) → (B, 4·dim)."""

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        embedding, *layers = self._modules.values()
        t = embedding(time)
        # Sines of a timestep need float32 whatever the weights are.
        weights = (p for layer in layers for p in layer.parameters() if p.is_floating_point())
        first = next(weights, None)
        return _through(layers, t if first is None else t.to(first.dtype))


def _through(layers: Iterable[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """The layers one after another, linear ones with copies of their weights where the running network made some."""
    for layer in layers:
        x = layer(x) if not _is_narrow(layer) else F.linear(x, narrow(layer, "weight"), narrow(layer, "bias"))
    return x


def _is_narrow(layer: nn.Module) -> bool:
    """True where the running network has made a copy of the layer's weight for autocast."""
    return is_instance(layer, nn.Linear) and narrow(layer, "weight") is not parameter(layer, "weight")


def linears_of_one_input(
    x: torch.Tensor, layers: Sequence[nn.Linear], added: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """The outputs of linear layers with bias side by side, (B, D) → (B, sum of their out_features), as one product.

    `added`, if any, are more biases, one for each layer: those of the convolutions whose output each row is added to.
    """
    if added:
        return linears_of_one_input(x, layers) + torch.cat(tuple(added))
    weights = [parameter(layer, "weight") for layer in layers]
    biases = [parameter(layer, "bias") for layer in layers]
    (x,) = to_autocast_dtype(x)
    weight, bias = narrow_group(weights), narrow_group(biases)
    if weight is None or bias is None:
        return linears(x, weights, biases)
    with no_autocast(x.device.type):
        return F.linear(x, weight, bias)


def side_by_side(embeddings: Sequence[torch.Tensor]) -> torch.Tensor:
    """Embeddings of (B or 1, D_i) as one of (B, Σ D_i)."""
    if len(embeddings) == 1:
        return embeddings[0]
    B = max(embedding.shape[0] for embedding in embeddings)
    return torch.cat([e if e.shape[0] == B else e.expand(B, -1) for e in embeddings], dim=1)
