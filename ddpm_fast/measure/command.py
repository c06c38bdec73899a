"""`ddpm-fast bench`: a user's own configuration, ours against upstream, as a table and a bar chart."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch

from ddpm_fast.measure import baselines, charts, compare, machine, profile
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

    def say(text: str) -> None:
        print(f"  {text} ...", file=sys.stderr, flush=True)

    for file in (out, json_file):  # before the time is spent
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    print(f"{configuration}, on {machine.name(machine.describe(device))}")
    if any("compiled" in name or "autotune" in name for name in against):
        say("torch.compile takes minutes, which are not counted in the timing")
    result = compare.compare(configuration, device, against, seconds=seconds, say=say)
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
        say("profiling")
        result["profile"] = profile.profile(configuration, device, seconds=seconds / 2)
        print("\n" + profile.report(result["profile"]))
    if json_file is not None:
        with write_atomically(json_file) as target:
            target.write((json.dumps(result, indent=2) + "\n").encode())
        print(f"numbers: {json_file}")


def draw(result: dict, out: Path) -> None:
    """The chart of a comparison."""
    phases = result["phases"]
    milliseconds = {
        phase: {name: t["median"] * 1e3 for name, t in timings.items()} for phase, timings in phases.items()
    }
    spread = {
        phase: {name: (t["low"] * 1e3, t["high"] * 1e3) for name, t in timings.items()}
        for phase, timings in phases.items()
    }
    reference = "upstream" if all("upstream" in timings for timings in phases.values()) else compare.OURS
    where = f"{machine.name(result['machine'])}; in brackets: speed over {reference}'s"
    title = f"{Configuration(**result['configuration'])}\n{where}"
    charts.bars(milliseconds, out, title=title, unit="ms", spread=spread, reference=reference)


def choices() -> list[str]:
    """Names of the baselines."""
    return [name for name in baselines.NEEDS if name != compare.OURS]
