"""What files without arguments tell by the names, shapes and buffers of their tensors: network and process."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from ddpm_fast.diffusion.processes import PROCESSES
from ddpm_fast.diffusion.schedules import cosine_beta_schedule, linear_beta_schedule, sigmoid_beta_schedule
from ddpm_fast.training.checkpoint_files import CheckpointError
from ddpm_fast.training.state_names import FoundStates

_Path = str | os.PathLike
_State = Mapping[str, torch.Tensor]

# Weights of a network that takes conditions, whose length is an argument of it.
_CONDITIONS = {"classes_emb.weight": "num_classes", "null_cond": "cond_dim"}
_SCHEDULES = {"linear": linear_beta_schedule, "cosine": cosine_beta_schedule, "sigmoid": sigmoid_beta_schedule}


def infer_process(states: FoundStates) -> str | None:
    """The process that tensors belong to, where they tell: "learned" and "weighted" have wider outputs than "ddpm"."""
    state = states.model
    if states.network_name == "net":
        return "edm"
    if any(name.startswith("log_snr.") for name in state):
        return "continuous"
    if "betas" not in state:
        return None
    output, given = state.get("model.final_conv.weight"), state.get("model.init_conv.weight")
    if output is None or given is None:
        return "ddpm"
    wide = {2 * given.shape[1]: "learned", 2 * given.shape[1] + 2: "weighted"}
    return wide.get(output.shape[0], "ddpm")


def infer_unet_config(state: _State, path: _Path) -> dict[str, Any]:
    """Arguments of `Unet` from the names and shapes of its state dict.

    Not to be seen there, so left at the defaults: dropout, flash_attn, resnet_block_groups, sinusoidal_pos_emb_theta,
    and whether sinusoidal weights were learned or random.
    """
    _check_generation(state, path)
    in_channels, out_dim = state["init_conv.weight"].shape[1], state["final_conv.weight"].shape[0]
    dim = state["time_mlp.1.weight"].shape[0] // 4
    stages = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("downs."))
    last = f"downs.{stages - 1}.3.weight"
    widths = [_shape(state, f"downs.{stage}.3.1.weight", path)[0] for stage in range(stages - 1)]
    widths.append(_shape(state, last, path)[0])
    attention = [_attention_config(state, f"downs.{stage}.2", path) for stage in range(stages)]
    frequencies = state.get("time_mlp.0.weights")
    return {
        "dim": dim,
        "init_dim": state["init_conv.weight"].shape[0],
        "dim_mults": tuple(width // dim for width in widths),
        **_channel_config(in_channels, out_dim),
        "out_dim": out_dim,
        "learned_sinusoidal_cond": frequencies is not None,
        "learned_sinusoidal_dim": 16 if frequencies is None else 2 * len(frequencies),
        "full_attn": tuple(is_full for is_full, _, _ in attention),
        "attn_heads": tuple(heads for _, heads, _ in attention),
        "attn_dim_head": tuple(dim_head for _, _, dim_head in attention),
        "norm": "rms" if "mid_block1.block1.norm.g" in state else "group",
        **{argument: len(state[name]) for name, argument in _CONDITIONS.items() if name in state},
    }


def infer_diffusion_config(state: _State, process: str = "ddpm") -> dict[str, Any]:
    """Arguments of a process from its buffers and names; image_size is not among them.

    Betas of no known schedule keep the loaded buffers. A bare `Unet` state dict has no buffers: the defaults hold.
    """
    kept = {"uncertainty_weighting": True} if "uncertainty.weight" in state else {}
    if "betas" not in state:
        hidden = state.get("log_snr.net.2.fn.0.net.weight")
        learned = {} if hidden is None else dict(noise_schedule="learned", learned_schedule_net_hidden_dim=len(hidden))
        return {**learned, **kept}
    betas = state["betas"].double()
    objective = {} if "objective" in PROCESSES[process].fixed_arguments else _infer_objective(state)
    config: dict[str, Any] = {"timesteps": len(betas), **objective, **kept}
    if any(name.startswith("timestep_history.") for name in state):
        config["timestep_sampler"] = "loss-second-moment"
    for name, schedule in _SCHEDULES.items():
        if torch.allclose(schedule(len(betas)).double(), betas, rtol=1e-4, atol=1e-9):
            config["beta_schedule"] = name
    return config


def _infer_objective(state: _State) -> dict[str, Any]:
    """Objective and min-SNR gamma from loss_weight, which is clip(SNR)/SNR, clip(SNR) or clip(SNR)/(SNR + 1)."""
    # 1/SNR kept as its square root: alphas_cumprod near 1 in float32 would lose 1 - alphas_cumprod.
    snr = state["sqrt_recipm1_alphas_cumprod"].double().square().reciprocal()
    is_usable = snr > 0  # a schedule that ends in pure noise has 0/0 there
    snr, weight = snr[is_usable], state["loss_weight"].double()[is_usable]
    clipped_snr = {"pred_v": weight * (snr + 1), "pred_noise": weight * snr, "pred_x0": weight}
    for objective, clipped in clipped_snr.items():
        if torch.allclose(clipped, snr, rtol=1e-4):
            return {"objective": objective}
    for objective, clipped in clipped_snr.items():
        gamma = clipped.max()
        if torch.allclose(clipped, snr.clamp(max=gamma), rtol=1e-4):
            return {"objective": objective, "min_snr_loss_weight": True, "min_snr_gamma": float(f"{gamma:.5g}")}
    warnings.warn("loss_weight follows no known objective; objective='pred_v' is assumed", stacklevel=4)
    return {"objective": "pred_v"}


def _channel_config(in_channels: int, out_dim: int) -> dict[str, Any]:
    """channels, self_condition, learned_variance and cond_channels that give these widths of the outer convolutions.

    As many condition channels as images have cannot be told from self-conditioning, and are taken for it.
    """
    if in_channels == 2 * out_dim:
        return {"channels": out_dim, "self_condition": True}
    if out_dim == 2 * in_channels:
        return {"channels": in_channels, "learned_variance": True}
    if in_channels > out_dim:
        return {"channels": out_dim, "cond_channels": in_channels - out_dim}
    return {"channels": in_channels}


def _attention_config(state: _State, prefix: str, path: _Path) -> tuple[bool, int, int]:
    """(is full attention, heads, dim_head) of one stage."""
    is_full = f"{prefix}.to_out.weight" in state
    heads = _shape(state, f"{prefix}.mem_kv", path)[1]
    hidden = _shape(state, f"{prefix}.to_qkv.weight", path)[0] // 3
    return is_full, heads, hidden // heads


def _check_generation(state: _State, path: _Path) -> None:
    """Refuse what is no `Unet` of this family, or one of a generation that computes something else."""
    for name in ("init_conv.weight", "time_mlp.1.weight", "final_conv.weight", "downs.0.0.block1.proj.weight"):
        _shape(state, name, path)
    is_old = not any(name.endswith(".mem_kv") for name in state)
    if is_old:
        raise CheckpointError(
            f"checkpoint {path} is of denoising-diffusion-pytorch 1.8 or older, whose network has no memory "
            "key-values (mem_kv); files of 1.9 and later load"
        )


def _shape(state: _State, name: str, path: _Path) -> torch.Size:
    if name not in state:
        raise CheckpointError(f"checkpoint {path} is of another architecture: it has no {name!r}")
    return state[name].shape
