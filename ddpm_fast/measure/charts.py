"""Bar charts of measured numbers (matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ddpm_fast.runtime.extras import needed_for

# Ours, then the others: colours that differ in grey and for colour-blind readers (Okabe & Ito 2008).
_COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#CC79A7", "#F0E442", "#999999", "#009E73")


def bars(
    groups: Mapping[str, Mapping[str, float]],
    path: Path,
    *,
    title: str,
    unit: str,
    spread: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
    reference: str = "upstream",
) -> None:
    """Horizontal bars, one panel per group, each bar labelled with its value and its ratio to `reference`.

    Args:
        groups: panel → bar → value.
        spread: panel → bar → (low, high), drawn as an error bar.
        path: a PNG; overwritten.
    """
    with needed_for("a chart"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    heights = [0.45 + 0.32 * len(group) for group in groups.values()]
    figure = Figure(figsize=(8, 0.7 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (label, group) in zip(panels, groups.items(), strict=True):
        _panel(axes, label, group, colours, (spread or {}).get(label, {}), unit, group.get(reference))
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _panel(axes, label: str, group: Mapping[str, float], colours, spread, unit: str, reference: float | None) -> None:
    positions = range(len(group))
    values = list(group.values())
    axes.barh(positions, values, color=[colours[name] for name in group], height=0.7)
    for position, (name, value) in zip(positions, group.items(), strict=True):
        if name in spread:
            low, high = spread[name]
            axes.plot([low, high], [position, position], color="black", linewidth=1)
        text = f"{_number(value)} {unit}"
        if reference and value:
            text += f"  ({reference / value:.2f}×)"
        axes.text(max([value, *spread.get(name, ())]) + 0.01 * max(values), position, text, va="center", fontsize=8)
    axes.set_yticks(list(positions), list(group), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max([*values, *(high for _, high in spread.values())]) * 1.28)
    axes.set_title(label, fontsize=9, loc="left")
    axes.tick_params(axis="x", labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _number(value: float) -> str:
    """Three significant digits without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def columns(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up as plain text too."""
    widths = [max(len(row[i]) for row in [names, *rows]) for i in range(len(names))]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"

    return "\n".join([line(names), rule, *map(line, rows)])
