"""Meta tensors that behave as tensors of a CUDA device do: nothing is computed, and every choice is the GPU's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ddpm_fast.measure.traffic import kernels_take_meta_tensors

META = torch.device("meta")

# Functions whose tensors autocast casts on CUDA, of those that the networks call.
_CAST = (
    F.conv1d,
    F.conv2d,
    F.conv_transpose2d,
    F.linear,
    torch.conv2d,
    torch.conv_transpose2d,
    torch.matmul,
    torch.einsum,
    torch.Tensor.matmul,
)


class _Autocast(TorchFunctionMode):
    """torch.autocast for meta tensors, which torch knows none for."""

    dtype: torch.dtype | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.dtype is not None and func in _CAST:
            args = [self._cast(value) for value in args]
            kwargs = {name: self._cast(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _cast(self, value):
        narrow = isinstance(value, torch.Tensor) and value.is_meta and value.dtype == torch.float32
        return value.to(self.dtype) if narrow else value

    @contextlib.contextmanager
    def region(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, cache_enabled=None):
        """Replaces torch.autocast; it casts at every use, as autocast does without its cache."""
        if device_type != "meta":
            with _real_autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled):
                yield
            return
        before, self.dtype = self.dtype, (dtype or torch.bfloat16) if enabled else None
        try:
            yield
        finally:
            self.dtype = before


_real_autocast = torch.autocast
_real_attention, _real_dropout = F.scaled_dot_product_attention, F.dropout


def _dropout(input, p=0.5, training=True, inplace=False):
    """torch's dropout as its one kernel on CUDA."""
    if not input.is_meta or not training or not 0 < p < 1 or inplace:
        return _real_dropout(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options):
    """torch's attention as its one kernel on CUDA; meta tensors would take the products and the softmax one by one."""
    if not query.is_meta or attn_mask is not None or dropout_p or is_causal or options.get("enable_gqa"):
        return _real_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, None, needs_grad, scale=scale)[0]


@contextlib.contextmanager
def cuda_on_meta() -> Iterator[None]:
    """Inside, meta tensors take the code path of CUDA tensors: our kernels, autocast, fused and foreach optimizers."""
    autocast = _Autocast()
    is_available, is_enabled = torch.amp.is_autocast_available, torch.is_autocast_enabled
    dtype_of = torch.get_autocast_dtype
    foreach = torch.utils._foreach_utils._get_foreach_kernels_supported_devices()
    fused = torch.utils._foreach_utils._get_fused_kernels_supported_devices()
    patches = (
        mock.patch.object(torch, "autocast", autocast.region),
        mock.patch.object(F, "scaled_dot_product_attention", _attention),
        mock.patch.object(F, "dropout", _dropout),
        mock.patch.object(torch.amp, "autocast", autocast.region),  # torch's checkpoint
        mock.patch.object(torch.amp, "is_autocast_available", lambda kind: kind == "meta" or is_available(kind)),
        mock.patch.object(
            torch,
            "is_autocast_enabled",
            lambda kind="cuda": autocast.dtype is not None if kind == "meta" else is_enabled(kind),
        ),
        mock.patch.object(
            torch, "get_autocast_dtype", lambda kind: autocast.dtype if kind == "meta" else dtype_of(kind)
        ),
        mock.patch("torch.utils._foreach_utils._get_foreach_kernels_supported_devices", lambda: [*foreach, "meta"]),
        mock.patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: [*fused, "meta"]),
    )
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(kernels_take_meta_tensors())
        stack.enter_context(autocast)
        yield


class Undrawn(TorchFunctionMode):
    """Inside, random numbers are not drawn: a meta tensor of the same shape and dtype replaces them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.randn, torch.rand):
            kwargs = {name: value for name, value in kwargs.items() if name not in ("generator", "device")}
            return func(*args, **kwargs, device=META)
        return func(*args, **kwargs)
