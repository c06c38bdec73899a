"""adam_step's reference and its native code against torch.optim, and its checks."""

from __future__ import annotations

import pytest
import torch

from ddpm_fast.ops.adam_step.op import AdamSettings, adam_step, why_not_fused
from ddpm_fast.runtime import extension
from ddpm_fast.runtime.dispatch import BackendRefused, use_backend
from ddpm_fast.testing.adam_cases import CASES, Model, assert_same_as_torch

NATIVE = extension.why_not(torch.device("cpu"))
needs_native = pytest.mark.skipif(NATIVE is not None, reason=str(NATIVE))


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("case", CASES)
def test_equals_torch(case, backend):
    if backend == "native" and "half_grads" in CASES[case]:
        model = Model("cpu", half_grads=torch.bfloat16)
        with use_backend("native"), pytest.raises(BackendRefused, match="a gradient is in a half type"):
            adam_step(*model.lists, [AdamSettings(len(model.params), 1e-2)])
        return
    with use_backend(backend):
        assert_same_as_torch("cpu", **CASES[case])


@needs_native
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"weight_decay": 0.1}], ids=str)
def test_native_errors_are_at_most_torchs(options):
    """Against float64, where torch's own fused Adam stands beside: every weight, ten steps."""
    model, shape = Model("cpu"), (37, 129)
    weight = torch.randn(shape, generator=model.generator)
    found, torchs, truth = (weight.to(dtype).clone() for dtype in (torch.float32, torch.float32, torch.float64))
    clip, decay = options.get("max_grad_norm"), options.get("weight_decay", 0.0)
    optimizers = [torch.optim.Adam([p], 1e-2, weight_decay=decay, fused=True) for p in (torchs, truth)]
    moments = [torch.zeros(shape), torch.zeros(shape)]
    step = torch.zeros(())
    for _ in range(10):
        grad = torch.randn(shape, generator=model.generator)
        for p in (torchs, truth):
            p.grad = grad.to(p.dtype)
            if clip is not None:
                torch.nn.utils.clip_grad_norm_([p], clip)
        for optimizer in optimizers:
            optimizer.step()
        settings = [AdamSettings(1, 1e-2, weight_decay=decay)]
        adam_step([found], [grad], [moments[0]], [moments[1]], [step], settings, max_grad_norm=clip)
    errors, theirs = (found - truth).abs(), (torchs - truth).abs()
    for measure in (lambda e: e.square().mean().sqrt(), torch.Tensor.max):
        assert measure(errors) <= 1.1 * measure(theirs) + 1e-8


@needs_native
@pytest.mark.parametrize("case", ["clipped", "average", "channels-last", "two groups"])
def test_the_number_of_threads_changes_no_bit(case):
    """Chunks are cut in the same way, and summed in one order."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run_case(**CASES[case]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


def run_case(*, max_grad_norm=None, average_weight=None, groups=1, channels_last=False, **others):
    model = Model("cpu", channels_last=channels_last)
    for lists in (model.params, model.exp_avgs, model.exp_avg_sqs):  # more than a thread takes at once
        lists.append(torch.ones(3, 70_000) if lists is model.params else torch.zeros(3, 70_000))
    model.steps.append(torch.zeros(()))
    averages = [p.clone() for p in model.params]
    settings = [AdamSettings(6, 1e-2), AdamSettings(1, 2e-2)] if groups > 1 else [AdamSettings(7, 1e-2)]
    weight = None if average_weight is None else torch.tensor(average_weight)
    for _ in range(2):
        model.draw()
        model.grads.append(torch.randn(3, 70_000, generator=model.generator))
        norm, _ = adam_step(
            *model.lists, settings, max_grad_norm=max_grad_norm, averages=averages, average_weight=weight
        )
    return [norm, *model.params, *model.exp_avgs, *model.exp_avg_sqs, *averages]


@needs_native
def test_rates_on_the_device_are_read_anew_in_float64():
    """A rate of a recording is the number itself, and gives the same bits."""
    results = []
    for as_tensor in (False, True):
        model, rate = Model("cpu"), torch.zeros((), dtype=torch.float64)
        for lr in (1e-3, 0.3):
            rate.fill_(lr)
            adam_step(*model.lists, [AdamSettings(len(model.params), rate if as_tensor else lr)])
        results.append(model.params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_native
def test_the_native_operator_checks_what_it_is_given():
    """It keeps memory safe where it is called without `adam_step`."""
    model = Model("cpu")

    def call(**changes):
        given = dict(zip(("params", "grads", "exp_avgs", "exp_avg_sqs", "steps"), model.lists, strict=True))
        given |= {"averages": [], "averaged": [], "copies": [], "copied": [], "rates": [], "rated": []}
        given |= {"counts": [len(model.params)], "numbers": [1e-2, 0.9, 0.999, 1e-8, 0.0, 0.0]}
        given |= {"max_grad_norm": None, "grad_scale": None, "average_weight": None}
        return torch.ops.ddpm_fast.native_adam_step(*(given | changes).values())

    before = [p.clone() for p in model.params]
    for changes, message in (
        ({"grads": model.grads[1:]}, "one entry for each"),
        ({"grads": [g.double() for g in model.grads]}, "grads must be float32"),
        ({"exp_avgs": [m.flatten() for m in model.exp_avgs]}, "exp_avgs must have their parameters' shapes"),
        ({"params": [p.t() if p.ndim == 2 else p for p in model.params]}, "shapes"),
        ({"steps": [s.double() for s in model.steps]}, "steps must be one float32"),
        ({"averages": model.params[:1], "averaged": [9]}, "there is no parameter 9"),
        ({"copies": model.params[:1], "copied": [0]}, "copies must be float16 or bfloat16"),
        ({"rates": [torch.zeros(2)], "rated": [0]}, "a tensor lr must be one element"),
        ({"counts": [7]}, "counts must be of 6 params"),
        ({"counts": [5]}, "counts must be of 6 params"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call(**changes)
    assert all(torch.equal(a, b) for a, b in zip(before, model.params, strict=True))
    call()
    torch.library.opcheck(
        torch.ops.ddpm_fast.native_adam_step.default,
        (*model.lists, [], [], [], [], [], [], [6], [1e-2, 0.9, 0.999, 1e-8, 0.0, 0.0], 1.0, None, None),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_float64():
    model = Model("cpu", dtype=torch.float64)
    before = [p.clone() for p in model.params]
    adam_step(*model.lists, [AdamSettings(len(before), 1e-2)])
    for p, old in zip(model.params, before, strict=True):
        assert p.dtype is torch.float64 and (p.numel() == 0 or not torch.equal(p, old))


def test_a_first_step_moves_by_the_learning_rate():
    """Adam's first step is lr·sign(g), whatever the gradient's size."""
    p, g = torch.zeros(3), torch.tensor([1e-3, -5.0, 2.0])
    norm, skipped = adam_step([p], [g], [torch.zeros(3)], [torch.zeros(3)], [torch.zeros(())], [AdamSettings(1, 0.1)])
    torch.testing.assert_close(p, torch.tensor([-0.1, 0.1, -0.1]), rtol=1e-4, atol=0)
    torch.testing.assert_close(norm, g.norm())
    assert skipped == 0


def test_why_not_fused():
    model = Model("cpu")
    assert why_not_fused(model.params, model.steps) == NATIVE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddpm_fast.runtime.triton_launch.why_not_triton", lambda device: None)
        assert why_not_fused(model.params, model.steps) is None
        assert "float64" in why_not_fused([p.double() for p in model.params], model.steps)
        assert "gaps" in why_not_fused([torch.zeros(4, 4)[:, :2]], model.steps[:1])
        assert "count" in why_not_fused(model.params, [step.double() for step in model.steps])
        assert "half" in why_not_fused(model.params, model.steps, copies=model.params)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(params=[]), "params must not be empty"),
        (dict(grads=lambda m: m.grads[:-1]), "grads must be 6"),
        (dict(grads=lambda m: [g.double() for g in m.grads]), "grads must be torch.float32"),
        (dict(exp_avgs=lambda m: [e.flatten() for e in m.exp_avgs]), "exp_avgs must be"),
        (dict(steps=lambda m: m.steps[1:]), "steps must be"),
        (dict(settings=[AdamSettings(2, 0.1)]), "settings must be of 6 parameters"),
        (dict(copies=lambda m: m.params[1:]), "copies must be"),
        (dict(average_weight=torch.zeros(2)), "average_weight must be one element"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    model = Model("cpu")
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps")
    given = dict(zip(names, model.lists, strict=True)) | {"settings": [AdamSettings(len(model.params), 0.1)]}
    given |= {name: value(model) if callable(value) else value for name, value in change.items()}
    with pytest.raises((TypeError, ValueError), match=message):
        adam_step(**given)
