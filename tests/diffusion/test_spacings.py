"""Spacings: their formulas, OpenAI's notation, options, and what holds for all."""

from __future__ import annotations

import math

import pytest
import torch

from ddpm_fast.diffusion import samplers, spacings
from ddpm_fast.diffusion.levels import TARGETS
from ddpm_fast.diffusion.schedules import Schedule, make_betas
from ddpm_fast.testing.sampler_cases import EdmScale, scales

SCHEDULE = Schedule(make_betas("linear", 1000))
SCALES = {**scales(), "cosine": Schedule(make_betas("cosine", 1000)), "short": Schedule(make_betas("sigmoid", 30))}


def times(name: str, steps: int | None, scale=SCHEDULE) -> list[float]:
    return spacings.spaced_times(scale, name, steps).tolist()


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("name", spacings.SPACINGS)
def test_times_descend_within_the_process(name, kind):
    scale = SCALES[kind]
    for steps in (1, 2, 3, 10, 29, 30):
        found = times(name, steps, scale)
        assert len(found) == steps and all(scale.last <= time <= scale.first for time in found)
        assert all(later < earlier for earlier, later in zip(found, found[1:], strict=False))
        if scale.is_discrete:
            assert all(time == int(time) for time in found)


@pytest.mark.parametrize("name", spacings.SPACINGS)
def test_all_steps_are_all_timesteps(name):
    assert times(name, 30, SCALES["short"]) == list(range(29, -1, -1))


# By hand, and table 2 of Lin et al. 2023 (which counts timesteps from 1).
BY_HAND = {
    "uniform": [999, 749, 500, 250, 0],  # 999·(1 − k/4), of which 749.25, 499.5 and 249.75 are rounded
    "trailing": [999, 799, 599, 399, 199],
    "leading": [800, 600, 400, 200, 0],
    "quadratic": [999, 562, 250, 62, 0],  # 999·(1 − k/4)²
    "own": [999, 799, 599, 399, 199],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_numbers_by_hand(name):
    assert times(name, 5) == BY_HAND[name]


def test_log_snr_is_uniform_in_log_snr():
    for kind in ("edm", "discrete", "cosine"):
        scale = SCALES[kind]
        half_log_snr = scale.at(spacings.spaced_times(scale, "log_snr", 9)).half_log_snr
        widths = half_log_snr.diff()
        assert widths.max() / widths.min() < (1.000001 if kind == "edm" else 1.1)  # timesteps are rounded
        assert half_log_snr.abs().max() < 5.12
    assert times("log_snr", 3)[0] == 999 and times("log_snr", 3)[-1] == 0
    # The cosine schedule's end has no signal to speak of, at λ = −9.9.
    assert times("log_snr", 3, SCALES["cosine"])[0] == 995
    assert times("log_snr:low=-20", 3, SCALES["cosine"])[0] == 999


def test_karras_is_his_formula():
    """Karras et al. 2022, eq. 5, with the numbers of section 5."""
    scale = EdmScale()
    for rho in (7.0, 3.0):
        expected = [(80 ** (1 / rho) + i / 17 * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho for i in range(18)]
        found = scale.at(spacings.spaced_times(scale, f"karras:rho={rho:g}", 18)).sigma
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
    assert times("karras", 7, scale) == times("karras:rho=7", 7, scale)


def test_a_process_without_signal_starts_there():
    assert times("log_snr", 5, SCALES["flow"])[0] == 1
    assert times("karras", 5, SCALES["flow"])[0] == 1
    assert times("log_snr", 5, SCALES["zero terminal snr"])[0] == 999


# improved-diffusion's space_timesteps, by its documentation and by hand.
OPENAI = {
    # "if there's 300 timesteps and the section counts are [10, 15, 20] then the first 100 timesteps are strided to be
    # 10 timesteps, the second 100 are strided to be 15 timesteps, and the final 100 are strided to be 20"
    (300, "10,15,20"): [round(k * 11) for k in range(10)]
    + [100 + round(k * 99 / 14) for k in range(15)]
    + [200 + round(k * 99 / 19) for k in range(20)],
    (1000, "ddim50"): list(range(0, 1000, 20)),
    (1000, "ddim250"): list(range(0, 1000, 4)),
    (10, "ddim4"): [0, 3, 6, 9],
    (10, "5"): [0, 2, 4, 7, 9],  # 0, 2.25, 4.5, 6.75, 9, of which 4.5 goes to the even one
    (10, "2,1"): [0, 4, 5],  # sections of 5 and 5
    (11, "2, 3"): [0, 5, 6, 8, 10],  # sections of 6 and 5
    (1000, "1000"): list(range(1000)),
    (4000, "ddim25"): list(range(0, 4000, 160)),
}


@pytest.mark.parametrize("timesteps, text", OPENAI)
def test_openais_notation(timesteps, text):
    scale = Schedule(make_betas("cosine", timesteps))
    found = times(text, None, scale)
    assert found == OPENAI[timesteps, text][::-1]
    plan = samplers.sampler_table(scale, TARGETS["pred_v"], "ddim", None, spacing=text)
    assert list(plan.times) == [int(time) for time in found]
    assert spacings.spaced_times(scale, text, 7).tolist() == found, "the text says how many, not the argument"


def test_times_of_ones_own():
    plan = samplers.sampler_table(SCHEDULE, TARGETS["pred_v"], "dpmpp_2m", 3, spacing=[900, 500, 20])
    assert plan.times == (900, 500, 20)
    for wrong in ([500, 900], [1000, 5], [5, 5], []):
        with pytest.raises(ValueError, match="spacing must name a spacing or give times from most noise"):
            samplers.sampler_table(SCHEDULE, TARGETS["pred_v"], "dpmpp_2m", 3, spacing=wrong)


def test_options_of_a_call_and_of_a_name_are_the_same():
    assert (
        times("karras:rho=3,low=-4", 6) == spacings.spaced_times(SCHEDULE, "karras", 6, {"rho": 3, "low": -4}).tolist()
    )
    half_log_snr = SCHEDULE.at(spacings.spaced_times(SCHEDULE, "karras:low=-3,high=2", 6)).half_log_snr
    assert half_log_snr[0].item() == pytest.approx(-3, abs=0.01) and half_log_snr[-1].item() == pytest.approx(
        2, abs=0.01
    )


@pytest.mark.parametrize(
    "name, scale, sentence",
    [
        ("cubic", SCHEDULE, "spacing must be one of own, .*, or like ddim50 or 10,10,20, got 'cubic'"),
        ("karras:eta=5", SCHEDULE, "spacing 'karras' has no option 'eta'; it takes rho, low, high"),
        ("uniform:rho=5", SCHEDULE, "spacing 'uniform' has no option 'rho'; it takes none"),
        ("karras:rho", SCHEDULE, "spacing must have options like karras:rho=5, got 'karras:rho'"),
        ("ddim300", SCHEDULE, "spacing must name a number of steps that a whole stride gives, got 'ddim300'"),
        ("ddim999", SCHEDULE, "spacing must name a number of steps that a whole stride gives"),
        ("400,700", SCHEDULE, "spacing must take 1 to 500 timesteps of a section of so many, got 700"),
        ("0,10", SCHEDULE, "spacing must take 1 to 500 timesteps of a section of so many, got 0"),
        ("ddim50", SCALES["edm"], "spacing must be a name where the process has no timesteps, got 'ddim50'"),
    ],
)
def test_a_wrong_spacing_gets_one_sentence(name, scale, sentence):
    with pytest.raises(ValueError, match=sentence):
        samplers.sampler_table(scale, TARGETS["pred_v"], "ddim", 10, spacing=name)


def test_a_spacing_is_one_function(monkeypatch):
    monkeypatch.setattr(spacings, "SPACINGS", dict(spacings.SPACINGS))

    @spacings.spacing("cosine")
    def cosine(scale, steps, *, power: float = 1.0):
        k = torch.arange(steps, dtype=torch.float64) / steps
        return scale.last + (scale.first - scale.last) * torch.cos(k * math.pi / 2) ** power

    assert times("cosine", 3) == [999, 865, 500]  # 999·cos(0°, 30°, 60°), of which 499.5 goes to the even one
    assert times("cosine:power=2", 3) == [999, 749, 250]
    with pytest.raises(ValueError, match="a spacing of the name 'cosine' is registered already"):
        spacings.spacing("cosine")(cosine)
