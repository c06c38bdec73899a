"""`ddpm-fast bench`: a user's own configuration, ours against upstream, as a table and a bar chart."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch

from ddpm_fast.measure import baselines, charts, compare, foreign, machine, profile
from ddpm_fast.measure.baselines import Configuration
from ddpm_fast.models.unet import Unet
from ddpm_fast.training.atomic_files import write_atomically
from ddpm_fast.training.checkpoint import load_checkpoint

# Sizes that fit a minute of timing: on a GPU that of upstream's README, on a CPU a small one.
_SIZE = {"cuda": {"image_size": 128, "batch": 16}, "cpu": {"image_size": 32, "batch": 4}}


def configuration_from(checkpoint: Path | None, given: dict, device: torch.device) -> Configuration:
    """The configuration of a checkpoint, or the defaults of a device, overridden by the given fields.

    Args:
        checkpoint: a checkpoint file.
        given: fields of `Configuration` by name; None is not given.
    """
    fields: dict[str, Any] = dict(_SIZE.get(device.type, _SIZE["cpu"]))
    if checkpoint is not None:
        loaded = load_checkpoint(checkpoint, image_size=given.get("image_size"))
        if not isinstance(loaded.model, Unet):
            raise ValueError(f"bench compares networks that {checkpoint} has none of: it is upstream's of classes")
        fields |= _of_network(loaded.model)
        fields["image_size"] = tuple(loaded.diffusion.image_size)
    fields |= {name: value for name, value in given.items() if value is not None}
    return Configuration(**fields)


def _of_network(network: Unet) -> dict:
    """Fields of `Configuration` for a network: its width, and every argument that is not the default."""
    defaults = {name: p.default for name, p in inspect.signature(Unet.__init__).parameters.items()}
    # Upstream's network, with which it is compared, takes no conditions; they are a row of one product.
    config = {name: value for name, value in network.config.items() if not name.startswith(("cond_", "num_classes"))}
    named = {name: config.pop(name) for name in ("dim", "channels")}
    named["dim_mults"] = tuple(config.pop("dim_mults"))
    return named | {
        "network": {k: v for k, v in config.items() if v != defaults[k]} | {"flash_attn": config["flash_attn"]}
    }


def run(
    configuration: Configuration, device: torch.device, *, against: list[str], seconds: float, out: Path,
    json_file: Path | None, with_profile: bool,
) -> None:  # fmt: skip
    """Compare, print and draw; with `with_profile` also say where our time goes."""

    _make_folders(out, json_file)
    print(f"{configuration}, on {machine.name(machine.describe(device))}")
    if any("compiled" in name or "autotune" in name for name in against):
        _say("torch.compile takes minutes, which are not counted in the timing")
    result = compare.compare(configuration, device, against, seconds=seconds, say=_say)
    print(compare.table(result))
    for name, errors in result["errors"].items():
        if name == "diffusers":
            print(f"\n{name} is another network, {errors['parameters']:.2f} times as many parameters")
        else:
            print(f"\n{name} equals ours: " + ", ".join(f"{k} to {v:.0e}" for k, v in errors.items()))
    print("\nWho computed our ops\n" + compare.choices_table(result))
    draw(result, out)
    print(f"\nchart: {out}")
    if with_profile:
        _say("profiling")
        result["profile"] = profile.profile(configuration, device, seconds=seconds / 2)
        print("\n" + profile.report(result["profile"]))
    _write(result, json_file)


def run_foreign(
    model: str, device: torch.device, *, batch: int, dtype: str, seconds: float, out: Path, json_file: Path | None
) -> None:
    """Compare a network of another package with itself accelerated, print and draw."""
    _make_folders(out, json_file)
    network = foreign.make(model)
    result = foreign.compare(network, device, batch=batch, dtype=dtype, seconds=seconds, say=_say)
    size = "×".join(map(str, network.size))
    where = machine.name(result["machine"])
    title = f"{model}, {result['parameters'] / 1e6:.1f} million parameters, {batch} images of {size}, {dtype}"
    print(f"{title}, on {where}")
    print(foreign.table(result))
    print("\naccelerated equals eager: " + ", ".join(f"{k} to {v:.0e}" for k, v in result["errors"].items()))
    print("\nWho computes the blocks\n" + foreign.modules_table(result))
    _draw(result["phases"], out, f"{title}\n{where}", reference=foreign.EAGER)
    print(f"\nchart: {out}")
    _write(result, json_file)


def _say(text: str) -> None:
    print(f"  {text} ...", file=sys.stderr, flush=True)


def _make_folders(*files: Path | None) -> None:
    """Make the folders of the files before the time is spent."""
    for file in files:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)


def _write(result: dict, json_file: Path | None) -> None:
    if json_file is not None:
        with write_atomically(json_file) as target:
            target.write((json.dumps(result, indent=2) + "\n").encode())
        print(f"numbers: {json_file}")


def draw(result: dict, out: Path) -> None:
    """The chart of a comparison."""
    phases = result["phases"]
    reference = "upstream" if all("upstream" in timings for timings in phases.values()) else compare.OURS
    where = f"{machine.name(result['machine'])}; in brackets: speed over {reference}'s"
    _draw(phases, out, f"{Configuration(**result['configuration'])}\n{where}", reference)


def _draw(phases: dict[str, dict[str, dict]], out: Path, title: str, reference: str) -> None:
    milliseconds = {
        phase: {name: t["median"] * 1e3 for name, t in timings.items()} for phase, timings in phases.items()
    }
    spread = {
        phase: {name: (t["low"] * 1e3, t["high"] * 1e3) for name, t in timings.items()}
        for phase, timings in phases.items()
    }
    charts.bars(milliseconds, out, title=title, unit="ms", spread=spread, reference=reference)


def choices() -> list[str]:
    """Names of the baselines."""
    return [name for name in baselines.NEEDS if name != compare.OURS]
