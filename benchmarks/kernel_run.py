"""Runs ops forward and backward on a device, without checks or timing, for compute-sanitizer and ncu.

python benchmarks/kernel_run.py DEVICE SIZE [--ops NAME ...] [--dtypes bf16 ...] [--first] [--repeat N]
"""

from __future__ import annotations

import argparse

import torch
from bench_ops import with_gradients  # noqa: E402
from op_cases import DTYPES, op_cases  # noqa: E402


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("device")
    parser.add_argument("size", help="of op_cases: quick, cpu or full")
    parser.add_argument("--ops", nargs="+", help="default: all")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES))
    parser.add_argument("--first", action="store_true", help="only the first shape of each op")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each case")
    options = parser.parse_args()
    seen = set()
    for case in op_cases(options.size):
        if (options.ops and case.op not in options.ops) or (options.first and case.op in seen):
            continue
        seen.add(case.op)
        for dtype in [dtype for dtype in case.dtypes if dtype in options.dtypes]:
            inputs = case.make(case.shape, torch.device(options.device), DTYPES[dtype], DTYPES[dtype])
            call = with_gradients(inputs.call, inputs.leaves) if inputs.leaves else inputs.call
            for _ in range(options.repeat):
                call()
            if options.device == "cuda":
                torch.cuda.synchronize()
            print(case.name, dtype, flush=True)


if __name__ == "__main__":
    main()
