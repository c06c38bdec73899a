"""docs/samplers.md names every sampler and spacing, and its tables of errors are what the samplers do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import sampler_errors

from ddpm_fast.diffusion import samplers, spacings

TEXT = (Path(__file__).parents[2] / "docs" / "samplers.md").read_text()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def table(name: str) -> dict[str, dict[str, float]]:
    lines = re.search(f"<!-- {name} -->\n(.*?)\n<!-- end -->", TEXT, re.DOTALL)[1].splitlines()
    columns = cells(lines[0])[1:]
    return {row[0].strip("`"): dict(zip(columns, map(float, row[1:]), strict=True)) for row in map(cells, lines[2:])}


def test_every_sampler_is_named_with_its_options_and_spacing():
    rows = {row[0].strip("`"): row for row in map(cells, TEXT.splitlines()) if len(row) == 5}
    for name, sampler in samplers.SAMPLERS.items():
        _, _, options, spacing, _ = rows[name]
        assert spacing == f"`{sampler.spacing}`"
        written = options if options != "as `euler`" else rows["euler"][2]
        for option, default in sampler.options.items():
            shown = f'"{default}"' if isinstance(default, str) else f"{default:g}"
            assert f"`{option}={shown}`" in written, f"{name}: {option}"
    for name in spacings.SPACINGS:
        assert re.search(rf"^\| `{name}` \|", TEXT, re.MULTILINE), name


def test_the_errors_of_the_defaults_are_measured():
    """Linear algebra in float64, written with four digits."""
    found = sampler_errors.errors_of_defaults()
    assert {name: pytest.approx(row, abs=6e-5) for name, row in found.items()} == table("defaults")


def test_the_errors_of_the_spacings_are_measured():
    written = table("spacings")
    assert set(written) == set(samplers.SAMPLERS)
    assert all(set(row) == set(spacings.SPACINGS) for row in written.values())
    found = sampler_errors.mean_errors()
    for name, row in written.items():
        assert row == pytest.approx(found[name], abs=6e-5), name
