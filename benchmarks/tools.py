"""Parsers for the output of compute-sanitizer and ncu."""

from __future__ import annotations

import csv
import io
import re

# Kernels that take most of a step, the most wanted first, and the op that runs them.
NCU_KERNELS = (
    ("rms_norm_silu_bwd_kernel", "rms_norm_silu"),
    ("rms_norm_silu_fwd_kernel", "rms_norm_silu"),
    ("linear_attention_block_queries_bwd_kernel", "linear_attention_block"),
    ("linear_attention_block_keys_bwd_kernel", "linear_attention_block"),
    ("linear_attention_block_context_kernel", "linear_attention_block"),
    ("linear_attention_block_rows_fwd_kernel", "linear_attention_block"),
    ("norm_linear_bwd_weight_kernel", "norm_linear"),
    ("norm_linear_fwd_kernel", "norm_linear"),
    ("linear_attention_rows_bwd_kernel", "linear_attention"),
    ("attention_fwd_kernel", "attention"),
)
# Ops whose kernels compute addresses in more than one way.
SANITIZED_OPS = (
    "rms_norm_silu",
    "norm_linear",
    "linear_attention",
    "linear_attention_block",
    "attention",
    "diffusion_loss",
)
NCU_METRICS = {
    "gpu__time_duration.sum": "nanoseconds",
    "dram__bytes.sum": "bytes",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "percent_of_peak",
}

# Of ncu's numbers, in the units in which it may print them.
UNITS = {
    "ns": 1.0, "nsecond": 1.0, "us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6,
    "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "%": 1.0,
}  # fmt: skip


def read_sanitizer(output: str) -> dict:
    """Whether compute-sanitizer's last summary counts nothing, and its words."""
    summaries = [line.strip("= ") for line in output.splitlines() if " SUMMARY: " in line]
    summary = summaries[-1] if summaries else "no summary"
    clean = r"ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards displayed \(0 errors, 0 warnings\)"
    return {"summary": summary, "clean": re.fullmatch(clean, summary) is not None}


def read_ncu(output: str) -> list[dict]:
    """Kernels with time, bytes and share of peak from ncu's CSV in base units, in the order they ran.

    Raises:
        ValueError: a unit that is not known.
    """
    lines = [line for line in output.splitlines() if line.startswith('"')]
    kernels: dict[str, dict] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        metric = NCU_METRICS.get(row.get("Metric Name", ""))
        if metric is None:
            continue
        if row["Metric Unit"] not in UNITS:
            raise ValueError(f"ncu gives {row['Metric Name']} in an unknown unit, {row['Metric Unit']!r}")
        name = row["Kernel Name"].replace("(anonymous namespace)", "").replace("<unnamed>", "")
        kernel = kernels.setdefault(row["ID"], {"kernel": re.sub(r"[(<].*", "", name)})
        if re.fullmatch(r"[\d.,]+", row["Metric Value"]):  # "n/a" where the counter could not be read
            kernel[metric] = float(row["Metric Value"].replace(",", "")) * UNITS[row["Metric Unit"]]
    for kernel in kernels.values():
        if kernel.get("nanoseconds") and "bytes" in kernel:
            kernel["bytes_per_second"] = kernel["bytes"] / kernel["nanoseconds"] * 1e9
    return list(kernels.values())
