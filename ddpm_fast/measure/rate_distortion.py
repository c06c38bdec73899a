"""The pictures of Ho et al. 2020, figure 5: distortion and rate over time, and distortion over rate (matplotlib)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm_fast.runtime.extras import needed_for
from ddpm_fast.training.atomic_files import write_atomically

if TYPE_CHECKING:
    from ddpm_fast.diffusion.likelihood import RateDistortion

_COLOUR = "#0072B2"


def plot_rate_distortion(curve: RateDistortion, path: Path, *, title: str = "") -> None:
    """Draw three panels from left to right; `path` is overwritten, and its ending says the kind of file."""
    with needed_for("a plot of rate and distortion"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    steps = range(len(curve.timesteps))  # of the reverse process, T − t
    rate, distortion = curve.rate.tolist(), curve.distortion.tolist()
    time, bits, error = "reverse process steps", "rate (bits/dim)", "distortion (RMSE of 0 to 255)"
    for axes, (x, y, across, up) in zip(
        panels,
        ((steps, distortion, time, error), (steps, rate, time, bits), (rate, distortion, bits, error)),
        strict=True,
    ):
        axes.plot(x, y, color=_COLOUR, linewidth=1.5, marker="." if len(curve.timesteps) < 60 else None)
        axes.set_xlabel(across, fontsize=9)
        axes.set_ylabel(up, fontsize=9)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.grid(True, alpha=0.3)
        axes.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.lstrip(".") or "png", dpi=110, metadata={"Software": None})
    with write_atomically(path) as file:
        file.write(picture.getvalue())
