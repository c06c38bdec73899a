"""Checkpoints: written whole or not at all, read without running code, rebuilt from their tensors where need be.

A checkpoint is upstream's dictionary (step, model, opt, ema, scaler, version) plus `config`, the constructor arguments.
Upstream's files lack `config`; then the architecture and the process are read off names, shapes and buffers.
"""

from __future__ import annotations

import inspect
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ddpm_fast.diffusion.gaussian_diffusion import GaussianDiffusion
from ddpm_fast.diffusion.schedules import cosine_beta_schedule, linear_beta_schedule, sigmoid_beta_schedule
from ddpm_fast.models.unet import Unet
from ddpm_fast.runtime.extras import needed_for
from ddpm_fast.training.atomic_files import write_atomically

_Path = str | os.PathLike
_State = Mapping[str, torch.Tensor]
_Size = int | tuple[int, int]

_SCHEDULES = {"linear": linear_beta_schedule, "cosine": cosine_beta_schedule, "sigmoid": sigmoid_beta_schedule}


class CheckpointError(ValueError):
    """A file that is no checkpoint, is damaged, or belongs to another architecture."""


class Checkpoint(NamedTuple):
    """What `load_checkpoint` returns; `ema` is an `ema_pytorch.EMA` around `diffusion`, whose network is `model`."""

    model: Unet
    diffusion: GaussianDiffusion
    ema: Any
    step: int


def save_atomically(obj: object, path: _Path) -> None:
    """`torch.save` that never leaves a partial file and never loses the earlier one; OSError says what went wrong."""
    with write_atomically(path) as file:
        torch.save(obj, file)


def load_file(path: _Path, map_location: torch.device | str = "cpu", mmap: bool = False) -> Any:
    """`torch.load(weights_only=True)` with one sentence for each way it can fail.

    Raises FileNotFoundError, or CheckpointError for a file that is truncated, no checkpoint, or holds code.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} is a folder; it must be a file such as model-1.pt")
    _check_container(path)
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:Unsupported|GLOBAL) (?:global: GLOBAL )?(\S+)", str(error))
        what = f"it refers to {refused.group(1)}" if refused else "it is not a pickle of tensors"
        raise CheckpointError(
            f"checkpoint {path} was not loaded: {what}, and only plain data and tensors are"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"checkpoint {path} is damaged: {reason}") from error


def load_checkpoint(
    path: _Path, *, image_size: _Size | None = None, map_location: torch.device | str = "cpu", **overrides: Any
) -> Checkpoint:
    """Rebuild network, diffusion and EMA from a checkpoint of ours or of upstream's `Trainer`; returns a `Checkpoint`.

    Plain state dicts of a `GaussianDiffusion` or a `Unet` load too (step 0, EMA equal to the weights).
    image_size: needed for upstream's files to sample, since they do not record it. overrides: further arguments of
    `Unet` and `GaussianDiffusion`, for what tensors cannot tell (`resnet_block_groups`, `auto_normalize`, ...) or what
    may be chosen again (`sampling_timesteps`, `sampler`, ...).

    Raises FileNotFoundError, CheckpointError (damaged, foreign, other architecture), TypeError (unknown override).
    """
    with needed_for("load_checkpoint"):
        from ema_pytorch import EMA

    contents = _as_trainer_file(load_file(path), path)
    config = contents.get("config") or {}
    unet_options, diffusion_options = _split_overrides(overrides)
    unet_config = config.get("unet") or infer_unet_config(_network_state(contents["model"]), path)
    diffusion_config = dict(config.get("diffusion") or infer_diffusion_config(contents["model"]))
    if image_size is not None:
        diffusion_config["image_size"] = image_size
    is_size_unknown = diffusion_config.get("image_size") is None

    model = Unet(**{**unet_config, **unet_options})
    if is_size_unknown:
        diffusion_config["image_size"] = model.downsample_factor
    diffusion = GaussianDiffusion(model, **{**diffusion_config, **diffusion_options})
    load_matching(diffusion, _with_buffers(contents["model"], diffusion), path)
    ema = EMA(diffusion, **(config.get("ema") or {}))
    load_ema(ema, contents["ema"], path)
    if is_size_unknown:
        _forget_image_size(path, diffusion, ema.ema_model)
    ema.to(map_location)
    return Checkpoint(model, diffusion, ema, int(contents["step"]))


def find_latest(folder: _Path) -> tuple[Path, int] | None:
    """(path, step) of the checkpoint with the largest step in a results folder, or None; damaged files are skipped."""
    found = []
    for path in sorted(Path(folder).glob("model-*.pt")):
        try:
            contents = load_file(path, mmap=True)
            found.append((int(contents["step"]), path))
        except (CheckpointError, KeyError, TypeError) as error:
            warnings.warn(f"skipped {path}: {error}", stacklevel=2)
    if not found:
        return None
    step, path = max(found)
    return path, step


def load_matching(module: nn.Module, state: _State, path: _Path) -> None:
    """`load_state_dict(strict=True)`; CheckpointError names the first key that is missing, unknown or misshapen."""
    difference = _first_difference(module.state_dict(), state)
    if difference:
        raise CheckpointError(f"checkpoint {path} is of another architecture: {difference}")
    module.load_state_dict(state)


def load_ema(ema: Any, state: _State | None, path: _Path) -> None:
    """Load the state of an `ema_pytorch.EMA`; older releases kept its two counters as (1,) instead of ()."""
    if state is None:
        ema.copy_params_from_model_to_ema()
        return
    counters = {name: state[name].reshape(()) for name in ("initted", "step") if name in state}
    load_matching(ema, {**state, **counters}, path)


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
    }


def infer_diffusion_config(state: _State) -> dict[str, Any]:
    """Arguments of `GaussianDiffusion` from its buffers; image_size is not among them.

    Betas of no known schedule keep the loaded buffers. A bare `Unet` state dict has no buffers: the defaults hold.
    """
    if "betas" not in state:
        return {}
    betas = state["betas"].double()
    config = {"timesteps": len(betas), **_infer_objective(state)}
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
    """channels, self_condition and learned_variance that give these widths of the first and last convolution."""
    if in_channels == 2 * out_dim:
        return {"channels": out_dim, "self_condition": True}
    if out_dim == 2 * in_channels:
        return {"channels": in_channels, "learned_variance": True}
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


def _check_container(path: Path) -> None:
    """Tell a truncated archive and a foreign file apart before `torch.load` mixes them up."""
    with open(path, "rb") as file:
        start = file.read(4)
    if not start:
        raise CheckpointError(f"checkpoint {path} is empty")
    if start[:2] == b"PK":
        if not zipfile.is_zipfile(path):
            raise CheckpointError(f"checkpoint {path} is truncated: the end of the archive is missing")
    elif start[:1] != b"\x80":
        raise CheckpointError(f"checkpoint {path} is not a PyTorch file")


def _as_trainer_file(contents: Any, path: _Path) -> dict[str, Any]:
    """The contents as a trainer's dictionary; wraps plain state dicts of a diffusion or a network."""
    if not isinstance(contents, dict):
        raise CheckpointError(f"checkpoint {path} holds a {type(contents).__name__}, not a dictionary")
    if isinstance(contents.get("model"), dict) and "step" in contents:
        return {"ema": None, **contents}
    if "model.init_conv.weight" in contents:
        return {"step": 0, "model": contents, "ema": None}
    if "init_conv.weight" in contents:
        warnings.warn(f"{path} holds only a network; the diffusion gets default arguments", stacklevel=3)
        network = {f"model.{name}": tensor for name, tensor in contents.items()}
        return {"step": 0, "model": network, "ema": None}
    found = ", ".join(map(str, list(contents)[:5]))
    raise CheckpointError(f"checkpoint {path} is no checkpoint of a diffusion trainer: it holds {found or 'nothing'}")


def _network_state(state: _State) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}


def _with_buffers(state: _State, diffusion: GaussianDiffusion) -> _State:
    """The state; to a bare network's, which lacks the buffers of a process, those of the diffusion just built."""
    if "betas" in state:
        return state
    buffers = {name: tensor for name, tensor in diffusion.state_dict().items() if not name.startswith("model.")}
    return {**buffers, **state}


def _split_overrides(overrides: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments split into those of `Unet` and those of `GaussianDiffusion`."""
    unet_names = set(inspect.signature(Unet).parameters)
    diffusion_names = set(inspect.signature(GaussianDiffusion).parameters) - {"model"}
    for name in overrides:
        if name not in unet_names | diffusion_names:
            raise TypeError(f"load_checkpoint got {name!r}, which is no argument of Unet or GaussianDiffusion")
    unet_options = {name: value for name, value in overrides.items() if name in unet_names}
    return unet_options, {name: value for name, value in overrides.items() if name in diffusion_names}


def _first_difference(expected: _State, state: _State) -> str | None:
    """One phrase on the first key that differs in presence or shape, or None."""
    for name, tensor in expected.items():
        if name not in state:
            return f"it has no {name!r}"
        if state[name].shape != tensor.shape:
            return f"{name!r} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
    unknown = next((name for name in state if name not in expected), None)
    return f"it has an unknown {unknown!r}" if unknown else None


def _forget_image_size(path: _Path, *diffusions: GaussianDiffusion) -> None:
    for diffusion in diffusions:
        diffusion.image_size = None  # type: ignore[assignment]  # sampling then asks for it
    warnings.warn(f"{path} does not record image_size; give load_checkpoint(..., image_size=) to sample", stacklevel=3)
