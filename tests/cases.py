"""Configurations shared by the equivalence tests: listed ones for each feature, drawn ones for their combinations."""

from __future__ import annotations

import random

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


def drawn_unet(seed: int) -> dict:
    """A random small UNet configuration."""
    rng = random.Random(seed)
    stages = rng.randint(1, 3)
    config = dict(
        dim=rng.choice([8, 12, 20]),
        dim_mults=tuple(rng.choice([1, 2, 3]) for _ in range(stages)),
        channels=rng.choice([1, 2, 3, 4]),
        self_condition=rng.random() < 0.4,
        flash_attn=rng.random() < 0.5,
        sinusoidal_pos_emb_theta=rng.choice([100, 10000]),
        attn_heads=tuple(rng.randint(1, 4) for _ in range(stages)),
        attn_dim_head=tuple(rng.choice([4, 6, 8]) for _ in range(stages)),
        full_attn=tuple([rng.random() < 0.5 for _ in range(stages - 1)] + [True]),
    )
    if rng.random() < 0.3:
        config["init_dim"] = rng.choice([8, 10])
    return config


def drawn_diffusion(seed: int) -> dict:
    """A random diffusion configuration, without the image size."""
    rng = random.Random(1000 + seed)
    beta_schedule = rng.choice(["linear", "cosine", "sigmoid"])
    kwargs = {
        "linear": {},
        "cosine": rng.choice([{}, {"s": 0.02}]),
        "sigmoid": rng.choice([{}, {"start": -2, "end": 2.5, "tau": 0.9}]),
    }[beta_schedule]
    return dict(
        timesteps=rng.choice([25, 40, 100]),
        objective=rng.choice(["pred_noise", "pred_x0", "pred_v"]),
        beta_schedule=beta_schedule,
        schedule_fn_kwargs=kwargs,
        min_snr_loss_weight=rng.random() < 0.5,
        min_snr_gamma=rng.choice([1, 5]),
        auto_normalize=rng.random() < 0.8,
        ddim_sampling_eta=rng.choice([0.0, 0.3, 1.0]),
    )
