"""Tolerances under the arithmetic of GPUs, without one: see gpu_arithmetic.py and docs/arithmetic.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_fast.testing.gpu_arithmetic import UNITS, div_full, exp_approx, multiply, multiply_tf32x3, sqrt_approx, within
from ddpm_fast.testing.truth import assert_close_to_truth

OPS = Path(__file__).parent
TILE = 32  # positions of a tile of linear attention's context in float32


def products_of(value: float, n: int) -> tuple[np.ndarray, np.ndarray]:
    """n products that are `value` each."""
    return np.full((1, n), value, np.float32), np.ones((n, 1), np.float32)


@pytest.mark.parametrize("name, lost", [("sm_80", 2.0**-25), ("sm_90", 2.0**-26), ("sm_100", 2.0**-26)])
def test_a_matrix_unit_cuts_off_what_lies_below_its_bits(name, lost):
    """Beside 1, terms at the last kept bit are added; terms one bit below are lost."""
    unit, one = UNITS[name], np.ones((1, 1), np.float32)
    assert multiply(*products_of(lost, 8), one, unit.tf32, unit.extra_bits) == 1
    kept = multiply(*products_of(2 * lost, unit.tf32), one, unit.tf32, unit.extra_bits)
    assert kept == 1 + np.floor(2 * lost * unit.tf32 * 2**23) / 2**23 > 1
    assert multiply(*products_of(-2 * lost, 1), one, unit.tf32, unit.extra_bits) == np.float32(1 - 2.0**-24)
    assert multiply(*products_of(1.9 * 2.0**-24, 1), one, unit.tf32, unit.extra_bits) == 1  # not rounded to nearest


def test_instructions_keep_their_bounds_and_use_them():
    x, y = (2 ** np.random.default_rng(n).uniform(-20, 20, 100_000).astype(np.float32) for n in (0, 1))

    def ulps(found, exact):
        return np.abs(found - exact) / np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)

    assert 1.2 < ulps(div_full(x, y), x.astype(np.float64) / y).max() <= 2
    assert 0.9 < ulps(sqrt_approx(x), np.sqrt(x.astype(np.float64))).max() <= 1
    exponents = np.linspace(-8, 8, 100_001, dtype=np.float32)
    error = np.abs(exp_approx(exponents) / np.exp(exponents.astype(np.float64)) - 1)
    assert 2.0**-23 < error.max() <= 2.0**-22 + 8 * 1.45 * 2.0**-24
    assert (within(x.astype(np.float64), 2, x) == x).all(), "what float32 holds stays as it is"


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("positions", [256, 1024, 16384])
def test_sums_over_positions_hold_the_rule_only_outside_the_matrix_unit(positions, name):
    """Σ exp(k − max)·v over positions, as linear attention's context, tile after tile; both orders of adding."""
    generator = torch.Generator().manual_seed(positions)
    k, v = (2 * torch.randn(positions, 16, generator=generator) for _ in range(2))
    weights = (k - k.amax(0)).exp()
    truth, reference = weights.double().T @ (v + 1).double(), weights.T @ (v + 1)
    found = {}
    for inside in (False, True):
        total = np.zeros((16, 16), np.float32)
        for start in range(0, positions, TILE):
            a, b = weights[start : start + TILE].T.numpy(), (v + 1)[start : start + TILE].numpy()
            total = multiply_tf32x3(a, b, total, UNITS[name], inside=inside)
        found[inside] = torch.from_numpy(total)
    assert_close_to_truth(found[False], reference, truth, name="outside")
    with pytest.raises(AssertionError, match="inside: RMS error"):
        assert_close_to_truth(found[True], reference, truth, name="inside")


def test_every_file_of_kernel_tests_is_judged():
    """tests/ops/conftest.py runs the marked tests of each file in the arithmetic of a GPU."""
    for file in OPS.glob("*/test_triton*.py"):
        assert ("@pytest.mark.arithmetic" in file.read_text()) == (file.parent.name != "production"), file
