"""Beta schedules, derived numbers and tables."""

from __future__ import annotations

import pytest
import torch

from ddpm_fast.diffusion import samplers, schedules
from ddpm_fast.diffusion.levels import TARGETS
from ddpm_fast.diffusion.schedules import Schedule
from ddpm_fast.diffusion.weightings import find_weighting


@pytest.mark.parametrize("timesteps", [2, 25, 1000])
@pytest.mark.parametrize(
    "name, kwargs",
    [("linear", {}), ("cosine", {}), ("cosine", {"s": 0.1}), ("sigmoid", {}), ("sigmoid", {"start": -1, "tau": 0.5})],
)
def test_schedules_equal_upstream(upstream, name, kwargs, timesteps):
    theirs = getattr(upstream, f"{name}_beta_schedule")(timesteps, **kwargs)
    ours = getattr(schedules, f"{name}_beta_schedule")(timesteps, **kwargs)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_module_level_names_are_public():
    import ddpm_fast

    for name in ("linear_beta_schedule", "cosine_beta_schedule", "sigmoid_beta_schedule"):
        assert getattr(ddpm_fast, name) is getattr(schedules, name)


@pytest.mark.parametrize("name", schedules.BETA_SCHEDULES)
def test_posterior_is_bayes_rule(name):
    """Mean and variance of q(x_{t−1} | x_t, x0) from the product of the two Gaussians, computed another way."""
    s = Schedule(schedules.make_betas(name, 200))
    buffers = s.buffers()
    t = torch.arange(1, 200)
    beta, prev = s.betas[t], s.alphas_cumprod_prev[t]
    precision = (1 - beta) / beta + 1 / (1 - prev)
    torch.testing.assert_close(buffers["posterior_variance"][t], 1 / precision, rtol=1e-9, atol=0)
    torch.testing.assert_close(buffers["posterior_mean_coef1"][t], prev.sqrt() / (1 - prev) / precision)
    torch.testing.assert_close(buffers["posterior_mean_coef2"][t], (1 - beta).sqrt() / beta / precision)


@pytest.mark.parametrize("objective", schedules.OBJECTIVES)
def test_prediction_and_loss_tables_are_inverse(objective):
    """The target of the loss table, read through the prediction table, gives x0 back."""
    s = Schedule(schedules.make_betas("cosine", 50))
    x0, eps = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    a, b = schedules.forward_table(s).unbind(1)
    c, d, w = schedules.loss_table(s, objective, torch.ones(50)).unbind(1)
    p, q = schedules.prediction_table(s, objective).unbind(1)
    torch.testing.assert_close(p * (a * x0 + b * eps) + q * (c * eps + d * x0), x0, rtol=1e-6, atol=1e-6)
    assert (w == 1).all()


def test_pred_v_is_the_angular_derivative():
    s = Schedule(schedules.make_betas("cosine", 50))
    a, b = schedules.forward_table(s).unbind(1)
    c, d, _ = schedules.loss_table(s, "pred_v", torch.ones(50)).unbind(1)
    torch.testing.assert_close(a * c - b * d, torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(a * d + b * c, torch.zeros(50, dtype=torch.float64))


def test_min_snr_weights():
    s = Schedule(schedules.make_betas("cosine", 50))
    clipped = torch.minimum(s.snr, torch.tensor(5.0, dtype=torch.float64))
    min_snr = find_weighting("min_snr", {"gamma": 5})
    assert torch.equal(schedules.loss_weight(s, "pred_x0", min_snr), clipped)
    assert torch.equal(schedules.loss_weight(s, "pred_noise", min_snr), clipped / s.snr)
    assert torch.equal(schedules.loss_weight(s, "pred_v", min_snr), clipped / (s.snr + 1))
    assert (schedules.loss_weight(s, "pred_noise") == 1).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: schedules.make_betas("quadratic", 10), "beta_schedule must be one of linear, cosine, sigmoid"),
        (lambda: schedules.make_betas("linear", 0), "timesteps must be a positive int"),
        (lambda: schedules.make_betas("linear", 10.5), "timesteps must be a positive int, got 10.5"),
        (lambda: Schedule(schedules.make_betas("linear", 10)), r"betas in \(0, 1\).*at least 21 timesteps"),
        (
            lambda: samplers.check_steps(Schedule(schedules.make_betas("cosine", 10)), 11),
            r"sampling_timesteps must be in \[1, timesteps = 10\], got 11",
        ),
        (lambda: schedules.check_objective("pred_eps"), "objective must be one of"),
        (lambda: samplers.check_sampler("magic"), "sampler must be one of ddim, ddpm, .*dpmpp_2m"),
        (
            lambda: samplers.sampler_table(
                Schedule(schedules.make_betas("cosine", 9)), TARGETS["pred_v"], "ddim", 3, options={"eta": -1.0}
            ),
            "eta must be finite and at least 0",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_smallest_linear_schedule():
    Schedule(schedules.make_betas("linear", 21))


def test_betas_that_are_given():
    given = [0.1, 0.2, 0.5, 1.0]
    assert schedules.make_betas("given", 4, betas=given).tolist() == given
    with pytest.raises(ValueError, match="betas must be timesteps = 5 numbers, got 4"):
        schedules.make_betas("given", 5, betas=given)


def test_a_process_of_given_betas_that_does_not_clip():
    import ddpm_fast

    torch.manual_seed(0)
    options = {"image_size": 8, "timesteps": 4, "beta_schedule": "given", "objective": "pred_x0"}
    options["schedule_fn_kwargs"] = {"betas": [0.1, 0.2, 0.5, 0.9]}
    model = ddpm_fast.Unet(8, dim_mults=(1,))
    process = ddpm_fast.GaussianDiffusion(model, clip_x_start=False, **options)
    assert process.betas.tolist() == pytest.approx([0.1, 0.2, 0.5, 0.9])
    assert process.current_config()["clip_x_start"] is False
    assert "clip_x_start" not in ddpm_fast.GaussianDiffusion(model, **options).current_config()
    with torch.no_grad():
        model.final_conv.bias.fill_(3.0)
        model.final_conv.weight.zero_()
    x = torch.randn(1, 3, 8, 8)
    assert process.p_sample(x, 0)[1].unique().tolist() == [3.0]
    process.clip_x_start = True
    assert process.p_sample(x, 0)[1].unique().tolist() == [1.0]
