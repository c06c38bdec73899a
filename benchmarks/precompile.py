"""Compile the Triton kernels of training, sampling and the benchmarks' ops ahead, in parallel, into Triton's cache.

    python benchmarks/precompile.py --processes 16 [--case training|sampling|ops ...] [--target sm_90] [--seconds LIMIT]

The kernels are those that the steps of cuda_model/steps.py launch on tensors that pretend; the cache is Triton's own
(TRITON_CACHE_DIR). One line of JSON per variant: kernel, seconds, registers, spills (bytes per thread), cached, error;
a last line sums up. The exit code is 1 where a variant failed or was not done within the limit.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, required=True, help="that compile at a time")
    parser.add_argument("--case", nargs="+", choices=["training", "sampling", "ops"], help="by default all")
    parser.add_argument("--target", help="such as sm_90; by default this machine's GPU, and sm_90 where there is none")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which what is not done is left")
    options = parser.parse_args()
    raise SystemExit(run(options.processes, options.case or list(_cases()), options.target, options.seconds))


def run(processes: int, cases: list[str], target_name: str | None, limit: float) -> int:
    """Compile the variants of the cases; returns the exit code."""
    began = time.perf_counter()
    import triton
    from cuda_model.compiler import Compiled, Pool
    from cuda_model.driver import Variant, target_of
    from triton import knobs

    if knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set, and the interpreter compiles nothing")
    target = target_of(target_name or here())
    known: set[tuple] = set()
    done: list[Compiled] = []

    def report(compiled: Compiled) -> None:
        done.append(compiled)
        print(json.dumps(asdict(compiled) | {"seconds": round(compiled.seconds, 2)}), flush=True)

    with Pool(processes, target) as pool:

        def found(variant: Variant) -> None:
            if variant.key not in known:
                known.add(variant.key)
                pool.submit(variant)
            for compiled in pool.finished(0):
                report(compiled)

        for case in cases:
            for number, record in enumerate(_cases()[case], 1):
                if time.perf_counter() - began < limit:
                    record(target, found)
                else:
                    report(Compiled(f"those of {case} {number}", 0.0, error=f"not recorded within {limit:g} s"))
        recorded = time.perf_counter() - began
        while pool.unfinished and (left := limit - (time.perf_counter() - began)) > 0:
            for compiled in pool.finished(min(left, 3600)):
                report(compiled)
        for variant in pool.unfinished:
            report(Compiled(variant.kernel, 0.0, error=f"not compiled within {limit:g} s"))
    failed = sum(compiled.error is not None for compiled in done)
    summary = {
        "variants": len(known),
        "cached": sum(compiled.cached for compiled in done),
        "failed": failed,
        "spilling": sum(bool(compiled.spills) for compiled in done),
        "compiler_seconds": round(sum(compiled.seconds for compiled in done), 1),
        "recorded_after": round(recorded, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "processes": processes,
        "target": f"sm_{target.arch}",
        "triton": triton.__version__,
        "cache": knobs.cache.dir,
    }
    print(json.dumps(summary), flush=True)
    return int(failed > 0)


def here() -> str:
    """The architecture of this machine's GPU, sm_90 where there is none."""
    import torch

    if not torch.cuda.is_available():
        return "sm_90"
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def _cases() -> dict:
    from cuda_model.steps import CASES

    return CASES


if __name__ == "__main__":
    main()
