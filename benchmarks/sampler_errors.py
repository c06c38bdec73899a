"""Samplers and spacings against the closed form of a Gaussian: the tables and the plot of docs/samplers.md.

    python benchmarks/sampler_errors.py                 writes both; half a minute, no GPU

The data are N(0.1, 0.15²), whose exact denoiser makes every step linear: mean and deviation at the end follow by linear
algebra, without sampling (`ddpm_fast/testing/sampler_cases.py`).
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ddpm_fast.diffusion import samplers, spacings
from ddpm_fast.diffusion.levels import TARGETS, NoiseScale
from ddpm_fast.diffusion.schedules import Schedule, make_betas
from ddpm_fast.testing.sampler_cases import TWO_CALLS, EdmScale, FlowScale, exact_moments

MEAN, STD = 0.1, 0.15
PAGE = Path(__file__).parents[1] / "docs" / "samplers.md"
PLOT = PAGE.with_name("sampler-errors.png")
CALLS = (10, 25)
SCHEDULES = ("linear", "cosine", "sigmoid")
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")


def error(scale: NoiseScale, sampler: str, calls: int, spacing: str | None = None) -> float:
    """How much the standard deviation is off after so many network calls."""
    steps = (calls + 1) // 2 if sampler in TWO_CALLS else calls
    plan = samplers.sampler_table(scale, TARGETS["pred_x0"], sampler, steps, spacing=spacing)
    return exact_moments(plan, scale, MEAN, STD)[1] - STD


def mean_errors() -> dict[str, dict[str, float]]:
    """By sampler and spacing, the mean of |error| over five processes and 10 and 25 calls."""
    scales = [*(Schedule(make_betas(name, 1000)) for name in SCHEDULES), EdmScale(), FlowScale()]
    return {
        sampler: {
            spacing: sum(abs(error(scale, sampler, calls, spacing)) for scale in scales for calls in CALLS)
            / (len(scales) * len(CALLS))
            for spacing in spacings.SPACINGS
        }
        for sampler in samplers.SAMPLERS
    }


def errors_of_defaults() -> dict[str, dict[str, float]]:
    """By sampler, the error with its own spacing per schedule and number of calls."""
    scales = {name: Schedule(make_betas(name, 1000)) for name in SCHEDULES}
    return {
        sampler: {f"{name}, {calls}": error(scale, sampler, calls) for name, scale in scales.items() for calls in CALLS}
        for sampler in samplers.SAMPLERS
    }


def markdown(rows: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(rows.values())))
    lines = [f"| sampler | {' | '.join(columns)} |", f"|---{'|---' * len(columns)}|"]
    lines += [f"| `{name}` | {' | '.join(f'{row[c]:.4f}' for c in columns)} |" for name, row in rows.items()]
    return "\n".join(lines)


def write_tables() -> None:
    text = PAGE.read_text()
    for name, rows in (("spacings", mean_errors()), ("defaults", errors_of_defaults())):
        pattern = re.compile(f"(<!-- {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        assert pattern.search(text), f"{PAGE.name} has no place for the table {name!r}"
        text = pattern.sub(lambda match, rows=rows: match[1] + markdown(rows) + match[2], text)
    PAGE.write_text(text)


def draw() -> None:
    """|error| over network calls, for the linear schedule and for a flow."""
    figure = Figure(figsize=(9, 4.2), dpi=100, layout="constrained")
    panels = {"linear schedule, T = 1000": Schedule(make_betas("linear", 1000)), "flow": FlowScale()}
    axes = figure.subplots(1, len(panels), sharey=True)
    for (title, scale), ax in zip(panels.items(), axes, strict=True):
        for i, sampler in enumerate(samplers.SAMPLERS):
            counts = [6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 100, 150]
            values = [abs(error(scale, sampler, calls)) / STD for calls in counts]
            style = "--" if samplers.SAMPLERS[sampler].spacing == "own" else "-"
            width = 2.4 if sampler == samplers.FEW_STEPS else 1.2
            marker = "os^vD"[i // len(COLOURS) * 2 + i % 2]
            ax.plot(
                counts, values, style, color=COLOURS[i % len(COLOURS)], lw=width, marker=marker, ms=3, label=sampler
            )
        ax.set(xscale="log", yscale="log", title=title, xlabel="network calls", ylim=(1e-4, 10))
        ax.set_xticks([6, 10, 25, 50, 100, 150], ["6", "10", "25", "50", "100", "150"])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("relative error of the standard deviation")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    FigureCanvasAgg(figure).print_png(PLOT, metadata={"Software": None})


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_tables()
    draw()
