"""Upstream's networks: the `Unet` of denoising-diffusion-pytorch 2.3 and its class-conditional one.

Ours have the same modules under the same names, so that an accelerated module has the methods of ours before those of
its own class: whole networks run as ours do, by the same code. This file says where upstream's modules differ.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ddpm_fast.integrations.family import Fast, declare, is_unchanged, own_forward
from ddpm_fast.integrations.replays import Replayed, recorded_calls, untrusted_module
from ddpm_fast.models import attention, classifier_free_unet, embeddings, norm, resnet
from ddpm_fast.models.conditions import GivenConditions
from ddpm_fast.models.recorded_calls import RecordedCalls
from ddpm_fast.models.stock import is_instance, knows_package
from ddpm_fast.models.unet_base import UnetBase
from ddpm_fast.ops.registration import may_read
from ddpm_fast.runtime.autocast import autocast_dtype

_FILE = "denoising_diffusion_pytorch.denoising_diffusion_pytorch"
_FILE_OF_CLASSES = "denoising_diffusion_pytorch.classifier_free_guidance"
_ATTEND = "denoising_diffusion_pytorch.attend.Attend"


class _RMSNormOfClasses(norm.RMSNorm):
    scale = property(lambda self: self.g.numel() ** 0.5)


class _SinusoidalPosEmb(embeddings.SinusoidalPosEmb):
    theta = 10000  # the class-conditional network has no other


class _Block(resnet.Block):
    def forward(self, x: torch.Tensor, scale_shift: Any = None) -> torch.Tensor:
        return own_forward(self, x, scale_shift)


class _ResnetBlock(resnet.ResnetBlock):
    low_memory = False

    @property
    def dim_out(self) -> int:  # type: ignore[override]
        return self.projection.weight.shape[0] // 2

    def forward(self, x: torch.Tensor, time_emb: Any = None, *conditions_emb: Any) -> torch.Tensor:
        if any(emb is None for emb in (time_emb, *conditions_emb)):
            return own_forward(self, x, time_emb, *conditions_emb)
        return super().forward(x, time_emb, *conditions_emb)


class _LinearAttention(attention.LinearAttention):
    low_memory = False

    def _by_modules(self, x: torch.Tensor) -> torch.Tensor:
        return own_forward(self, x)


class _Attention(attention.Attention):
    def _by_modules(self, x: torch.Tensor) -> torch.Tensor:
        return own_forward(self, x)

    def _attends_as_the_op(self) -> bool:
        attend: Any = self._modules["attend"]
        if not is_unchanged(attend, _ATTEND) or attend.scale is not None:
            return False
        dropout: Any = attend._modules["attn_dropout"]
        active = dropout.training and dropout.p > 0 or attend.training and attend.dropout > 0
        return is_instance(dropout, nn.Dropout) and not active


class _LinearAttentionOfClasses(classifier_free_unet.LinearAttention):
    low_memory = False
    forward = _LinearAttention._by_modules
    _by_modules = _LinearAttention._by_modules

    @property
    def mem_kv(self) -> Any:  # type: ignore[override]
        weight = self.to_qkv.weight
        return weight.new_empty(2, self.heads, weight.shape[0] // (3 * self.heads), 0)


class _AttentionOfClasses(classifier_free_unet.Attention):
    forward = _Attention._by_modules
    _by_modules = _Attention._by_modules

    @property
    def mem_kv(self) -> Any:  # type: ignore[override]
        weight = self.to_qkv.weight
        return weight.new_empty(2, self.heads, 0, weight.shape[0] // (3 * self.heads))


class _Network(Replayed, UnetBase):
    """What both networks share; no weight is moved or laid out."""

    def _recorded_calls(self) -> RecordedCalls | None:
        return recorded_calls(self)

    def untrusted_part(self) -> str | None:
        """For recordings of whole steps: the network runs by the code of ours."""
        return untrusted_module(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return nn.Module._apply(self, fn, recurse)

    def _fits(self, x: Any, time: Any) -> bool:
        """True for inputs that upstream's network takes and ours does, too; its own forward takes or refuses others."""
        if not isinstance(x, torch.Tensor) or not isinstance(time, torch.Tensor) or x.ndim != 4:
            return False
        weight, factor = self._weight, self.downsample_factor
        return (
            x.shape[1] == self.channels
            and x.shape[2] % factor == 0
            and x.shape[3] % factor == 0
            and time.shape == x.shape[:1]
            and x.device == weight.device == time.device
            and (x.dtype == weight.dtype or autocast_dtype(x.device.type) is not None)
        )


class _Unet(_Network):
    def forward(self, x: torch.Tensor, time: torch.Tensor, x_self_cond: torch.Tensor | None = None) -> torch.Tensor:
        if not self._fits(x, time):
            return own_forward(self, x, time, x_self_cond)
        maps = [x]
        if self.self_condition:
            maps = [torch.zeros_like(x) if x_self_cond is None else x_self_cond, x]
        return self._call(maps, time, GivenConditions())


class _UnetOfClasses(_Network):
    @property
    def num_classes(self) -> int:  # type: ignore[override]
        return self.classes_emb.weight.shape[0]

    def _attend(self, attn: Any, x: torch.Tensor) -> torch.Tensor:
        return attn(x)

    def _class_embedding(self, given: GivenConditions) -> torch.Tensor:
        if given.keep_mask is None and torch.is_grad_enabled():
            return self.classes_mlp(self.classes_emb(given.classes))  # the null class gets no gradient
        return super()._class_embedding(given)

    def _are_classes(self, classes: torch.Tensor, x: torch.Tensor) -> bool:
        if classes.shape != x.shape[:1] or classes.dtype != torch.int64 or classes.device != x.device:
            return False
        if classes.numel() == 0 or not may_read(classes):  # on CUDA the host would wait for the device
            return True
        least, most = classes.aminmax()
        return 0 <= int(least) and int(most) < self.num_classes

    def forward(
        self,
        x: torch.Tensor,
        time: torch.Tensor,
        classes: torch.Tensor,
        cond_drop_prob: float | None = None,
        cond_keep_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not self._fits(x, time) or not self._are_classes(classes, x):
            return own_forward(self, x, time, classes, cond_drop_prob, cond_keep_mask)
        keep = cond_keep_mask
        rate = self.cond_drop_prob if cond_drop_prob is None else cond_drop_prob
        if keep is None and rate > 0:
            keep = classifier_free_unet.random_mask(x.shape[0], 1 - rate, x.device)
        return self._call([x], time, GivenConditions(classes, keep_mask=keep))


_SEQUENTIAL = "torch.nn.modules.container.Sequential"
_TIME_MLP = Fast(_SEQUENTIAL, "time_mlp", mixin=embeddings.TimeMLP, stands_for=embeddings.TimeMLP)
_CLASSES_MLP = Fast(_SEQUENTIAL, "classes_mlp", mixin=embeddings.CondMLP, stands_for=embeddings.CondMLP)


def _inside(network: Any) -> Iterable[tuple[nn.Module, Fast]]:
    yield network.time_mlp, _TIME_MLP
    if hasattr(network, "classes_mlp"):
        yield network.classes_mlp, _CLASSES_MLP


for _place in (_TIME_MLP, _CLASSES_MLP):
    declare(_place, anywhere=False)

knows_package("denoising_diffusion_pytorch", "einops")

_BLOCKS: tuple[tuple[str, str, str, type, type], ...] = (
    (_FILE, "RMSNorm", "rms_norm_silu", norm.RMSNorm, norm.RMSNorm),
    (_FILE, "SinusoidalPosEmb", "time_mlp", embeddings.SinusoidalPosEmb, embeddings.SinusoidalPosEmb),
    (_FILE, "Block", "resnet_block", _Block, resnet.Block),
    (_FILE, "ResnetBlock", "resnet_block", _ResnetBlock, resnet.ResnetBlock),
    (_FILE, "LinearAttention", "linear_attention_block", _LinearAttention, attention.LinearAttention),
    (_FILE, "Attention", "attention_block", _Attention, attention.Attention),
    (_FILE_OF_CLASSES, "RMSNorm", "rms_norm_silu", _RMSNormOfClasses, norm.RMSNorm),
    (_FILE_OF_CLASSES, "SinusoidalPosEmb", "time_mlp", _SinusoidalPosEmb, embeddings.SinusoidalPosEmb),
    (_FILE_OF_CLASSES, "Block", "resnet_block", _Block, resnet.Block),
    (_FILE_OF_CLASSES, "ResnetBlock", "resnet_block", _ResnetBlock, resnet.ResnetBlock),
    (_FILE_OF_CLASSES, "LinearAttention", "linear_attention_block", _LinearAttentionOfClasses,
     classifier_free_unet.LinearAttention),
    (_FILE_OF_CLASSES, "Attention", "attention_block", _AttentionOfClasses, classifier_free_unet.Attention),
    (_FILE_OF_CLASSES, "PreNorm", "rms_norm_silu", classifier_free_unet.PreNorm, classifier_free_unet.PreNorm),
    (_FILE_OF_CLASSES, "Residual", "a residual block of attention", classifier_free_unet.Residual,
     classifier_free_unet.Residual),
)  # fmt: skip
for _file, _name, _runs, _mixin, _stands_for in _BLOCKS:
    declare(Fast(f"{_file}.{_name}", _runs, mixin=_mixin, stands_for=_stands_for))
for _file, _network in ((_FILE, _Unet), (_FILE_OF_CLASSES, _UnetOfClasses)):
    declare(Fast(f"{_file}.Unet", "Unet", mixin=_network, inside=_inside, is_network=True))
