"""Pre-activation residual blocks at the shapes of google/ddpm-cifar10-32, against torch's operators.

    python benchmarks/bench_blocks.py [--threads 2] [--batch 8] [--seconds 4] [--least 1.0] [--quick]

Medians of interleaved rounds in one process, forward and forward with backward, after outputs and all gradients were
found equal. It fails where a block is not `--least` times as fast.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ddpm_fast.measure.charts import columns
from ddpm_fast.measure.timing import Interleaved, ratio
from ddpm_fast.ops.preactivation_block.op import preactivation_block

CPU = torch.device("cpu")
# Channels of the map, of the skip connection, of the output; side.
SHAPES = [
    (128, 0, 128, 32), (256, 128, 128, 32), (128, 128, 128, 32), (128, 0, 256, 16), (256, 0, 256, 16),
    (256, 256, 256, 16), (256, 128, 256, 16), (256, 0, 256, 8), (256, 256, 256, 8), (256, 0, 256, 4),
    (256, 256, 256, 4),
]  # fmt: skip
QUICK = [(16, 8, 32, 6), (16, 0, 16, 5)]
Tensors = dict[str, torch.Tensor]


def make(C: int, skip: int, K: int, side: int, batch: int) -> tuple[Tensors, int]:
    """The tensors of a block, and the groups of its norms."""
    torch.manual_seed(0)
    inputs, groups = C + skip, 32 if C % 32 == 0 else 4
    tensors = {
        "x": torch.randn(batch, C, side, side),
        "weight1": torch.randn(K, inputs, 3, 3) / (9 * inputs) ** 0.5,
        "bias1": torch.randn(K),
        "gain1": 1 + 0.3 * torch.randn(inputs),
        "offset1": torch.randn(inputs),
        "embedding": torch.randn(batch, K),
        "weight2": torch.randn(K, K, 3, 3) / (9 * K) ** 0.5,
        "bias2": torch.randn(K),
        "gain2": 1 + 0.3 * torch.randn(K),
        "offset2": torch.randn(K),
    }
    if skip:
        tensors["skip"] = torch.randn(batch, skip, side, side)
    if skip or C != K:
        tensors |= {"res_weight": torch.randn(K, inputs, 1, 1) / inputs**0.5, "res_bias": torch.randn(K)}
    return tensors, groups


def eager(t: Tensors, groups: int) -> torch.Tensor:
    """The block as diffusers' ResnetBlock2D computes it."""
    x = torch.cat((t["x"], t["skip"]), dim=1) if "skip" in t else t["x"]
    h = F.conv2d(F.silu(F.group_norm(x, groups, t["gain1"], t["offset1"])), t["weight1"], t["bias1"], padding=1)
    h = F.silu(F.group_norm(h + t["embedding"][:, :, None, None], groups, t["gain2"], t["offset2"]))
    residual = F.conv2d(x, t["res_weight"], t["res_bias"]) if "res_weight" in t else x
    return residual + F.conv2d(h, t["weight2"], t["bias2"], padding=1)


def ours(t: Tensors, groups: int) -> torch.Tensor:
    arguments: dict[str, Any] = {**t, "groups1": groups, "groups2": groups}
    return preactivation_block(**arguments)


def calls_of(function: Callable, tensors: Tensors, groups: int, channels_last: bool) -> dict[str, Callable]:
    """Forward, and forward with backward, each of which returns its tensors."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    maps = {name: tensors[name].contiguous(memory_format=layout) for name in ("x", "skip") if name in tensors}
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in (tensors | maps).items()}

    def forward() -> list[torch.Tensor]:
        with torch.no_grad():
            return [function(leaves, groups)]

    def step() -> list[torch.Tensor]:
        out = function(leaves, groups)
        return list(torch.autograd.grad(out, list(leaves.values()), grad.contiguous(memory_format=layout)))

    grad = torch.randn(forward()[0].shape, generator=torch.Generator().manual_seed(1))
    return {"forward": forward, "step": step}


def assert_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    """Within what float32 sums of some thousand terms and Winograd's transforms round."""
    for a, b in zip(one, other, strict=True):
        scale = b.square().mean().sqrt()
        torch.testing.assert_close(a / scale, b / scale, rtol=1e-3, atol=1e-3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=4, help="of rounds for each block and phase")
    parser.add_argument("--least", type=float, default=1.0, help="how many times as fast every block must be")
    parser.add_argument("--quick", action="store_true", help="small shapes, to try it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[list[str]] = []
    slow: list[str] = []
    for shape in QUICK if options.quick else SHAPES:
        tensors, groups = make(*shape, options.batch)
        theirs, mine = (calls_of(f, tensors, groups, f is ours) for f in (eager, ours))
        for phase in theirs:
            assert_equal(mine[phase](), theirs[phase]())
            timings = Interleaved({"torch": theirs[phase], "ours": mine[phase]}, CPU).run(options.seconds)
            gained = ratio(timings["torch"], timings["ours"])
            C, skip, K, side = shape
            name = f"{C}{f' + {skip}' if skip else ''} → {K}, {side}×{side}"
            milliseconds = [f"{timings[side].median * 1e3:.4g}" for side in ("torch", "ours")]
            rows.append([name, phase, *milliseconds, f"{gained:.2f}"])
            slow += [f"{name}, {phase}: {gained:.2f}"] if gained < options.least else []
    print(columns(("block", "phase", "torch ms", "ours ms", "ratio"), rows))
    if slow:
        print("slower than asked for: " + "; ".join(slow), file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
