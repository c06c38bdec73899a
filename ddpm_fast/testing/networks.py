"""Networks of the equivalence tests: listed configurations for each feature, and the comparison of two networks."""

from __future__ import annotations

import copy

import torch

from ddpm_fast.runtime.dispatch import use_backend
from ddpm_fast.testing.truth import assert_close_to_truth

UNETS = {
    "plain": dict(dim=16, dim_mults=(1, 2)),
    "seed_notebook": dict(dim=16, dim_mults=(1, 2, 4, 8), flash_attn=True),
    "one_stage": dict(dim=8, dim_mults=(1,)),
    "grey": dict(dim=8, dim_mults=(1, 2), channels=1),
    "init_and_out_dim": dict(dim=8, init_dim=12, out_dim=5, dim_mults=(1, 3)),
    "self_condition": dict(dim=8, dim_mults=(1, 2), self_condition=True),
    "learned_variance": dict(dim=8, dim_mults=(1, 2), learned_variance=True),
    "learned_sinusoidal": dict(dim=8, dim_mults=(1, 2), learned_sinusoidal_cond=True, learned_sinusoidal_dim=6),
    "random_fourier": dict(dim=8, dim_mults=(1, 2), random_fourier_features=True),
    "theta": dict(dim=8, dim_mults=(1, 2), sinusoidal_pos_emb_theta=500),
    "full_attn_per_stage": dict(
        dim=8, dim_mults=(1, 2, 2), full_attn=(True, False, True), attn_heads=(1, 2, 3), attn_dim_head=(8, 16, 4)
    ),
    "full_attn_everywhere": dict(dim=8, dim_mults=(1, 2), full_attn=True),
    "uneven_widths": dict(dim=24, dim_mults=(1, 3), attn_heads=3, attn_dim_head=10),
}


def randomise(module: torch.nn.Module) -> None:
    """Random numbers in every parameter, gains included: ones and zeros hide wrong gradients."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim < 2 or p.shape[0] == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))


def inputs(config: dict, size: tuple[int, int], batch: int = 3):
    generator = torch.Generator().manual_seed(2)
    channels = config.get("channels", 3)
    x = torch.randn(batch, channels, *size, generator=generator)
    t = torch.randint(0, 1000, (batch,), generator=generator)
    x_self_cond = torch.randn(x.shape, generator=generator) if config.get("self_condition") else None
    return x, t, x_self_cond


def run(model, x, t, x_self_cond=None, **conditions):
    """Output, and the gradient with respect to the input and every parameter."""
    dtype = next(model.parameters()).dtype
    x = x.detach().clone().to(dtype).requires_grad_()
    conditions = {k: v.to(dtype) if v.is_floating_point() else v for k, v in conditions.items()}
    out = model(x, t, *(() if x_self_cond is None else (x_self_cond.to(dtype),)), **conditions)
    weight = torch.linspace(-1, 1, out.numel(), dtype=dtype).reshape(out.shape)
    (out * weight).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return out.detach(), {"x": x.grad, **grads}


def assert_equal_networks(theirs, ours, config, size, **conditions):
    """Ours as accurate as theirs in the same dtype, in output and gradients, by modules and by block ops."""
    truth_model = copy.deepcopy(theirs).double()
    args = inputs(config, size)
    truth, truth_grads = run(truth_model, args[0], args[1].double(), args[2], **conditions)
    expected, expected_grads = run(theirs, *args, **conditions)
    # A whole network rounds in other places than upstream, and more where native code convolves by Winograd's method;
    # a wrong formula is off by far more than this many ulp.
    for backend, floor in (("reference", 128), (None, 256)):
        ours.zero_grad()
        with use_backend(backend):
            actual, actual_grads = run(ours, *args, **conditions)
        assert_close_to_truth(actual, expected, truth, name="output")
        assert actual_grads.keys() == expected_grads.keys()
        for name in expected_grads:
            assert_close_to_truth(actual_grads[name], expected_grads[name], truth_grads[name], name=name, floor=floor)
