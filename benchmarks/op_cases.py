"""The list of op cases that the benchmarks time and the tests hold equal: one list, three sizes.

`full`: the shapes of Unet(64, (1, 2, 4, 8)) on 32 images of 128×128; `cpu`: the same on one image; `quick`: small odd
shapes that run every code path. To add an op: a function that makes `Inputs`, and a line in `op_cases`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

from ddpm_fast import noise
from ddpm_fast.diffusion import samplers, schedules
from ddpm_fast.diffusion.levels import TARGETS
from ddpm_fast.ops.attention.op import attention
from ddpm_fast.ops.forward_diffusion.op import diffusion_loss, q_sample
from ddpm_fast.ops.linear_attention.op import linear_attention
from ddpm_fast.ops.linear_attention_block.op import linear_attention_block
from ddpm_fast.ops.noise.op import fill_normal_
from ddpm_fast.ops.norm_linear.op import norm_linear
from ddpm_fast.ops.norm_silu.op import group_norm_silu, rms_norm_silu
from ddpm_fast.ops.resnet_block.op import resnet_block
from ddpm_fast.ops.sampler_step.op import sampler_step_
from ddpm_fast.ops.variational_bound.op import variational_bound
from ddpm_fast.runtime.measured import FUSED, SEPARATE, use_form
from ddpm_fast.testing.variational_bound_cases import as_written, make_table

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TIMESTEPS = 100

# Size → images (B, C, H, W), and per stage of the network (B, C, H, W).
IMAGES = {"full": (32, 3, 128, 128), "cpu": (4, 3, 128, 128), "quick": (2, 3, 5, 7)}
STAGES = {
    "full": [(32, 64, 128, 128), (32, 128, 64, 64), (32, 256, 32, 32), (32, 512, 16, 16)],
    "cpu": [(1, 64, 128, 128), (1, 512, 16, 16)],
    "quick": [(2, 24, 5, 7)],
}


@dataclass
class Inputs:
    """An op on given tensors.

    Args:
        call: our op, through dispatch; its result is the output.
        eager: the same numbers by the operators that upstream runs.
        leaves: tensors that take a gradient; empty where the op has none.
        others: further implementations of the same numbers and gradients, by name, each with its own leaves.
        fresh: called before each check: restores what `call` overwrites.
        comparable: False where `eager` draws its own random numbers.
        flops: of matrix products in the forward pass; a multiply-add is two.
        read_again: of `reads`, what the least backward reads; None: all of them.
        written: tensors whose gradients the least backward writes; None: all leaves. The gradient of a residual is the
            output's own and costs nothing.
    """

    call: Callable[[], torch.Tensor]
    eager: Callable[[], torch.Tensor] | None
    reads: list[torch.Tensor]
    leaves: list[torch.Tensor] = field(default_factory=list)
    others: dict[str, tuple[Callable[[], torch.Tensor], list[torch.Tensor]]] = field(default_factory=dict)
    fresh: Callable[[], None] = lambda: None
    comparable: bool = True
    flops: int = 0
    read_again: list[torch.Tensor] | None = None
    written: list[torch.Tensor] | None = None


@dataclass(frozen=True)
class OpCase:
    """A named case; `make(device, dtype, compute)` draws float32 numbers, rounds them to dtype, and hands them over as
    `compute` (float64 for the truth)."""

    op: str
    shape: tuple[int, ...]
    make: Callable[[tuple[int, ...], torch.device, torch.dtype, torch.dtype], Inputs]
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    compiled: bool = False
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{self.op}{self.variant}-{'x'.join(map(str, self.shape))}"


class _Draw:
    """Random tensors of a case, drawn on its device: there the same numbers in every dtype, up to rounding."""

    def __init__(self, device: torch.device, dtype: torch.dtype, compute: torch.dtype):
        # Meta tensors have no numbers, and no generator.
        self.generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
        self.device, self.dtype, self.compute = device, dtype, compute

    def normal(self, *shape: int, full: bool = False, channels_last: bool = False) -> torch.Tensor:
        """Normal numbers in the case's dtype; `full`: in float32, as parameters are under autocast."""
        x = torch.randn(*shape, generator=self.generator, device=self.device)
        rounded = x if full else x.to(self.dtype)
        wide = torch.float64 if self.compute == torch.float64 else torch.float32 if full else self.compute
        x = rounded.to(wide)
        return x.contiguous(memory_format=torch.channels_last) if channels_last else x

    def uniform(self, *shape: int) -> torch.Tensor:
        wide = torch.float64 if self.compute == torch.float64 else torch.float32
        return torch.rand(*shape, generator=self.generator, device=self.device).to(wide)


def _schedule() -> schedules.Schedule:
    return schedules.Schedule(schedules.make_betas("cosine", TIMESTEPS))


def _noise(shape, device, dtype, compute) -> Inputs:
    out = torch.empty(shape, dtype=compute, device=device)
    seed = noise.seed_tensor(3, device)
    return Inputs(lambda: fill_normal_(out, seed, stream=0), lambda: torch.randn_like(out), reads=[], comparable=False)


def _sampler_step(shape, device, dtype, compute, own_noise: bool = False) -> Inputs:
    draw = _Draw(device, dtype, compute)
    wide = torch.float64 if compute == torch.float64 else torch.float32
    start, output, epsilon = draw.uniform(*shape), draw.normal(*shape), draw.normal(*shape, full=True)
    table = samplers.sampler_table(_schedule(), TARGETS["pred_v"], "ddpm", TIMESTEPS).table.to(
        device=device, dtype=wide
    )
    step, seed = torch.tensor([TIMESTEPS // 2], device=device), noise.seed_tensor(3, device)
    x = start.clone()
    p, q, r, s, _, sigma = (column.reshape(1, 1, 1, 1) for column in table[TIMESTEPS // 2])

    def eager() -> torch.Tensor:
        x_start = (p * x + q * output).clamp_(-1.0, 1.0)
        return r * x_start + s * x + sigma * (torch.randn_like(x) if own_noise else epsilon)

    given = None if own_noise else epsilon
    return Inputs(
        lambda: sampler_step_(x, output, table, step, seed, noise=given), eager,
        reads=[x, output] if own_noise else [x, output, epsilon],
        fresh=lambda: x.copy_(start), comparable=not own_noise,
    )  # fmt: skip


def _q_sample(shape, device, dtype, compute) -> Inputs:
    draw = _Draw(device, dtype, compute)
    x_start, epsilon = draw.uniform(*shape), draw.normal(*shape, full=True)
    t = torch.arange(shape[0], device=device) % TIMESTEPS
    table = schedules.forward_table(_schedule()).to(device=device, dtype=x_start.dtype)

    def eager() -> torch.Tensor:
        a, b = (table[:, i].gather(-1, t).reshape(-1, 1, 1, 1) for i in range(2))
        return (a * x_start + b * epsilon).to(compute)

    return Inputs(lambda: q_sample(x_start, t, table, epsilon, dtype=compute), eager, reads=[x_start, epsilon])


def _diffusion_loss(shape, device, dtype, compute) -> Inputs:
    draw = _Draw(device, dtype, compute)
    output = draw.normal(*shape).requires_grad_()
    x_start, epsilon = draw.uniform(*shape), draw.normal(*shape, full=True)
    t = torch.arange(shape[0], device=device) % TIMESTEPS
    table = schedules.loss_table(_schedule(), "pred_v", torch.ones(TIMESTEPS)).to(device=device, dtype=x_start.dtype)

    def eager() -> torch.Tensor:
        c, d, w = (table[:, i].gather(-1, t) for i in range(3))
        target = c.reshape(-1, 1, 1, 1) * epsilon + d.reshape(-1, 1, 1, 1) * x_start
        return F.mse_loss(output.to(target.dtype), target, reduction="none").flatten(1).mean(1) * w

    return Inputs(
        lambda: diffusion_loss(output, x_start, t, table, epsilon), eager,
        reads=[output, x_start, epsilon], leaves=[output],
    )  # fmt: skip


def _variational_bound(shape, device, dtype, compute) -> Inputs:
    """Without t = 0: torch takes the difference of the decoder's cdfs, which cancels in float32."""
    draw, (B, C, H, W) = _Draw(device, dtype, compute), shape
    output = draw.normal(B, 2 * C, H, W).requires_grad_()
    x_start, epsilon = draw.uniform(*shape), draw.normal(*shape, full=True)
    t = 1 + torch.arange(B, device=device) % (TIMESTEPS - 1)
    table = make_table("pred_noise", TIMESTEPS).to(device=device, dtype=x_start.dtype)

    def eager() -> torch.Tensor:
        means = as_written(output.to(x_start.dtype), x_start, t, table, epsilon)
        return (table[t][:, [4, 13]] * means).sum(1)

    return Inputs(
        lambda: variational_bound(output, x_start, t, table, epsilon), eager,
        reads=[output, x_start, epsilon], leaves=[output],
    )  # fmt: skip


def _rms_norm_silu(shape, device, dtype, compute) -> Inputs:
    draw, (B, C, _, _) = _Draw(device, dtype, compute), shape
    x = draw.normal(*shape, channels_last=True).requires_grad_()
    g = (1 + 0.3 * draw.normal(1, C, 1, 1, full=True)).requires_grad_()
    scale, shift = (draw.normal(B, C).requires_grad_() for _ in range(2))
    plain = x.detach().contiguous().requires_grad_()

    def eager(x: torch.Tensor) -> torch.Tensor:
        y = F.normalize(x, dim=1) * g.to(x.dtype) * C**0.5
        return F.silu(y * (scale[:, :, None, None] + 1) + shift[:, :, None, None])

    return Inputs(
        lambda: rms_norm_silu(x, g, scale=scale, shift=shift), lambda: eager(x), reads=[x, scale, shift],
        leaves=[x, g, scale, shift], others={"eager NCHW": (lambda: eager(plain), [plain, g, scale, shift])},
    )  # fmt: skip


def _group_norm_silu(shape, device, dtype, compute) -> Inputs:
    draw, (_, C, _, _) = _Draw(device, dtype, compute), shape
    x = draw.normal(*shape, channels_last=True).requires_grad_()
    residual = draw.normal(*shape, channels_last=True).requires_grad_()
    gain, offset = (draw.normal(C, full=True).requires_grad_() for _ in range(2))
    plain = x.detach().contiguous().requires_grad_()

    def torch_of(y: torch.Tensor) -> torch.Tensor:
        return F.silu(F.group_norm(y, 8, gain.to(y.dtype), offset.to(y.dtype))) + residual

    return Inputs(
        lambda: group_norm_silu(x, gain, offset, groups=8, residual=residual), lambda: torch_of(x),
        reads=[x, residual], leaves=[x, gain, offset, residual], read_again=[x], written=[x, gain, offset],
        # Where torch has a channels-last kernel, `eager` runs it; this is the layout that it has been written for.
        others={"eager NCHW": (lambda: torch_of(plain), [plain, gain, offset, residual])},
    )  # fmt: skip


def _heads_of(channels: int) -> tuple[int, int]:
    """Heads and their dimensions: the network's 4 of 32, and odd ones for the small cases."""
    return (4, 32) if channels >= 64 else (3, 10)


def _split(qkv: torch.Tensor, heads: int, D: int) -> tuple[torch.Tensor, ...]:
    """Upstream's q, k, v (B, heads, D, N) of a map."""
    return qkv.reshape(qkv.shape[0], 3, heads, D, -1).unbind(1)


def _attention(shape, device, dtype, compute) -> Inputs:
    draw, (B, C, H, W) = _Draw(device, dtype, compute), shape
    heads, D = _heads_of(C)
    qkv = draw.normal(B, 3 * heads * D, H, W, channels_last=True).requires_grad_()
    mem_kv = draw.normal(2, heads, 4, D, full=True).requires_grad_()

    def eager() -> torch.Tensor:
        q, k, v = (x.transpose(-1, -2) for x in _split(qkv, heads, D))
        mk, mv = mem_kv.to(qkv.dtype)[:, None].expand(-1, B, -1, -1, -1)
        k, v = torch.cat((mk, k), dim=-2), torch.cat((mv, v), dim=-2)
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(-1, -2).reshape(B, heads * D, H, W)

    return Inputs(
        lambda: attention(qkv, mem_kv, heads=heads), eager, reads=[qkv], leaves=[qkv, mem_kv],
        flops=4 * B * heads * H * W * (H * W + 4) * D,
    )  # fmt: skip


def _linear_attention(shape, device, dtype, compute) -> Inputs:
    draw, (B, C, H, W) = _Draw(device, dtype, compute), shape
    heads, D = _heads_of(C)
    hidden = heads * D
    qkv = draw.normal(B, 3 * hidden, H, W, channels_last=True).requires_grad_()
    residual = draw.normal(B, C, H, W, channels_last=True).requires_grad_()
    mem_kv = draw.normal(2, heads, D, 4, full=True).requires_grad_()
    weight = (draw.normal(C, hidden, 1, 1) * hidden**-0.5).requires_grad_()
    bias = draw.normal(C).requires_grad_()
    g = (1 + 0.3 * draw.normal(1, C, 1, 1, full=True)).requires_grad_()

    def eager() -> torch.Tensor:
        q, k, v = _split(qkv, heads, D)
        mk, mv = mem_kv.to(qkv.dtype)[:, None].expand(-1, B, -1, -1, -1)
        k, v = torch.cat((mk, k), dim=-1).softmax(dim=-1), torch.cat((mv, v), dim=-1)
        q = q.softmax(dim=-2) * D**-0.5
        context = torch.einsum("bhdn,bhen->bhde", k, v)
        out = torch.einsum("bhde,bhdn->bhen", context, q).reshape(B, hidden, H, W)
        y = F.conv2d(out, weight, bias)
        return F.normalize(y, dim=1) * g.to(y.dtype) * C**0.5 + residual

    return Inputs(
        lambda: linear_attention(qkv, mem_kv, weight, bias, g, heads=heads, residual=residual), eager,
        reads=[qkv, residual], leaves=[qkv, mem_kv, weight, bias, g, residual],
        read_again=[qkv], written=[qkv, mem_kv, weight, bias, g],
        flops=2 * B * H * W * hidden * (D + C),
    )  # fmt: skip


def _linear_attention_block(shape, device, dtype, compute) -> Inputs:
    draw, (B, C, H, W) = _Draw(device, dtype, compute), shape
    heads, D = _heads_of(C)
    hidden = heads * D
    x = draw.normal(*shape, channels_last=True).requires_grad_()
    g_in, g = ((1 + 0.3 * draw.normal(1, C, 1, 1, full=True)).requires_grad_() for _ in range(2))
    weight_qkv = (draw.normal(3 * hidden, C, 1, 1) * C**-0.5).requires_grad_()
    mem_kv = draw.normal(2, heads, D, 4, full=True).requires_grad_()
    weight = (draw.normal(C, hidden, 1, 1) * hidden**-0.5).requires_grad_()
    bias = draw.normal(C).requires_grad_()

    def eager() -> torch.Tensor:
        qkv = F.conv2d(F.normalize(x, dim=1) * g_in.to(x.dtype) * C**0.5, weight_qkv)
        q, k, v = _split(qkv, heads, D)
        mk, mv = mem_kv.to(qkv.dtype)[:, None].expand(-1, B, -1, -1, -1)
        k, v = torch.cat((mk, k), dim=-1).softmax(dim=-1), torch.cat((mv, v), dim=-1)
        context = torch.einsum("bhdn,bhen->bhde", k, v)
        out = torch.einsum("bhde,bhdn->bhen", context, q.softmax(dim=-2) * D**-0.5).reshape(B, hidden, H, W)
        y = F.conv2d(out, weight, bias)
        return F.normalize(y, dim=1) * g.to(y.dtype) * C**0.5 + x

    leaves = [x, g_in, weight_qkv, mem_kv, weight, bias, g]
    return Inputs(
        lambda: linear_attention_block(*leaves, heads=heads, residual=x), eager, reads=[x], leaves=leaves,
        read_again=[x], written=leaves, flops=8 * B * H * W * hidden * C,
    )  # fmt: skip


def _norm_linear(shape, device, dtype, compute) -> Inputs:
    draw, (_, C, H, W) = _Draw(device, dtype, compute), shape
    hidden = math.prod(_heads_of(C))
    x = draw.normal(*shape, channels_last=True).requires_grad_()
    g = (1 + 0.3 * draw.normal(1, C, 1, 1, full=True)).requires_grad_()
    weight = (draw.normal(3 * hidden, C, 1, 1) * C**-0.5).requires_grad_()

    def eager() -> torch.Tensor:
        return F.conv2d(F.normalize(x, dim=1) * g.to(x.dtype) * C**0.5, weight)

    return Inputs(
        lambda: norm_linear(x, g, weight), eager, reads=[x], leaves=[x, g, weight],
        flops=2 * shape[0] * H * W * C * 3 * hidden,
    )  # fmt: skip


def _resnet_block(shape, device, dtype, compute) -> Inputs:
    """A block without a skip connection, and with Triton both forms of its convolutions and norms."""
    draw, (B, C, H, W) = _Draw(device, dtype, compute), shape
    x = draw.normal(*shape, channels_last=True).requires_grad_()
    weights = [(draw.normal(C, C, 3, 3, channels_last=True) * (9 * C) ** -0.5).requires_grad_() for _ in range(2)]
    biases = [draw.normal(C).requires_grad_() for _ in range(2)]
    gains = [(1 + 0.3 * draw.normal(1, C, 1, 1, full=True)).requires_grad_() for _ in range(2)]
    scale, shift = ((0.3 * draw.normal(B, C)).requires_grad_() for _ in range(2))
    rows = [row for i in range(2) for row in (weights[i], biases[i], gains[i])]
    leaves = [x, *rows, scale, shift]

    def norm(y: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return F.normalize(y, dim=1) * gain.to(y.dtype) * C**0.5

    def eager() -> torch.Tensor:
        h = norm(F.conv2d(x, weights[0], biases[0], padding=1), gains[0])
        h = F.silu(h * (scale[:, :, None, None] + 1) + shift[:, :, None, None])
        return F.silu(norm(F.conv2d(h, weights[1], biases[1], padding=1), gains[1])) + x

    def call() -> torch.Tensor:
        return resnet_block(x, *rows, scale=scale, shift=shift)

    def formed(form: str) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with use_form(form):
                return call()

        return run

    others = {form: (formed(form), leaves) for form in (FUSED, SEPARATE)} if device.type == "cuda" else {}
    return Inputs(call, eager, reads=[x], leaves=leaves, others=others, flops=36 * B * C * C * H * W)


def size_of(config) -> str:
    """The size that pytest's options ask for, by default the device's; known when tests are collected."""
    on_cuda = config.getoption("--device") == "cuda" or (
        config.getoption("--device") is None and torch.cuda.is_available()
    )
    return config.getoption("--size") or ("full" if on_cuda else "cpu")


def op_cases(size: str) -> list[OpCase]:
    """All cases of a size: "full", "cpu" or "quick"."""
    images, stages = IMAGES[size], STAGES[size]
    cases = [
        OpCase("fill_normal_", images, _noise),
        OpCase("sampler_step_", images, _sampler_step),
        OpCase("sampler_step_", images, partial(_sampler_step, own_noise=True), compiled=True, variant="+noise"),
        OpCase("q_sample", images, _q_sample),
        OpCase("diffusion_loss", images, _diffusion_loss),
        OpCase("variational_bound", images, _variational_bound),
    ]
    for i, stage in enumerate(stages):
        pixels = stage[2] * stage[3]
        cases.append(OpCase("norm_linear", stage, _norm_linear))
        if pixels <= 1024:  # the network's stages of full attention, and the one below, to find where ours loses
            cases.append(OpCase("attention", stage, _attention))
        if stage[1] < 512 or size != "full":
            cases.append(OpCase("linear_attention", stage, _linear_attention))
            cases.append(OpCase("linear_attention_block", stage, _linear_attention_block))
        if stage[1] <= 128:  # where convolutions have norms inside
            cases.append(OpCase("resnet_block", stage, _resnet_block, dtypes=("bf16",)))
        cases.append(OpCase("rms_norm_silu", stage, _rms_norm_silu, compiled=i == 0))
        cases.append(OpCase("group_norm_silu", stage, _group_norm_silu))
    return cases
