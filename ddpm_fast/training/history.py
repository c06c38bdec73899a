"""The loss of a run over its steps, as a table and as a picture."""

from __future__ import annotations

import csv
import io
import warnings
from pathlib import Path

from ddpm_fast.runtime import extras
from ddpm_fast.training.atomic_files import write_atomically


class LossHistory:
    """loss.csv with columns step, loss (mean since the row before) and images_per_second, and its plot loss.png."""

    _HEADER = ("step", "loss", "images_per_second")

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / "loss.csv"

    def start(self, step: int) -> None:
        """Keep the rows up to `step`, so that a resumed run repeats none; warn if nothing will draw loss.png."""
        if not extras.is_installed("matplotlib"):
            how = extras.how_to_install("matplotlib")
            warnings.warn(f"loss.png is not drawn, since matplotlib is not installed: {how}", stacklevel=3)
        kept = [row for row in self.rows() if int(row[0]) <= step]
        text = io.StringIO()
        csv.writer(text).writerows([self._HEADER, *kept])
        with write_atomically(self.path) as file:
            file.write(text.getvalue().encode())

    def append(self, step: int, loss: float, images_per_second: float) -> None:
        """Add a row."""
        with open(self.path, "a", newline="") as file:
            csv.writer(file).writerow((step, repr(loss), f"{images_per_second:.1f}"))

    def rows(self) -> list[list[str]]:
        """Rows of strings without the header; lines that a crash cut short or damaged are left out."""
        if not self.path.exists():
            return []
        with open(self.path, newline="", encoding="utf-8", errors="replace") as file:
            lines = [line for line in file if line.endswith("\n")]
        return [row for row in csv.reader(lines[1:]) if _is_row(row)]

    def plot(self) -> None:
        """Draw loss.png, the loss on a logarithmic axis over the step; without matplotlib nothing is drawn."""
        if not extras.is_installed("matplotlib"):
            return
        from matplotlib.figure import Figure

        rows = self.rows()
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([int(row[0]) for row in rows], [float(row[1]) for row in rows], linewidth=1)
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel("training loss (mean since the point before)")
        axes.grid(True, which="both", alpha=0.3)
        with write_atomically(self.path.with_suffix(".png")) as file:
            figure.savefig(file, format="png", dpi=120)


def _is_row(row: list[str]) -> bool:
    """True for a step, a loss and a speed."""
    try:
        _ = [kind(text) for kind, text in zip((int, float, float), row, strict=True)]
    except ValueError:
        return False
    return True
