"""What holds for every registered sampler, on every kind of process, whatever its number of steps."""

from __future__ import annotations

import pytest
import torch

from ddpm_fast import GaussianDiffusion, Unet
from ddpm_fast.diffusion import samplers, spacings
from ddpm_fast.diffusion.levels import TARGETS
from ddpm_fast.diffusion.schedules import Schedule, make_betas
from ddpm_fast.testing.sampler_cases import TWO_CALLS, ZeroTerminalSchedule, exact_moments, scales

SCALES = {
    **scales(),
    "short": Schedule(make_betas("sigmoid", 40)),
    "short zero terminal snr": ZeroTerminalSchedule(make_betas("cosine", 40)),
}
# Besides the defaults: noise where there was none, and none where there was; and what raises the level of noise.
OPTIONS = {
    "ddpm": [{"large": 1.0}],
    "ddim": [{"eta": 0.7}],
    "euler": [{"s_churn": 10.0, "s_noise": 1.01}],
    "heun": [{"s_churn": 10.0, "s_tmin": 0.05, "s_tmax": 50.0}],
    "euler_ancestral": [{"eta": 0.5}, {"eta": 0.0}, {"eta": 2.0}],
    "dpmpp_2m_sde": [{"solver": "heun"}, {"eta": 0.0}],
    "dpmpp_3m_sde": [{"eta": 0.0}],
    "dpmpp_2s_a": [{"eta": 0.0}, {"eta": 0.5, "s_noise": 1.1}, {"eta": 2.0}],
    "unipc": [{"order": 3}, {"order": 1}, {"order": 3, "solver": "bh1"}],
    "lms": [{"order": 1}, {"order": 2}],
    "deis": [{"order": 1}, {"order": 2}],
}
CASES = [(name, options) for name in samplers.SAMPLERS for options in [{}, *OPTIONS.get(name, [])]]


def steps_of(kind: str) -> list[int]:
    return [1, 2, 3, 17] + ([40] if kind.startswith("short") else [])


def check(plan, scale, name, options, steps):
    count, columns = plan.table.shape
    assert plan.table.dtype == torch.float64 and columns in (6, 10, 12) and len(plan.times) == count
    assert torch.isfinite(plan.table).all()
    assert 0 < plan.first_scale < 200
    _, _, r, s, u, sigma, u2, u3, *_ = reference_columns(plan.table)
    assert (r[-1], s[-1], u[-1], sigma[-1], u2[-1], u3[-1]) == (1, 0, 0, 0, 0, 0), "it ends on x0"
    assert u[0] == u2[0] == u3[0] == u2[1:2].sum() * (columns < 12) == u3[1:2].sum() == 0, "it reads what was written"
    # A step without signal, or of which η leaves nothing but noise, is of one call.
    assert steps <= count <= (2 * steps - 1 if name in TWO_CALLS else steps)
    assert count == 2 * steps - 1 or name not in TWO_CALLS or options.get("eta", 1) > 1 or scale_has_none(scale)
    read = [bool((column != 0).any()) for column in (u, u2, u3)]
    assert plan.num_previous == max((i + 1 for i in range(3) if read[i]), default=0)
    assert plan.uses_x_start_previous == (plan.num_previous > 0)
    # Churn raises the level of noise before a step; with η > 1 a step has its middle below its end.
    if "s_churn" not in options and options.get("eta", 0) <= 1:
        assert list(plan.times) == sorted(plan.times, reverse=True)
    assert plan.has_integer_times or not scale.is_discrete or name in TWO_CALLS or "s_churn" in options


def scale_has_none(scale) -> bool:
    """True if there is no signal at the first time."""
    return scale.at(torch.tensor([scale.first], dtype=torch.float64)).a.item() == 0


def reference_columns(table: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.nn.functional.pad(table, (0, 12 - table.shape[1])).unbind(1))


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("name, options", CASES)
def test_tables_are_finite_and_end_on_x_start(name, options, kind):
    scale = SCALES[kind]
    for steps in steps_of(kind):
        for spacing in (None, "own"):
            plan = samplers.sampler_table(scale, TARGETS["pred_v"], name, steps, spacing=spacing, options=options)
            check(plan, scale, name, options, steps)


@pytest.mark.parametrize("name, options", CASES)
def test_all_steps_of_a_thousand(name, options):
    for kind in ("discrete", "zero terminal snr"):
        plan = samplers.sampler_table(SCALES[kind], TARGETS["pred_v"], name, 1000, options=options)
        check(plan, SCALES[kind], name, options, 1000)


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_the_objective_changes_nothing_but_p_and_q(name, kind):
    scale = SCALES[kind]
    targets = [
        target for key, target in TARGETS.items() if key != "pred_noise" or "zero" not in kind and kind != "flow"
    ]
    tables = [samplers.sampler_table(scale, target, name, 7).table for target in targets]
    for table in tables[1:]:
        assert torch.equal(table[:, 2:], tables[0][:, 2:]) and not torch.equal(table[:, :2], tables[0][:, :2])


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_a_process_that_is_multiplied_is_the_same(name, kind):
    """States multiplied by a factor that changes with the level are the same process: all samplers end alike.

    Only LMS and Heun for a flow, which are linear in its own time, may differ by a discretisation error.
    """

    class Multiplied(type(SCALES[kind])):
        def at(self, times):
            levels = super().at(times)
            factor = 0.5 + levels.b / (levels.a + levels.b)
            return levels._replace(a=factor * levels.a, b=factor * levels.b)

        def first_scale(self, levels):
            factor = 0.5 + levels.b / (levels.a + levels.b)
            return SCALES[kind].first_scale(SCALES[kind].at(levels.times)) * factor[0].item()

    scale = SCALES[kind]
    other = Multiplied(scale.betas) if scale.is_discrete else Multiplied()
    spacing = spacings.spaced_times(scale, "log_snr", 9).tolist()
    ends = [
        exact_moments(samplers.sampler_table(s, TARGETS["pred_x0"], name, 9, spacing=spacing), s, 0.1, 0.25)
        for s in (scale, other)
    ]
    tolerance = 0.2 if kind == "flow" and name in ("heun", "lms") else 1e-7
    assert ends[1] == pytest.approx(ends[0], rel=tolerance)


def test_a_learned_variance_lies_between_the_posterior_and_the_forward_step():
    """lo and hi of ancestral sampling are the bounds of Nichol & Dhariwal 2021, eq. 15, over the posterior's."""
    schedule = Schedule(make_betas("cosine", 50))
    target = TARGETS["pred_noise"]
    plan = samplers.sampler_table(schedule, target, "ddpm", 50, spacing="own", learned_variance=True)
    assert plan.table.shape == (50, 10) and plan.num_previous == 0
    sigma, lo, hi = plan.table[:-1, 5], plan.table[:-1, 8], plan.table[:-1, 9]
    posterior, betas = schedule.posterior_variance.flip(0)[:-1], schedule.betas.flip(0)[:-1]
    torch.testing.assert_close(((sigma * lo.exp()) ** 2), posterior, rtol=1e-9, atol=0)
    torch.testing.assert_close(((sigma * hi.exp()) ** 2), betas, rtol=1e-9, atol=0)
    large = samplers.sampler_table(schedule, target, "ddpm", 50, spacing="own", options={"large": 1.0})
    torch.testing.assert_close(large.table[:-1, 5] ** 2, betas, rtol=1e-9, atol=0)
    assert torch.equal(plan.table[:, :6], samplers.sampler_table(schedule, target, "ddpm", 50, spacing="own").table)
    # A sampler that knows no variance of its own leaves it out: lo = hi = 0.
    other = samplers.sampler_table(schedule, target, "dpmpp_2m", 10, learned_variance=True)
    assert other.table.shape == (10, 10) and not other.table[:, 8:].any()


@pytest.mark.parametrize(
    "name, options, error, sentence",
    [
        ("dpmpp_2m_sde", {"solver": "euler"}, ValueError, "solver must be one of midpoint, heun, got 'euler'"),
        ("unipc", {"solver": "bh3"}, ValueError, "solver must be one of bh1, bh2, got 'bh3'"),
        ("unipc", {"order": 4}, ValueError, "order must be an integer from 1 to 3, got 4"),
        ("unipc", {"order": 1.5}, ValueError, "order must be an integer from 1 to 3, got 1.5"),
        ("deis", {"order": 0}, ValueError, "order must be an integer from 1 to 3, got 0"),
        ("heun", {"s_churn": -1}, ValueError, "s_churn must be finite and at least 0, got -1"),
        (
            "heun",
            {"eta": 1},
            TypeError,
            "sampler 'heun' has no option 'eta'; it takes s_churn, s_tmin, s_tmax, s_noise",
        ),
        ("dpmpp_2m", {"eta": 1}, TypeError, "sampler 'dpmpp_2m' has no option 'eta'; it takes none"),
    ],
)
def test_a_wrong_option_gets_one_sentence(name, options, error, sentence):
    with pytest.raises(error, match=sentence):
        samplers.sampler_table(SCALES["discrete"], TARGETS["pred_v"], name, 10, options=options)


def test_the_default_of_few_steps_is_registered():
    assert samplers.FEW_STEPS in samplers.SAMPLERS
    assert all(sampler.spacing in spacings.SPACINGS for sampler in samplers.SAMPLERS.values())


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_it_is_recorded_seeded_and_independent_of_the_batch(name, self_condition):
    torch.manual_seed(0)
    network = Unet(8, dim_mults=(1, 2), channels=1, self_condition=self_condition)
    diffusion = GaussianDiffusion(network, image_size=8, timesteps=50, sampling_timesteps=4, sampler=name)
    images = diffusion.sample(2, seed=1, progress=False, graph=False)
    recorded = diffusion.sample(2, seed=1, progress=False, graph=True)
    second = diffusion.sample(1, seed=1, start_index=1, progress=False)
    assert torch.isfinite(images).all() and images.std() > 0
    torch.testing.assert_close(recorded, images, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second, images[1:], rtol=1e-4, atol=1e-4)
    assert not torch.equal(images, diffusion.sample(2, seed=2, progress=False))
