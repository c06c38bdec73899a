"""Every op once forward and backward, on a device: what compute-sanitizer and ncu look at.

python benchmarks/kernel_run.py DEVICE SIZE
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from bench_ops import with_gradients  # noqa: E402
from op_cases import DTYPES, op_cases  # noqa: E402


def main(device: str, size: str) -> None:
    """SIZE is one of op_cases': "quick" for the sanitizer, "full" for ncu."""
    for case in op_cases(size):
        for dtype in case.dtypes:
            inputs = case.make(case.shape, torch.device(device), DTYPES[dtype], DTYPES[dtype])
            call = with_gradients(inputs.call, inputs.leaves) if inputs.leaves else inputs.call
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            print(case.name, dtype, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
