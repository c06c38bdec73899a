"""The universal sampler update: C++ against the torch reference, and the reference against the formula."""

from __future__ import annotations

import itertools

import pytest
import torch

from ddpm_fast import noise, use_backend
from ddpm_fast.ops.sampler_step import reference
from ddpm_fast.ops.sampler_step.op import sampler_step, sampler_step_
from ddpm_fast.runtime import extension
from ddpm_fast.testing.truth import assert_close_to_truth

NAN = float("nan")
SHAPES = [
    (1, 1, 1, 1),
    (5, 3, 7, 9),  # H·W and the sample's size are no multiples of 4
    (2, 3, 8, 8),
    (1, 3, 33, 31),
    (2, 4, 40, 64),  # several tiles per sample
    (3, 2, 1, 6),
    (2, 2, 5, 1),
    (3, 10),
    (2, 3, 11),
    (4,),
    (2, 3, 2, 5, 3),
    (0, 3, 8, 8),
    (2, 0, 8, 8),
]
#                 p     q     r    s     u    sigma
ROWS = {
    "ddpm": [1.2, -0.7, 0.4, 0.6, 0.0, 0.3],
    "ddim": [0.8, -0.5, 0.9, 0.1, 0.0, 0.0],
    "multistep": [0.9, 0.4, 0.7, 0.5, -0.2, 0.0],
    "all": [0.9, 0.4, 0.7, 0.5, -0.2, 0.3],
}


@pytest.fixture(autouse=True)
def native():
    assert extension.load() is not None, extension.reason()
    with use_backend("native"):
        yield


def make_table(row: str) -> torch.Tensor:
    """(3, 6); the row to use is the second, and the others would spoil the result."""
    return torch.tensor([[NAN] * 6, ROWS[row], [NAN] * 6])


def make_inputs(shape, row="all", dtype=torch.float32, channels_last=False):
    output = torch.randn(shape).to(dtype)
    if channels_last:
        output = output.contiguous(memory_format=torch.channels_last)
    arguments = (torch.randn(shape), output, make_table(row), torch.tensor([1]), torch.tensor([-123456789012345]))
    return arguments, torch.randn(shape)


def reference_and_truth(arguments, **options):
    """(reference in float32, float64 truth), each (x_next, x_start)."""
    x, output, table, step, seed = arguments
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    truth = reference.sampler_step(x.double(), output.double(), table.double(), step, seed, **wide)
    return reference.sampler_step(*arguments, **options), truth


def assert_agrees(actual, arguments, **options):
    expected = reference_and_truth(arguments, **options)
    for name, ours, theirs, truth in zip(("x_next", "x_start"), actual, *expected, strict=True):
        assert_close_to_truth(ours, theirs, truth, name=name)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(shape, dtype, row):
    for clip, given, channels_last in itertools.product([True, False], [True, False], [False, True]):
        if channels_last and len(shape) != 4:
            continue
        arguments, previous = make_inputs(shape, row, dtype, channels_last)
        options = {
            "x_start_previous": previous,
            "noise": torch.randn(shape) if given else None,
            "clip_x_start": clip,
            "start_index": 3,
            "stream": 7,
        }
        assert_agrees(sampler_step(*arguments, **options), arguments, **options)


def test_the_reference_is_the_formula():
    (x, output, table, step, seed), previous = make_inputs((2, 3, 5, 5))
    eps = torch.randn_like(x)
    p, q, r, s, u, sigma = ROWS["all"]
    x_start = torch.clamp(p * x + q * output, -1, 1)
    assert (x_start.abs() == 1).any() and (x_start.abs() < 1).any()
    x_next, actual_start = reference.sampler_step(x, output, table, step, seed, x_start_previous=previous, noise=eps)
    torch.testing.assert_close(actual_start, x_start)
    torch.testing.assert_close(x_next, r * x_start + s * x + u * previous + sigma * eps)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_generated_noise_is_the_noise_function(backend):
    arguments, previous = make_inputs((3, 3, 9, 5))
    eps = noise.normal((3, 3, 9, 5), seed=arguments[4], stream=6, step=1, start_index=2)
    with use_backend(backend):
        generated = sampler_step(*arguments, x_start_previous=previous, start_index=2, stream=6)
        given = sampler_step(*arguments, x_start_previous=previous, noise=eps)
    torch.testing.assert_close(generated[0], given[0], rtol=0, atol=1e-6)
    assert torch.equal(generated[1], given[1])


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_in_place_equals_out_of_place(backend, row):
    arguments, previous = make_inputs((3, 3, 17, 13), row)
    with use_backend(backend):
        x_next, x_start = sampler_step(*arguments, x_start_previous=previous)
        x, kept = arguments[0].clone(), previous.clone()
        returned = sampler_step_(x, *arguments[1:], x_start=kept)
    assert returned is x and torch.equal(x, x_next) and torch.equal(kept, x_start)


def test_out_of_place_leaves_its_inputs_alone():
    arguments, previous = make_inputs((2, 3, 6, 6))
    tensors = (*arguments, previous)
    before = [t.clone() for t in tensors]
    sampler_step(*arguments, x_start_previous=previous)
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor.nan_to_num(), copy.nan_to_num())


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_zero_coefficients_leave_memory_unread(backend):
    shape = (2, 3, 7, 9)
    poison = torch.full(shape, NAN)
    with use_backend(backend):
        arguments, previous = make_inputs(shape, "ddim")
        clean = sampler_step(*arguments)
        poisoned = sampler_step(*arguments, x_start_previous=poison, noise=poison)
        assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True)) and not clean[0].isnan().any()
        x, x_start = arguments[0].clone(), poison.clone()
        sampler_step_(x, *arguments[1:], x_start=x_start, noise=poison)
        assert torch.equal(x, clean[0]) and torch.equal(x_start, clean[1])
        # The same poison under coefficients that are not zero must show, or this test sees nothing.
        arguments, _ = make_inputs(shape, "all")
        assert sampler_step(*arguments, x_start_previous=poison, noise=torch.zeros(shape))[0].isnan().all()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("clip", [True, False])
def test_nan_passes_through(backend, clip):
    (x, output, *rest), previous = make_inputs((2, 3, 5, 7))
    output[1, 2, 3, 4] = NAN
    with use_backend(backend):
        x_next, x_start = sampler_step(x, output, *rest, x_start_previous=previous, clip_x_start=clip)
    for tensor in (x_next, x_start):
        assert tensor[1, 2, 3, 4].isnan() and tensor.isnan().sum() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layout_of_the_output_changes_nothing(dtype):
    arguments, previous = make_inputs((3, 4, 31, 45), dtype=dtype)
    x, output, *rest = arguments
    expected = sampler_step(x, output, *rest, x_start_previous=previous)
    both = torch.randn(3, 8, 31, 45).to(dtype)  # a network with a learned variance: x0's half of its channels
    layouts = {
        "channels-last": output.contiguous(memory_format=torch.channels_last),
        "half of the channels": both.clone()[:, :4],
        "half of the channels, channels-last": both.contiguous(memory_format=torch.channels_last)[:, 4:],
        "misaligned": torch.empty(output.numel() + 1, dtype=dtype)[1:].view(output.shape),
    }
    for name, view in layouts.items():
        view.copy_(output)
        actual = sampler_step(x, view, *rest, x_start_previous=previous)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), name
    broadcast = output[:, :1].expand(3, 4, 31, 45)
    actual = sampler_step(x, broadcast, *rest, x_start_previous=previous)
    expected = sampler_step(x, broadcast.contiguous(), *rest, x_start_previous=previous)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_number_of_threads_changes_nothing(channels_last):
    arguments, previous = make_inputs((5, 3, 91, 77), channels_last=channels_last)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(sampler_step(*arguments, x_start_previous=previous))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_sample_does_not_depend_on_its_batch(backend):
    (x, output, *rest), previous = make_inputs((5, 3, 31, 47))
    with use_backend(backend):
        whole = sampler_step(x, output, *rest, x_start_previous=previous, start_index=10)
        parts = [
            sampler_step(x[i:j], output[i:j], *rest, x_start_previous=previous[i:j], start_index=10 + i)
            for i, j in ((0, 2), (2, 5))
        ]
    for a, *b in zip(whole, *parts, strict=True):
        assert torch.equal(a, torch.cat(b))


def test_only_the_given_memory_is_written():
    shape = (3, 1, 23, 29)
    arguments, _ = make_inputs(shape, "ddpm")
    count = arguments[0].numel()
    memory = torch.full((2, count + 64), NAN)
    x, x_start = (m[32:-32].view(shape) for m in memory)
    x.copy_(arguments[0])
    sampler_step_(x, *arguments[1:], x_start=x_start)
    assert memory[:, :32].isnan().all() and memory[:, -32:].isnan().all()
    assert not x.isnan().any() and not x_start.isnan().any()


def test_step_and_seed_are_read_at_run_time():
    x, output = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    table = torch.tensor([ROWS["ddpm"], ROWS["ddim"]])
    step, seed = torch.tensor(0), torch.tensor(5)
    first = sampler_step(x, output, table, step, seed)[0]
    seed.fill_(6)
    other_seed = sampler_step(x, output, table, step, seed)[0]
    step.fill_(1)
    expected = reference.sampler_step(x, output, table, torch.tensor([1]), seed)[0]
    assert not torch.equal(first, other_seed)
    torch.testing.assert_close(sampler_step(x, output, table, step, seed)[0], expected)


def test_a_step_outside_the_table_is_nan_in_the_reference_without_waiting():
    arguments, previous = make_inputs((2, 3, 4, 4))
    for step in (-1, 3, 2**40):
        x_next, x_start = reference.sampler_step(
            *arguments[:3], torch.tensor([step]), arguments[4], x_start_previous=previous
        )
        assert x_next.isnan().all() and x_start.isnan().all()


def test_gradients_run_in_the_reference():
    arguments, previous = make_inputs((2, 3, 4, 4))
    output = arguments[1].requires_grad_()
    with pytest.raises(RuntimeError, match="a gradient is wanted"):
        sampler_step(*arguments, x_start_previous=previous)
    with use_backend(None):
        sampler_step(*arguments, x_start_previous=previous, clip_x_start=False)[0].sum().backward()
    torch.testing.assert_close(output.grad, torch.full_like(output, ROWS["all"][1] * ROWS["all"][2]))
    with torch.no_grad():
        sampler_step(*arguments, x_start_previous=previous)


REFUSED = {
    "native code computes in float32": lambda a, p: ((a[0].double(), *a[1:]), p.double()),
    "native code reads float32": lambda a, p: ((a[0], a[1].double(), *a[2:]), p),
    "x is not contiguous": lambda a, p: ((a[0].transpose(2, 3), *a[1:]), p),
    "x_start_previous is not contiguous": lambda a, p: (a, p.transpose(2, 3)),
    "table is not contiguous": lambda a, p: ((*a[:2], a[2].t().contiguous().t(), *a[3:]), p),
    "neither contiguous nor channels-last": lambda a, p: ((a[0], a[1].transpose(2, 3), *a[2:]), p),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_native_refuses_runs_in_the_reference(reason):
    arguments, previous = REFUSED[reason](*make_inputs((2, 3, 6, 6)))
    with pytest.raises(RuntimeError, match=reason):
        sampler_step(*arguments, x_start_previous=previous)
    with use_backend(None):
        actual = sampler_step(*arguments, x_start_previous=previous)
    expected = reference.sampler_step(*arguments, x_start_previous=previous)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def wide_table(**columns) -> torch.Tensor:
    """(3, 10), the row to use with these columns besides those of "all"."""
    names = ("u2", "u3", "lo", "hi")
    return torch.tensor([[NAN] * 10, ROWS["all"] + [columns.get(name, 0.0) for name in names], [NAN] * 10])


def replaced(index, value):
    def call():
        arguments, previous = make_inputs((2, 3, 6, 6))
        arguments = list(arguments)
        arguments[index] = value(arguments[index]) if callable(value) else value
        sampler_step(*arguments, x_start_previous=previous)

    return call


def with_option(**options):
    def call():
        arguments, previous = make_inputs((2, 3, 6, 6))
        sampler_step(*arguments, **{"x_start_previous": previous, **options})

    return call


BAD = [
    (replaced(0, None), TypeError, "x must be a tensor, got NoneType"),
    (replaced(0, lambda x: x.half()), TypeError, r"x must be float32 \(or float64\), got torch.float16"),
    (replaced(0, lambda x: x.long()), TypeError, "x must be float32 .* got torch.int64"),
    (replaced(0, torch.tensor(1.0)), ValueError, "at least one dimension"),
    (replaced(1, torch.zeros(2, 3, 6, 5)), ValueError, r"model_output must have the shape of x, \(2, 3, 6, 6\), got"),
    (replaced(1, lambda t: t.int()), TypeError, "model_output must be float32, float16, bfloat16 .* got torch.int32"),
    (replaced(1, lambda t: t.to("meta")), ValueError, "model_output must be on the device of x, cpu, got meta"),
    (replaced(2, torch.zeros(3, 5)), ValueError, r"table must have shape \(S, 6\), \(S, 10\), .* got \(3, 5\)"),
    (replaced(2, torch.zeros(3, 8)), ValueError, r"table must have shape \(S, 6\), \(S, 10\), .* got \(3, 8\)"),
    (replaced(2, torch.zeros(0, 6)), ValueError, r"table must have shape \(S, 6\), \(S, 10\), .* got \(0, 6\)"),
    (replaced(1, torch.zeros(2, 6, 6, 6)), ValueError, r"table must have the columns lo and hi for the variance in .*"),
    (replaced(1, torch.zeros(2, 9, 6, 6)), ValueError, r"model_output must have the shape of x, .* \(2, 9, 6, 6\)"),
    (replaced(2, wide_table(u2=0.5)), ValueError, "x_start_previous2 must be given where u2 of the table .* u2 = 0.5"),
    (replaced(2, wide_table(u3=0.5)), ValueError, "x_start_previous3 must be given where u3 of the table .* u3 = 0.5"),
    (with_option(x_start_previous2=torch.zeros(2, 3)), ValueError, "x_start_previous2 must have the shape of x"),
    (
        with_option(x_start_previous3=torch.zeros(2, 3, 6, 6)),
        ValueError,
        "x_start_previous2 must be given where x_start",
    ),
    (replaced(2, lambda t: t.double()), TypeError, "table must be torch.float32, got torch.float64"),
    (replaced(3, 1), TypeError, "step must be a tensor, got int"),
    (replaced(3, torch.tensor([1.0])), TypeError, "step must be a one-element int64 tensor, got torch.float32"),
    (replaced(3, torch.tensor([1, 1])), TypeError, r"step must be a one-element int64 tensor, .* \(2,\)"),
    (replaced(3, torch.tensor([3])), ValueError, r"step must be in \[0, 3\), the rows of table, got 3"),
    (replaced(3, torch.tensor([-1])), ValueError, r"step must be in \[0, 3\), the rows of table, got -1"),
    (replaced(4, torch.tensor([1, 1])), TypeError, "seed must be a one-element int64 tensor"),
    (replaced(4, torch.tensor([1], dtype=torch.int32)), TypeError, "seed must be .* got torch.int32"),
    (with_option(x_start_previous=None), ValueError, "x_start_previous must be given where u .* None with u = -0.2"),
    (with_option(x_start_previous=torch.zeros(2, 3)), ValueError, "x_start_previous must have the shape of x"),
    (with_option(x_start_previous=torch.zeros(2, 3, 6, 6).half()), TypeError, "x_start_previous must have the dtype"),
    (with_option(noise=torch.zeros(2, 3, 6, 7)), ValueError, "noise must have the shape of x"),
    (with_option(noise=torch.zeros(2, 3, 6, 6).double()), TypeError, "noise must have the dtype of x, torch.float32"),
    (with_option(start_index=-1), ValueError, "start_index must be in"),
    (with_option(start_index=2**32 - 1), ValueError, "start_index must be in"),
    (with_option(stream=2**32), ValueError, "stream must be in"),
]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("call, error, sentence", BAD)
def test_bad_input_gets_one_sentence(call, error, sentence, backend):
    with use_backend(backend), pytest.raises(error, match=sentence) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_more_than_2_34_elements_per_sample_is_refused():
    x = torch.empty(1, device="meta").expand(1, 2**34 + 1)
    with pytest.raises(ValueError, match="at most 2\\^34 elements per sample"):
        sampler_step(x, x, x, x, x)


def test_x_start_must_not_be_x():
    arguments, _ = make_inputs((2, 3, 6, 6), "ddpm")
    with pytest.raises(ValueError, match="x_start must be another tensor than x"):
        sampler_step_(*arguments, x_start=arguments[0])
    state = torch.zeros(2, 3, 6, 6)
    with pytest.raises(ValueError, match="x_start2 must be another tensor than x and the other states"):
        sampler_step_(*arguments, x_start=state, x_start2=state)


@pytest.mark.parametrize(
    "index, value, sentence",
    [
        (0, torch.zeros(2, 3, 6, 6).double(), "x must be float32"),
        (0, torch.zeros(2, 3, 6, 6).transpose(2, 3), "x must be contiguous"),
        (1, torch.zeros(2, 3, 6, 5), "model_output must have shape"),
        (1, torch.zeros(2, 3, 6, 6).transpose(2, 3), "model_output must be contiguous or channels-last"),
        (2, torch.zeros(3, 5), "table must be contiguous, of shape"),
        (2, torch.zeros(3, 6).double(), "table must be float32"),
        (2, torch.zeros(3, 10)[:, :6], "table must be contiguous, of shape"),
        (1, torch.zeros(2, 6, 6, 6), "table must have 10 columns where model_output has a variance"),
        (3, torch.tensor([9]), "step must be in"),
        (3, torch.empty(0, dtype=torch.int64), "step must be one int64 element"),
        (4, torch.tensor([1.0]), "seed must be one int64 element"),
        (5, None, "the previous x_start is needed"),
        (5, torch.zeros(2, 3, 6), "x_start_previous must have shape"),
        (6, torch.zeros(2, 3, 6, 6).half(), "x_start_previous2 must be float32"),
        (7, torch.zeros(2, 3, 6, 6), "the second of the earlier x_start is needed where the third is given"),
        (8, torch.zeros(2, 3, 6, 6).half(), "noise must be float32"),
        (10, -1, "start_index must be in"),
        (11, -1, "stream must be in"),
    ],
)
def test_the_operator_itself_guards_memory(index, value, sentence):
    (arguments, previous) = make_inputs((2, 3, 6, 6))
    call = [*arguments, previous, None, None, None, True, 0, 1]
    call[index] = value
    with pytest.raises((TypeError, ValueError), match=sentence):
        torch.ops.ddpm_fast.sampler_step(*call)


@pytest.mark.parametrize("row, given", [("ddpm", False), ("all", True)])
def test_opcheck(row, given):
    arguments, previous = make_inputs((2, 3, 5, 4), row, torch.bfloat16, channels_last=True)
    eps = torch.randn(2, 3, 5, 4) if given else None
    call = (*arguments, previous, None, None, eps, True, 1, 1)
    torch.library.opcheck(torch.ops.ddpm_fast.sampler_step.default, call)
    torch.library.opcheck(torch.ops.ddpm_fast.sampler_step_.default, call)


def test_a_backend_that_this_op_lacks_leaves_the_choice_free():
    arguments, previous = make_inputs((2, 3, 5, 4))
    expected = sampler_step(*arguments, x_start_previous=previous)
    with use_backend("triton"):
        assert torch.equal(sampler_step(*arguments, x_start_previous=previous)[0], expected[0])


# The extended form: u2, u3, lo, hi, and e, f.
#                    p     q     r    s     u    sigma  u2    u3    lo    hi   e    f
EXTENDED = {
    "second": [0.9, 0.4, 0.7, 0.5, -0.2, 0.0, 0.15, 0.0, 0.0, 0.0],
    "third": [0.9, 0.4, 0.7, 0.5, -0.2, 0.3, 0.15, -0.1, 0.0, 0.0],
    "only the third": [0.9, 0.4, 0.7, 0.5, 0.0, 0.0, 0.0, -0.1, 0.0, 0.0],
    "learned": [0.9, 0.4, 0.7, 0.5, 0.0, 0.3, 0.0, 0.0, -0.4, 0.7],
    "learned, no noise": [0.9, 0.4, 0.7, 0.5, 0.0, 0.0, 0.0, 0.0, -0.4, 0.7],
    "learned and third": [0.9, 0.4, 0.7, 0.5, -0.2, 0.3, 0.15, -0.1, -0.4, 0.7],
    "keeps noise": [0.9, 0.4, 0.7, 0.5, 0.0, 0.0, 0.3, -0.1, 0.0, 0.0, 1.1, -0.6],
}


def make_extended(row: str, shape, dtype=torch.float32, layout="contiguous"):
    """((x, output, table, step, seed), (x0 of the step before, of that before it, of the third))."""
    values = EXTENDED[row]
    table = torch.tensor([[NAN] * len(values), values, [NAN] * len(values)])
    learned = row.startswith("learned")
    channels = (2 if learned else 1) * shape[1]
    output = torch.randn(shape[0], channels, *shape[2:]).clamp(-1.5, 1.5).to(dtype)
    if layout == "channels-last":
        output = output.contiguous(memory_format=torch.channels_last)
    elif layout == "misaligned":
        output = torch.empty(output.numel() + 1, dtype=dtype)[1:].view(output.shape).copy_(output)
    arguments = (torch.randn(shape), output, table, torch.tensor([1]), torch.tensor([-5]))
    return arguments, tuple(torch.randn(shape) for _ in range(3))


def history_names(inplace: bool) -> tuple[str, ...]:
    return ("x_start", "x_start2", "x_start3") if inplace else tuple(f"x_start_previous{n}" for n in ("", "2", "3"))


@pytest.mark.parametrize("row", EXTENDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 3, 7, 9), (2, 1, 8, 8), (2, 4, 40, 64), (3, 10), (2, 3, 11), (2, 3, 2, 5, 3)])
def test_the_extended_row_equals_the_reference(shape, dtype, row):
    for layout, clip, given in itertools.product(("contiguous", "channels-last", "misaligned"), (True, False), (0, 1)):
        if layout == "channels-last" and len(shape) != 4:
            continue
        arguments, history = make_extended(row, shape, dtype, layout)
        options = dict(zip(history_names(False), history, strict=True))
        options |= {"noise": torch.randn(shape) if given else None, "clip_x_start": clip, "start_index": 3}
        assert_agrees(sampler_step(*arguments, **options), arguments, **options)


def test_the_extended_reference_is_the_formula():
    (x, output, table, step, seed), history = make_extended("learned and third", (2, 3, 5, 5))
    eps = torch.randn_like(x)
    p, q, r, s, u, sigma, u2, u3, lo, hi = EXTENDED["learned and third"]
    mean, v = output.chunk(2, dim=1)
    x_start = (p * x + q * mean).clamp(-1, 1)
    sigma = sigma * torch.exp(lo + (hi - lo) * (v + 1) / 2)
    expected = r * x_start + s * x + u * history[0] + u2 * history[1] + u3 * history[2] + sigma * eps
    options = dict(zip(history_names(False), history, strict=True))
    actual = reference.sampler_step(x, output, table, step, seed, noise=eps, **options)
    torch.testing.assert_close(actual, (expected, x_start))


def test_the_learned_variance_is_nichol_and_dhariwals():
    """v = 1 is the upper variance and v = −1 the lower (Nichol & Dhariwal 2021, eq. 15), also far from 1."""
    shape = (1, 1, 2, 2)
    lower, upper = 1e-6, 0.02  # of variances
    row = [1.0, 0.0, 0.0, 0.0, 0.0, lower**0.5, 0.0, 0.0, 0.0, 0.5 * torch.tensor(upper / lower).log().item()]
    for v, variance in ((-1.0, lower), (1.0, upper), (0.0, (lower * upper) ** 0.5)):
        output = torch.cat([torch.zeros(shape), torch.full(shape, v)], dim=1)
        call = (torch.zeros(shape), output, torch.tensor([row]), torch.tensor([0]), torch.tensor([0]))
        x_next = sampler_step(*call, noise=torch.ones(shape))[0]
        torch.testing.assert_close(x_next, torch.full(shape, variance**0.5), rtol=2e-6, atol=0)


@pytest.mark.parametrize("row", EXTENDED)
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("shape", [(3, 3, 17, 13), (2, 3, 8, 8)])
def test_in_place_shifts_the_history(shape, backend, row):
    arguments, history = make_extended(row, shape)
    with use_backend(backend):
        x_next, x_start = sampler_step(*arguments, **dict(zip(history_names(False), history, strict=True)))
        x, kept = arguments[0].clone(), [tensor.clone() for tensor in history]
        sampler_step_(x, *arguments[1:], **dict(zip(history_names(True), kept, strict=True)))
        x2, kept2 = arguments[0].clone(), [tensor.clone() for tensor in history[:2]]
        if EXTENDED[row][7] == 0:  # two are enough where u3 is 0
            sampler_step_(x2, *arguments[1:], **dict(zip(history_names(True), kept2, strict=False)))
            assert torch.equal(x2, x_next) and all(torch.equal(a, b) for a, b in zip(kept2, kept, strict=False))
    second = history[0]
    if row == "keeps noise":
        second = 1.1 * arguments[0] - 0.6 * x_start
    assert torch.equal(x, x_next) and torch.equal(kept[0], x_start) and torch.equal(kept[2], history[1])
    torch.testing.assert_close(kept[1], second, rtol=1e-6, atol=1e-6)
    assert row == "keeps noise" or torch.equal(kept[1], second)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_wide_table_with_zeros_is_the_narrow_one(backend):
    arguments, previous = make_inputs((2, 3, 9, 7))
    wide = wide_table()
    with use_backend(backend):
        narrow = sampler_step(*arguments, x_start_previous=previous)
        actual = sampler_step(*arguments[:2], wide, *arguments[3:], x_start_previous=previous)
    torch.testing.assert_close(actual, narrow, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_zero_coefficients_leave_the_history_unread(backend):
    shape = (2, 3, 7, 9)
    poison = [torch.full(shape, NAN) for _ in range(3)]
    values = [0.9, 0.4, 0.7, 0.5] + [0.0] * 6
    table = torch.tensor([[NAN] * 10, values, [NAN] * 10])
    x, output = torch.randn(shape), torch.cat([torch.randn(shape), poison[0]], dim=1)
    call = (output, table, torch.tensor([1]), torch.tensor([0]))
    with use_backend(backend):
        x_next = sampler_step(x, *call, **dict(zip(history_names(False), poison, strict=True)))[0]
        assert not x_next.isnan().any()
        kept = [tensor.clone() for tensor in poison]
        sampler_step_(x, *call, **dict(zip(history_names(True), kept, strict=True)))
        assert torch.equal(x, x_next) and not kept[0].isnan().any() and kept[1].isnan().all()
        for column in (6, 7):  # the same poison must show where it is read, or this test sees nothing
            spoiled = table.clone()
            spoiled[1, column] = 0.1
            options = dict(zip(history_names(False), poison, strict=True))
            assert sampler_step(x, output, spoiled, *call[2:], **options)[0].isnan().all()


def test_a_learned_variance_that_is_nan_shows():
    arguments, _ = make_extended("learned", (2, 3, 5, 7))
    arguments[1][1, 4, 2, 3] = NAN
    x_next, x_start = sampler_step(*arguments)
    assert x_next[1, 1, 2, 3].isnan() and x_next.isnan().sum() == 1 and not x_start.isnan().any()


@pytest.mark.parametrize("row", ["third", "learned", "keeps noise"])
def test_opcheck_of_the_extended_row(row):
    arguments, history = make_extended(row, (2, 3, 5, 4), torch.bfloat16, "channels-last")
    call = (*arguments, *history, None, True, 1, 1)
    torch.library.opcheck(torch.ops.ddpm_fast.sampler_step.default, call)
    torch.library.opcheck(torch.ops.ddpm_fast.sampler_step_.default, call)


def test_the_number_of_threads_changes_nothing_of_the_extended_row():
    arguments, history = make_extended("learned and third", (5, 3, 91, 77))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(sampler_step(*arguments, **dict(zip(history_names(False), history, strict=True))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
