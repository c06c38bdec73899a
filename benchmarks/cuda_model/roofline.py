"""The time of a step's parts on a GPU, from its launches and the rates of cards.py, and the table of these times.

A launch takes the longest of three times: its bytes at the bandwidth of a copy, its matrix products at cuDNN's assumed
rate, and an empty launch. Parts follow one another, as they do on one stream. Fewer tiles than multiprocessors lower a
convolution's rate in proportion.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cuda_model.cards import BIAS_GRADIENT, CARDS, WEIGHT_GRADIENT, Card
from cuda_model.recorder import SMALL_BYTES, Launch, Step

_CONVOLUTIONS = ("convolution", "input gradient", "weight gradient")
_TORCH = {
    "bias": "convolution biases, passes of their own",
    "bias gradient": "convolution biases' gradients",
    "layout": "copies into the convolution's layout",
    "aten::add": "sums of gradients",
    "aten::cat": "concatenations",
    "aten::_to_copy": "casts",
    "aten::sum": "sums",
}
SMALL = f"small launches, < {SMALL_BYTES / 1e6:g} MB each"


@dataclass
class Part:
    """Launches of one kind, and their seconds by card."""

    launches: int
    bytes_moved: int
    flops: float
    seconds: dict[str, float]


@dataclass(frozen=True)
class Named:
    """A step with its title, and the host's seconds for it, if measured."""

    title: str
    step: Step
    dtype: str
    images: int
    host: float | None = None


def seconds(launch: Launch, card: Card, dtype: str) -> float:
    """Of a launch, or of several alike."""
    bandwidth = card.copy * (BIAS_GRADIENT if launch.name == "bias gradient" else 1.0)
    times = [launch.bytes_moved / bandwidth, launch.count * card.launch]
    if launch.width is not None:
        rate = card.rate(dtype, launch.width) * (WEIGHT_GRADIENT if launch.name == "weight gradient" else 1.0)
        if launch.tiles is not None:
            rate *= min(1.0, launch.tiles / card.processors)
        times.append(launch.flops / rate)
    return max(times)


def part_of(launch: Launch) -> str:
    """The row of the table that a launch belongs to."""
    if launch.name in _CONVOLUTIONS:
        return f"convolutions, {launch.width} channels"
    if launch.is_small:
        return SMALL
    if launch.variant is not None:
        return f"Triton, {launch.operator.removeprefix('ddpm_fast::')}"
    if launch.name.startswith(("aten::_foreach", "aten::_fused")):
        return "clipping and Adam"
    return _TORCH.get(launch.name, "other operators of torch")


def parts(step: Step, dtype: str, cards: Iterable[Card] = CARDS) -> dict[str, Part]:
    """The step's parts, in the order in which they are shown."""
    found: dict[str, Part] = {}
    for launch in step.launches:
        part = found.setdefault(part_of(launch), Part(0, 0, 0.0, {card.name: 0.0 for card in cards}))
        part.launches += launch.count
        part.bytes_moved += launch.bytes_moved
        part.flops += launch.flops
        for card in cards:
            part.seconds[card.name] += seconds(launch, card, dtype)
    order = ("convolutions", "Triton", "convolution biases")

    def place(name: str) -> tuple:
        kind = next((i for i, prefix in enumerate(order) if name.startswith(prefix)), len(order) + (name == SMALL))
        return kind, int(name.split()[1]) if kind == 0 else 0, name

    return {name: found[name] for name in sorted(found, key=place)}


def table(named: Named, cards: tuple[Card, ...] = CARDS) -> str:
    """Markdown: a row per part; then the step as a whole, recorded and called from Python."""
    step, dtype = named.step, named.dtype
    head = ["part of the step", "launches", "GB", "TFLOP", *(f"{card.name}, ms" for card in cards)]
    rows = []
    for name, part in parts(step, dtype, cards).items():
        flops = f"{part.flops / 1e12:.3f}" if part.flops else ""
        times = (f"{part.seconds[card.name] * 1e3:.2f}" for card in cards)
        rows.append([name, str(part.launches), f"{part.bytes_moved / 1e9:.2f}", flops, *times])
    device = {card.name: sum(seconds(launch, card, dtype) for launch in step.launches) for card in cards}

    def whole(name: str, value, launches: str = "", size: str = "", flops: str = "") -> list[str]:
        return [name, launches, size, flops, *(f"{value(card) * 1e3:.2f}" for card in cards)]

    total = (str(step.count), f"{step.bytes_moved / 1e9:.2f}", f"{step.flops / 1e12:.3f}")
    rows.append(whole("**recorded step**: all of these", lambda card: device[card.name], *total))
    if named.host is not None:
        host = {card.name: named.host + step.count * card.call for card in cards}
        rows.append(whole("host: Python and launches", lambda card: host[card.name]))
        rows.append(whole("**eager step**: the longer", lambda card: max(device[card.name], host[card.name])))
    rows.append(whole("floor: the bytes alone", lambda card: step.bytes_moved / card.copy))
    rows.append(whole("floor: the products alone, at the peak", lambda card: step.flops / card.peak[dtype]))
    lines = [f"## {named.title}", "", *_aligned([head, *rows]), ""]
    rates = ", ".join(f"{named.images / device[card.name]:,.0f} on an {card.name}" for card in cards)
    triton = f"{len(step.triton)} launches are Triton's, in {len(step.variants)} compiled variants"
    lines.append(f"{step.count} launches, {step.small} of them small; {triton}. Images per second, recorded: {rates}.")
    return "\n".join(lines)


def assumptions(cards: tuple[Card, ...] = CARDS, dtype: str = "bf16") -> str:
    """Markdown: the numbers of cards.py that the tables use."""
    head = ["assumed", *(card.name for card in cards)]
    rows = []
    for width in cards[0].share:
        rates = (f"{card.rate(dtype, width) / 1e12:.0f} TFLOP/s" for card in cards)
        rows.append([f"cuDNN, {dtype}, up to {width} channels", *rates])
    rows.append(["of that for gradients of weights", *(f"{WEIGHT_GRADIENT:.0%}" for _ in cards)])
    rows.append(["copy of a large tensor", *(f"{card.copy / 1e12:.2f} TB/s" for card in cards)])
    rows.append(["empty launch in a graph", *(f"{card.launch * 1e6:g} us" for card in cards)])
    rows.append(["driver's call of a launch, on the host", *(f"{card.call * 1e6:g} us" for card in cards)])
    lines = ["## What the times assume", "", *_aligned([head, *rows]), ""]
    lines.append(
        "Channels are the fewer of a convolution's input and output channels. Triton's kernels are assumed to move "
        "bytes as fast as a copy and to multiply at cuDNN's rates, which no GPU has shown of convolutions with norms. "
        "Sources: peaks are NVIDIA's datasheets; 3.0 TB/s is a copy as measured on an H100; "
        "cuDNN's rates are an outside review's estimate for an H100, scaled by the peaks for others, and no "
        "measurement. Host times are this machine's."
    )
    return "\n".join(lines)


def _aligned(rows: list[list[str]]) -> list[str]:
    """A Markdown table that is also readable as text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: list[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        return f"| {' | '.join(cells)} |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return [line(rows[0]), f"| {' | '.join(rule)} |", *map(line, rows[1:])]
