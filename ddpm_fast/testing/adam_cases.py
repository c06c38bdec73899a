"""Cases of adam_step, and their comparison with torch.optim over several steps."""

from __future__ import annotations

from typing import Any

import torch

from ddpm_fast.ops.adam_step.op import AdamSettings, Tables, adam_step
from ddpm_fast.runtime import triton_launch
from ddpm_fast.training.optimizer_step import OptimizerStep

# Of one element, none, less than a block, more than a block and than a chunk; odd and even.
SHAPES = [(1,), (0, 3), (64, 3, 3, 3), (1025,), (33, 250), (20, 16, 5, 5)]
STEPS = 3

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": dict(max_grad_norm=0.5),
    "not clipped": dict(max_grad_norm=1e6),
    "weight decay": dict(weight_decay=0.1),
    "AdamW": dict(weight_decay=0.1, decoupled=True, max_grad_norm=1.0),
    "average": dict(average_weight=0.005),
    "average near its end": dict(average_weight=0.9),
    "average at rest": dict(average_weight=0.0),
    "average copied": dict(average_weight=None, with_average=True),
    "bf16 copies": dict(copy_dtype=torch.bfloat16),
    "fp16 copies and average": dict(copy_dtype=torch.float16, average_weight=0.1),
    "scaled": dict(grad_scale=2.0**16, max_grad_norm=0.5),
    "scaled, one step skipped": dict(grad_scale=2.0**16, max_grad_norm=0.5, bad_step=1, average_weight=0.3),
    "two groups": dict(groups=2, weight_decay=0.05, max_grad_norm=1.0),
    "other betas": dict(betas=(0.5, 0.99), eps=1e-3),
    "no momentum": dict(betas=(0.0, 0.99), lr=1e-3),
    "channels-last": dict(channels_last=True, copy_dtype=torch.bfloat16, average_weight=0.1),
    "bf16 gradients": dict(half_grads=torch.bfloat16, copy_dtype=torch.bfloat16, max_grad_norm=0.5, average_weight=0.1),
    "fp16 gradients": dict(half_grads=torch.float16, grad_scale=2.0**8, bad_step=1, weight_decay=0.1),
    "bf16 gradients, unaligned": dict(half_grads=torch.bfloat16, unaligned=True, max_grad_norm=0.5),
    "bf16 gradients in another layout": dict(half_grads=torch.bfloat16, channels_last=True, grads_contiguous=True),
    "gradients in another layout": dict(channels_last=True, grads_contiguous=True),
    "unaligned": dict(unaligned=True, copy_dtype=torch.bfloat16),
    "late": dict(first_step=100_000),
}


Tensors = list[torch.Tensor]
Lists = tuple[Tensors, Tensors, Tensors, Tensors, Tensors]


class Model:
    """Parameters with gradients and Adam's state."""

    def __init__(
        self,
        device: str,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        unaligned: bool = False,
        first_step: int = 0,
        half_grads: torch.dtype | None = None,
    ):
        self.generator = torch.Generator().manual_seed(0)
        self.half_grads = half_grads

        def place(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.to(device, dtype if tensor.dtype is torch.float32 else tensor.dtype)
            if channels_last and tensor.ndim == 4:
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            if unaligned:  # one element after an aligned address
                memory = torch.empty(tensor.numel() + 1, device=device, dtype=tensor.dtype)[1:]
                tensor = memory.view(tensor.shape).copy_(tensor)
            return tensor

        self.place = place
        self.params = [place(torch.randn(shape, generator=self.generator)) for shape in SHAPES]
        self.exp_avgs = [place(torch.zeros(shape)) for shape in SHAPES]
        self.exp_avg_sqs = [place(torch.zeros(shape)) for shape in SHAPES]
        self.steps = [torch.tensor(float(first_step), device=device) for _ in SHAPES]
        self.grads: list[torch.Tensor] = []
        self.draw()

    def draw(self) -> None:
        """New gradients, every second in the half type if there is one."""
        drawn = [torch.randn(shape, generator=self.generator) for shape in SHAPES]
        if self.half_grads is not None:
            drawn[::2] = [grad.to(self.half_grads) for grad in drawn[::2]]
        self.grads = [self.place(grad) for grad in drawn]

    @property
    def lists(self) -> Lists:
        return self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.steps


def assert_same_as_torch(
    device: str,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    lr: float = 1e-2,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    groups: int = 1,
    max_grad_norm: float | None = None,
    average_weight: float | None = None,
    with_average: bool = False,
    copy_dtype: torch.dtype | None = None,
    grad_scale: float | None = None,
    bad_step: int | None = None,
    grads_contiguous: bool = False,
    **model_options: Any,
) -> None:
    """Several steps of adam_step and of torch.optim's Adam in float64, from the same gradients."""
    model = Model(device, **model_options)
    truth: Tensors = [torch.nn.Parameter(p.double().clone()) for p in model.params]
    optimizer_class = torch.optim.AdamW if decoupled else torch.optim.Adam
    size = len(truth) // groups
    members = [{"params": truth[i * size : (i + 1) * size], "lr": lr * (i + 1)} for i in range(groups)]
    optimizer = optimizer_class(members, betas=betas, eps=eps, weight_decay=weight_decay)
    if model_options.get("first_step"):
        for p in truth:
            state = {"step": torch.tensor(float(model_options["first_step"]))}
            optimizer.state[p] = state | {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    settings = [
        AdamSettings(size, torch.tensor(lr * (i + 1), device=device), *betas, eps, weight_decay, decoupled)
        for i in range(groups)
    ]
    options: dict[str, Any] = {"max_grad_norm": max_grad_norm, "tables": Tables()}
    averages = None
    if average_weight is not None or with_average:
        averages = options["averages"] = [torch.randn_like(p) for p in model.params]
        weight = None if average_weight is None else torch.tensor(average_weight, device=device)
        options["average_weight"] = weight
    if copy_dtype is not None:
        options["copies"] = [torch.empty_like(p, dtype=copy_dtype) for p in model.params]
        if model_options.get("unaligned"):
            options["copies"] = [model.place(p).to(copy_dtype) for p in model.params]
    if grad_scale is not None:
        options["grad_scale"] = torch.tensor(grad_scale, device=device)
    true_averages = None if averages is None else [a.double() for a in averages]

    for step in range(STEPS):
        model.draw()
        for parameter, grad in zip(truth, model.grads, strict=True):
            parameter.grad = grad.double()
        if grad_scale is not None:
            model.grads = [g * grad_scale for g in model.grads]
        if step == bad_step:
            model.grads[2].view(-1)[7] = float("inf")
        if grads_contiguous:
            model.grads = [g.contiguous() for g in model.grads]
        kept = [g.clone() for g in model.grads]
        norm, skipped = adam_step(*model.lists, settings, **options)
        assert all(torch.equal(a, b) for a, b in zip(kept, model.grads, strict=True))
        if step == bad_step:
            assert skipped == 1 and not torch.isfinite(norm)
        else:
            expected = torch.nn.utils.clip_grad_norm_(truth, max_grad_norm or float("inf"))
            torch.testing.assert_close(norm.double(), expected, rtol=1e-5, atol=0)
            assert skipped == 0
            optimizer.step()
        if true_averages is not None:
            for average, parameter in zip(true_averages, truth, strict=True):
                average.lerp_(parameter.detach(), 1.0 if average_weight is None else average_weight)
        states = [optimizer.state[p] for p in truth]
        for name, found, true in (
            ("p", model.params, [p.detach() for p in truth]),
            ("exp_avg", model.exp_avgs, [s["exp_avg"] for s in states]),
            ("exp_avg_sq", model.exp_avg_sqs, [s["exp_avg_sq"] for s in states]),
        ):
            for one, other in zip(found, true, strict=True):
                torch.testing.assert_close(one.double(), other, rtol=5e-6, atol=5e-7, msg=f"{name}, step {step}")
        assert [float(s) for s in model.steps] == [float(s["step"]) for s in states]
        if averages is not None and true_averages is not None:
            for average, p, true in zip(averages, model.params, true_averages, strict=True):
                torch.testing.assert_close(average.double(), true, rtol=5e-6, atol=5e-7)
                assert average_weight is not None or torch.equal(average, p)
        for copy, p in zip(options.get("copies", ()), model.params, strict=False):
            if copy.dtype is torch.bfloat16 and triton_launch.interpreted():  # which cuts digits off
                torch.testing.assert_close(copy.float(), p, rtol=2**-7, atol=1e-30)
            else:
                assert torch.equal(copy, p.to(copy.dtype))


def move_weights(optimizer: torch.optim.Optimizer, max_grad_norm: float | None = None) -> None:
    """Clipping and a step of Adam in the bits of a `TrainingStep`, which test_optimizer_step.py compares with torch."""
    step = OptimizerStep(optimizer)
    if step.why_not() is None:
        step(max_grad_norm=max_grad_norm)
        return
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], max_grad_norm)
    optimizer.step()
