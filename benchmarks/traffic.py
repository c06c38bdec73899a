"""What a training step and a sampling step do, counted from operator dispatch: ours against the peer.

    python benchmarks/traffic.py [--dim 64] [--dim-mults 1 2 4 8] [--image-size 128] [--memory fast] [--json FILE]

Per image: operators that touch memory (views are free and not counted), bytes that they read and write (each input read
once, each output written once), and bytes kept from forward for backward (each storage once; parameters, buffers and
the network's input aside). Everything runs on the meta device: nothing is computed and no clock is read, so the numbers
are the same on every machine. Ours is counted with the kernels that a CUDA device runs: a fused op is one operator,
with the tensors that it reads and writes, and what it reads twice counted twice (`SECOND_READS`).

The floor is the time that an H100's copy bandwidth, 3.0 TB/s as measured, needs for the bytes alone.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

H100_BYTES_PER_SECOND = 3.0e12

# Inputs that a fused op reads in a second pass, by operator name: a function of its arguments that gives the tensors.
SECOND_READS = {
    # GroupNorm's statistics are a pass of their own, and so are its backward's sums; RMSNorm (groups = 0) has none.
    "ddpm_fast::norm_silu": lambda args: [args[0]] if args[8] else [],
    "ddpm_fast::norm_silu_backward": lambda args: [args[0], args[1]] if args[9] else [],
}

# Ops that alias their input although the schema of their result does not say so.
_FREE = {torch.ops.aten._unsafe_view.default, torch.ops.aten.detach.default}


@dataclass
class Traffic:
    """Per image: operators, bytes moved, and bytes kept for backward."""

    operators: int = 0
    bytes_moved: int = 0
    bytes_kept: int = 0

    @property
    def floor_seconds(self) -> float:
        return self.bytes_moved / H100_BYTES_PER_SECOND


class _Counter(TorchDispatchMode):
    """Counts every operator that is not a view."""

    def __init__(self, traffic: Traffic):
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not _is_view(func):
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
            self.traffic.operators += 1
            again = SECOND_READS.get(func._schema.name, lambda args: [])(args)
            self.traffic.bytes_moved += sum(t.numel() * t.element_size() for t in [*tensors, *again])
        return result


def _is_view(func) -> bool:
    returns = [r.alias_info for r in func._schema.returns]
    return func in _FREE or any(alias is not None and not alias.is_write for alias in returns)


@contextlib.contextmanager
def _count_kept(traffic: Traffic, excluded: set[int]):
    """Bytes of the distinct storages that autograd saves."""
    seen = set(excluded)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            traffic.bytes_kept += storage.nbytes()
        return tensor

    def checkpoint_and_count(function, *args, **kwargs):
        """torch's checkpoint keeps its arguments where no hook sees them."""
        for tensor in args:
            pack(tensor)
        return checkpoint(function, *args, **kwargs)

    with (
        mock.patch("ddpm_fast.layers.checkpoint", checkpoint_and_count),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        yield


@contextlib.contextmanager
def _kernels_take_meta_tensors():
    """Let the implementations for CUDA accept meta tensors, whose shapes are all that is counted."""
    with (
        mock.patch("ddpm_fast.tuning.why_not_triton", lambda device: None),
        mock.patch("ddpm_fast._extension.why_not", lambda device: None),
    ):
        yield


def measure_training(diffusion: torch.nn.Module) -> Traffic:
    """One training step on one image: loss and backward, the noise drawn inside."""
    diffusion = copy.deepcopy(diffusion).to("meta")
    image = torch.rand(1, diffusion.channels, *diffusion.image_size, device="meta")
    t = torch.zeros(1, dtype=torch.int64, device="meta")
    constants = [*diffusion.parameters(), *diffusion.buffers(), image]
    traffic = Traffic()
    with _Counter(traffic):
        with _count_kept(traffic, {c.untyped_storage()._cdata for c in constants}):
            loss = diffusion(image, times=t)
        loss.backward()
    return traffic


def measure_sampling(diffusion: torch.nn.Module) -> Traffic:
    """One step of sampling one image: the network and the update of the state."""
    diffusion = copy.deepcopy(diffusion).to("meta")
    x = torch.zeros(1, diffusion.channels, *diffusion.image_size, device="meta")
    traffic = Traffic()
    with _Counter(traffic), torch.inference_mode():
        diffusion.p_sample(x, 1)
    return traffic


def measure(package, **config) -> dict[str, Traffic]:
    """Training and sampling of a package's Unet and GaussianDiffusion."""
    image_size = config.pop("image_size")
    extra = config.pop("extra", {})
    diffusion = package.GaussianDiffusion(package.Unet(**config, **extra), image_size=image_size)
    return {"training step": measure_training(diffusion), "sampling step": measure_sampling(diffusion)}


def table(peer: dict[str, Traffic], ours: dict[str, Traffic]) -> str:
    """Markdown: each quantity of the peer and ours, and their ratio."""
    lines = ["| per image | | peer | ours | peer / ours |", "|---|---|---|---|---|"]
    for what in peer:
        rows = [
            ("operators", "operators", "{:.0f}", 1),
            ("GB moved", "bytes_moved", "{:.2f}", 1e9),
            ("MB kept for backward", "bytes_kept", "{:.0f}", 1e6),
            ("ms at 3.0 TB/s", "floor_seconds", "{:.2f}", 1e-3),
        ]
        for label, name, form, unit in rows:
            a, b = getattr(peer[what], name), getattr(ours[what], name)
            if a:
                lines.append(f"| {what} | {label} | {form.format(a / unit)} | {form.format(b / unit)} | {a / b:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dim-mults", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--memory", choices=["fast", "low"], default="fast", help="of our Unet")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()

    import denoising_diffusion_pytorch

    import ddpm_fast

    config = {"dim": options.dim, "dim_mults": tuple(options.dim_mults), "image_size": options.image_size}
    peer = measure(denoising_diffusion_pytorch, **config)
    with _kernels_take_meta_tensors():
        ours = measure(ddpm_fast, **config, extra={"memory": options.memory})
    print(table(peer, ours))
    if options.json:
        numbers = {name: {k: asdict(v) for k, v in side.items()} for name, side in (("peer", peer), ("ours", ours))}
        options.json.write_text(json.dumps({"config": config, **numbers}, indent=2) + "\n")


if __name__ == "__main__":
    main()
