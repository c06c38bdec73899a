"""Guidance, masks and gradients of the sampler step: C++ against the reference, the reference against the papers."""

from __future__ import annotations

import importlib

import pytest
import torch

from ddpm_fast import use_backend
from ddpm_fast.ops.sampler_step import reference
from ddpm_fast.ops.sampler_step.op import sampler_step, sampler_step_
from ddpm_fast.runtime import extension, recording
from ddpm_fast.testing.guided_step_cases import (
    MASKS,
    NAN,
    ROWS,
    SUMS,
    GuidedStep,
    guided_table,
    make_guided,
    tensors_read,
)
from ddpm_fast.testing.native_cases import instruction_sets, instructions, threads
from ddpm_fast.testing.truth import assert_close_to_truth

SHAPES = [
    (5, 3, 7, 9),  # H·W and the sample's size are no multiples of 4
    (2, 3, 8, 8),
    (64, 1, 1, 1),  # samples of one element; one sample alone would compare two roundings
    (2, 4, 40, 64),  # several tiles per sample
    (3, 2, 1, 6),
    (2, 3, 11),
    (3, 10),
    (64,),
    (2, 3, 2, 5, 3),
    (0, 3, 8, 8),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = ["native", "reference"]


@pytest.fixture(autouse=True)
def native():
    assert extension.load() is not None, extension.reason()
    with use_backend("native"):
        yield


def assert_agrees(case: GuidedStep) -> None:
    """Both forms against the float64 truth, with the reference's own error as the measure."""
    for run, step, of_reference in (
        (GuidedStep.run, sampler_step, reference.sampler_step),
        (GuidedStep.run_in_place, sampler_step_, reference.sampler_step_),
    ):
        actual, expected, truth = run(case, step), run(case, of_reference), run(case.doubled(), of_reference)
        assert actual.keys() == expected.keys() == truth.keys()
        for name in actual:
            assert_close_to_truth(actual[name], expected[name], truth[name], name=name)


@pytest.mark.release(but=lambda layouts, **_: layouts == "by turns")
@pytest.mark.parametrize("layouts", ["by turns", "each"])
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(row, dtype, layouts):
    """Every shape with its layouts; by turns, one of them, the next for every other shape, row and dtype."""
    for i, shape in enumerate(SHAPES):
        names = ["contiguous", "halves", "misaligned"] + ["channels-last"] * (len(shape) == 4)
        turn = (i + DTYPES.index(dtype) + list(ROWS).index(row)) % len(names)
        for j, layout in enumerate(names):
            if layouts == "by turns" and j != turn:
                continue
            case = make_guided(row, shape, dtype, layout=layout, mask=MASKS[(i + j) % 4], only_read=bool((i + j) % 2))
            case.options |= {"clip_x_start": j != 2, "noise": torch.randn(shape) if j == 1 else None}
            assert_agrees(case)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("instruction_set", instruction_sets())
def test_every_instruction_set_equals_the_reference(row, instruction_set):
    with instructions(instruction_set):
        for shape in ((2, 3, 7, 9), (1, 3, 29, 31)):
            assert_agrees(make_guided(row, shape))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("row", ["known", "all"])
def test_every_mask_equals_the_full_one(row, mask):
    case = make_guided(row, (3, 2, 33, 37), mask=mask)
    actual = case.run(sampler_step)
    case.options["mask"] = case.options["mask"].expand(3, 2, 33, 37).contiguous()
    for name, expected in case.run(sampler_step).items():
        assert torch.equal(actual[name], expected)


def test_the_reference_is_the_formula():
    """Written down once more, a sample at a time, in float64."""
    case = make_guided("all", (3, 2, 5, 4), mask="one per sample").doubled()
    case.options["noise"] = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    (xs, outputs, table, _, _), c = case.arguments, {"eta": 1.0, **ROWS["all"]}
    p, q, r, s, u, sigma = table[1, :6].tolist()
    actual, given = case.run(reference.sampler_step), case.options
    previous, previous2, previous3 = case.history
    assert c["space"] == 1
    for i, x in enumerate(xs):
        (out, v), second = outputs[i].chunk(2), given["second_output"][i].chunk(2)[0]
        y, y_second = p * x + q * out, p * x + q * second
        update = y - y_second + table[1, 18].item() * given["update"][i]
        torch.testing.assert_close(actual["update"][i], update)
        update = update * min(1.0, table[1, 17].item() / update.norm().item())
        update = update - (1 - table[1, 16]) * (update * y).sum() / (y * y).sum() * y
        g = y + (table[1, 14] - 1) * update
        phi = table[1, 15]
        g = (phi * y.std() / g.std() + 1 - phi) * g
        x_start = (g + table[1, 23] * given["gradient"][i]).clamp(-1, 1)
        torch.testing.assert_close(actual["x_start"][i], x_start)
        assert (x_start.abs() == 1).any() and (x_start.abs() < 1).any()
        scale = torch.exp(table[1, 8] + (table[1, 9] - table[1, 8]) * (v + 1) / 2)
        x_next = r * x_start + s * x + u * previous[i] + table[1, 6] * previous2[i] + table[1, 7] * previous3[i]
        x_next = x_next + sigma * scale * given["noise"][i] + table[1, 20] * g + table[1, 21] * y_second
        x_next = x_next + table[1, 22] * y_second.clamp(-1, 1) + table[1, 24] * given["gradient"][i]
        known = table[1, 12] * given["known"][i] + table[1, 13] * given["noise"][i]
        x_next = given["mask"][i] * known + (1 - given["mask"][i]) * x_next
        torch.testing.assert_close(actual["x_next"][i], x_next)


# Upstream, and the papers.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("remove, keep", [(False, 0.0), (True, 0.0), (True, 0.3)])
def test_projection_and_rescaling_are_upstreams(backend, phi, remove, keep):
    """`forward_with_cond_scale` of upstream's class-conditional network, given what its network returns."""
    upstream = importlib.import_module("denoising_diffusion_pytorch.classifier_free_guidance")
    dtype = torch.float64 if backend == "reference" else torch.float32
    case = make_guided("w", (3, 3, 9, 10)).doubled()
    outputs = {0.0: case.arguments[1], 1.0: case.options["second_output"]}

    class Network:
        def forward(self, cond_drop_prob):
            return outputs[cond_drop_prob]

    options = {"rescaled_phi": phi, "remove_parallel_component": remove, "keep_parallel_frac": keep}
    expected = upstream.Unet.forward_with_cond_scale(Network(), cond_scale=5.0, **options)[0]
    # The step returns x0 = g where p = 0 and q = 1.
    columns = {"p": 0.0, "q": 1.0, "w": 5.0, "phi": phi, "eta": keep if remove else 1.0}
    table = guided_table(**columns)
    if backend == "reference":  # float32 has no 0.7
        names = [name for name in columns if name not in ("p", "q")]
        places = {"w": 14, "phi": 15, "eta": 16}
        table = table.double()
        for name in names:
            table[1, places[name]] = columns[name]
    x, first, second = (tensor.to(dtype) for tensor in (case.arguments[0], *outputs.values()))
    with use_backend(backend):
        call = (x, first, table, *case.arguments[3:])
        actual = sampler_step(*call, second_output=second, reduces=True, clip_x_start=False)[1]
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if backend == "reference" else {"rtol": 2e-6, "atol": 2e-6}
    torch.testing.assert_close(actual, expected.to(dtype), **tolerance)


def apg(conditional, unconditional, scale, average, momentum, threshold, eta):
    """Adaptive projected guidance (Sadat et al. 2024, algorithm 1): the guided x0 and the new average."""
    dims = tuple(range(1, conditional.dim()))
    average = conditional - unconditional + momentum * average
    difference = average
    norm = difference.square().sum(dims, keepdim=True).sqrt()
    difference = difference * torch.minimum(torch.ones_like(norm), threshold / norm)
    direction = conditional / conditional.square().sum(dims, keepdim=True).sqrt()
    parallel = (difference * direction).sum(dims, keepdim=True) * direction
    orthogonal = difference - parallel
    return conditional + (scale - 1) * (orthogonal + eta * parallel), average


@pytest.mark.parametrize("backend", BACKENDS)
def test_adaptive_projected_guidance_is_the_papers(backend):
    """Five steps with reverse momentum, which starts from memory that is not cleared."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    shape, scale, momentum, threshold, eta = (3, 3, 9, 11), 10.0, -0.75, 12.0, 0.25
    columns = {"w": scale, "rho": threshold, "eta": eta, "space": 1.0}
    first_row, row = guided_table(**columns), guided_table(mu=momentum, **columns)
    update, average = torch.full(shape, NAN, dtype=dtype), torch.zeros(shape, dtype=torch.float64)
    shrinks = 0
    for i in range(5):
        x, out, second = torch.randn(3, *shape, dtype=torch.float64)
        table = (row if i else first_row).to(dtype)
        p, q = table[1, :2].double().tolist()
        expected, average = apg(p * x + q * out, p * x + q * second, scale, average, momentum, threshold, eta)
        shrinks += (average.flatten(1).norm(dim=1) > threshold).sum().item()
        call = (*(tensor.to(dtype) for tensor in (x, out)), table, torch.tensor([1]), torch.tensor([0]))
        options = {"second_output": second.to(dtype), "update": update, "reduces": True, "clip_x_start": False}
        with use_backend(backend):
            actual = sampler_step(*call, **options)[1]
        tolerance = {"rtol": 1e-12, "atol": 1e-12} if backend == "reference" else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(actual, expected.to(dtype), **tolerance)
        torch.testing.assert_close(update, average.to(dtype), **tolerance)
    assert 0 < shrinks < 15, "the threshold must matter in some samples and not in others"


# What a row does not read.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "halves"])
def test_a_neutral_row_reads_nothing(backend, layout):
    """Equal to the table without these columns, whatever the tensors hold; the momentum stays."""
    shape = (2, 3, 7, 9)
    without_effect = {"phi": 0.5, "rho": 2.0, "eta": 0.3, "space": 1.0}  # of no effect where w is 1
    case = make_guided("w", shape, layout=layout)
    x, output, _, step, seed = case.arguments
    poison = torch.full(shape, NAN)
    tensors = {"second_output": poison, "gradient": poison, "update": poison.clone()}
    with use_backend(backend):
        for table in (guided_table(), guided_table(**without_effect)):
            expected = sampler_step(x, output, table[:, :12].contiguous(), step, seed)
            actual = sampler_step(x, output, table, step, seed, **tensors, reduces=True)
            assert all(not tensor.isnan().any() for tensor in actual)
            if backend == "native":
                assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
        assert tensors["update"].isnan().all()
        # The same poison must show where it is read, or this test sees nothing.
        for column in ("w", "mu", "kn", "kc", "h", "j"):
            tensors["update"] = poison.clone()
            x_next = sampler_step(x, output, guided_table(**{column: 0.5}), step, seed, **tensors)[0]
            assert x_next.isnan().all() == (column != "mu"), column
        assert tensors["update"].isnan().all()  # mu moved it


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_momentum_of_zero_reads_no_update(backend):
    case = make_guided("w", (2, 3, 7, 9))
    case.options["update"] = torch.full((2, 3, 7, 9), NAN)
    with use_backend(backend):
        result = case.run(sampler_step)
    assert not any(tensor.isnan().any() for tensor in result.values())
    torch.testing.assert_close(result["update"], case.arguments[1] - case.options["second_output"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_of_zero_or_one_hides_the_other_side(backend):
    shape = (2, 3, 6, 6)
    case = make_guided("known", shape)
    x, output, table, step, seed = case.arguments
    mask = torch.zeros(shape)
    mask[..., :3] = 1
    known = torch.where(mask == 1, torch.randn(shape), NAN)
    output = torch.where(mask == 0, output, NAN)
    with use_backend(backend):
        x_next = sampler_step(x, output, table, step, seed, known=known, mask=mask)[0]
        assert not x_next.isnan().any()
        # A = 0 reads no known image, and B = 0 with σ = 0 no noise.
        table = guided_table(sigma=0.0)
        poison = torch.full(shape, NAN)
        x_next = sampler_step(x, output, table, step, seed, known=poison, mask=mask, noise=poison)[0]
    assert (x_next[..., :3] == 0).all() and not x_next.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_shows(backend):
    """In its pixel without sums, in its sample with sums."""
    with use_backend(backend):
        for row, count in (("w", 1), ("everything with sums", 3 * 7 * 9)):
            case = make_guided(row, (2, 3, 7, 9))
            case.options["mask"] = case.options["known"] = None
            case.options["second_output"][1, 2, 3, 4] = NAN
            for name, tensor in case.run(sampler_step).items():
                expected = 1 if name == "update" else count
                assert tensor[1, 2, 3, 4].isnan() and tensor.isnan().sum() == expected, name


def test_a_constant_output_is_not_rescaled():
    """0/0 of the deviations; and a sample without norm has no parallel part."""
    x, table = torch.randn(2, 3, 5, 5), guided_table(p=0.0, q=1.0, w=3.0, phi=1.0, eta=0.0)
    call = (table, torch.tensor([1]), torch.tensor([0]))
    for value, second in ((0.0, 0.1), (0.0, 0.0)):
        first, other = torch.full_like(x, value), torch.full_like(x, second)
        for backend in BACKENDS:
            with use_backend(backend):
                x_start = sampler_step(x, first, *call, second_output=other, reduces=True)[1]
            torch.testing.assert_close(x_start, torch.full_like(x, value + 2 * (value - second)))


# A result depends on nothing but its sample.


@pytest.mark.parametrize("row", [*SUMS, "w", "known"])
def test_a_sample_does_not_depend_on_its_batch_or_the_threads(row):
    case = make_guided(row, (5, 3, 91, 77), torch.bfloat16, layout="halves")
    with threads(1):
        expected = case.run(sampler_step)
    with threads(2):
        for name, tensor in case.run(sampler_step).items():
            assert torch.equal(tensor, expected[name]), name
    x, output, *rest = case.arguments
    for i, j in ((0, 2), (2, 5)):
        options = {k: v[i:j] if isinstance(v, torch.Tensor) else v for k, v in case.options.items()}
        options["start_index"] += i
        part = GuidedStep((x[i:j], output[i:j], *rest), tuple(t[i:j] for t in case.history), options)
        for name, tensor in part.run(sampler_step).items():
            assert torch.equal(tensor, expected[name][i:j]), name


@pytest.mark.parametrize("row", ["w", "history", "all"])
def test_the_layout_of_the_outputs_changes_nothing(row):
    case = make_guided(row, (3, 4, 31, 45))
    expected = case.run(sampler_step)
    outputs = case.arguments[1], case.options["second_output"]
    both = torch.cat(outputs)
    for doubled in (both, both.contiguous(memory_format=torch.channels_last)):
        first, second = doubled.chunk(2)
        options = {**case.options, "second_output": second}
        actual = GuidedStep((case.arguments[0], first, *case.arguments[2:]), case.history, options).run(sampler_step)
        assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_equals_out_of_place(backend, row):
    case = make_guided(row, (3, 3, 17, 13))
    with use_backend(backend):
        expected, actual = case.run(sampler_step), case.run_in_place(sampler_step_)
    assert torch.equal(actual["x_next"], expected["x_next"]) and torch.equal(actual["x_start"], expected["x_start"])
    assert torch.equal(actual["update"], expected["update"]) and torch.equal(actual["x_start3"], case.history[1])
    if "e" in ROWS[row]:
        kept = 1.1 * case.arguments[0] - 0.6 * expected["x_start"]
        torch.testing.assert_close(actual["x_start2"], kept, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(actual["x_start2"], case.history[0])


def test_only_the_given_memory_is_written():
    shape = (3, 1, 23, 29)
    case = make_guided("everything with sums", shape)
    memory = torch.full((3, case.arguments[0].numel() + 64), NAN)
    x, x_start, update = (m[32:-32].view(shape) for m in memory)
    x.copy_(case.arguments[0])
    update.copy_(case.options["update"])
    sampler_step_(x, *case.arguments[1:], x_start=x_start, **{**case.options, "update": update})
    assert memory[:, :32].isnan().all() and memory[:, -32:].isnan().all()
    assert not any(tensor.isnan().any() for tensor in (x, x_start, update))


def test_out_of_place_writes_only_the_update():
    case = make_guided("all", (2, 3, 6, 6), mask="one for all")
    tensors = [*case.arguments, *case.history, *(v for v in case.options.values() if isinstance(v, torch.Tensor))]
    before = [tensor.clone() for tensor in tensors]
    case.run(sampler_step)
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor.nan_to_num(), copy.nan_to_num())


# Compiled, checked, recorded.


@pytest.mark.parametrize("row", ["w", "known", "all"])
def test_opcheck(row):
    case = make_guided(row, (2, 3, 5, 4), torch.bfloat16, layout="halves")
    guidance = [case.options[name] for name in ("second_output", "gradient", "known", "mask", "update", "reduces")]
    call = (*case.arguments, *case.history, None, True, 1, 1, *guidance)
    torch.library.opcheck(torch.ops.ddpm_fast.sampler_step.default, call)
    torch.library.opcheck(torch.ops.ddpm_fast.sampler_step_.default, call)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", ["w", "all"])
def test_compiles_without_a_break(row, backend):
    case = make_guided(row, (2, 3, 6, 5))

    def step(*arguments, **options):
        return sampler_step(*arguments, **options)

    def step_(*arguments, **options):
        return sampler_step_(*arguments, **options)

    torch.compiler.reset()
    with use_backend(backend):
        compiled, compiled_ = (torch.compile(f, fullgraph=True, backend="aot_eager") for f in (step, step_))
        pairs = [(case.run(compiled), case.run(sampler_step))]
        x, options = case.arguments[0].clone(), {**case.options, "update": case.options["update"].clone()}
        compiled_(x, *case.arguments[1:], x_start=case.history[0].clone(), x_start2=case.history[1].clone(),
                  x_start3=case.history[2].clone(), **options)  # fmt: skip
        pairs.append(({"x_next": x, "update": options["update"]}, pairs[0][1]))
    for actual, expected in pairs:
        for name, tensor in actual.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("row", ["w", "known", "everything with sums", "all"])
def test_a_tape_replays_the_rows(row):
    """Guided rows and neutral ones of one table, recorded once: the row is read at every replay."""
    recorder = recording.TapeRecorder
    assert recorder.why_not(torch.device("cpu")) is None
    case = make_guided(row, (2, 3, 9, 7))
    table = torch.cat([case.arguments[2][1:2], guided_table()[1:2], case.arguments[2][1:2]])
    step = torch.zeros(1, dtype=torch.int64)
    x, history, update = case.arguments[0].clone(), [t.clone() for t in case.history], case.options["update"].clone()
    states = dict(zip(("x_start", "x_start2", "x_start3"), history, strict=True))
    options = {**case.options, "update": update}

    def body():
        sampler_step_(x, case.arguments[1], table, step, case.arguments[4], **states, **options)
        step.add_(1)

    start = [tensor.clone() for tensor in (x, *history, update)]
    with torch.no_grad():
        replay = recorder(torch.device("cpu")).record(body, lambda: None)
        runs = []
        for run in (body, replay, replay):
            for tensor, value in zip((x, *history, update), start, strict=True):
                tensor.copy_(value)
            step.zero_()
            trace = []
            for _ in range(3):
                run()
                trace.append([tensor.clone() for tensor in (x, *history, update)])
            runs.append(trace)
    for other in runs[1:]:
        for mine, theirs in zip(runs[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert not torch.equal(runs[0][0][0], runs[0][1][0])


@pytest.mark.parametrize("step", [-1, 3, 2**40])
def test_a_step_outside_the_table_is_nan_in_the_reference_without_waiting(step):
    case = make_guided("all", (2, 3, 4, 4))
    case.options["mask"] = torch.full((2, 3, 4, 4), 0.5)
    case.arguments = (*case.arguments[:3], torch.tensor([step]), case.arguments[4])
    result = case.run(reference.sampler_step)
    assert result["x_next"].isnan().all() and result["x_start"].isnan().all()


@pytest.mark.parametrize("row", [row for row in ROWS if tensors_read(ROWS[row])])
def test_what_is_missing_is_nan_in_the_reference(row):
    for name in tensors_read(ROWS[row]) - {"mask"}:
        case = make_guided(row, (2, 3, 4, 4), only_read=True)
        case.options[name] = None
        if case.options["mask"] is not None:
            case.options["mask"] = torch.full((2, 3, 4, 4), 0.5)
        result = case.run(reference.sampler_step)
        is_momentum_alone = row == "mu without guidance"  # nothing reads it but itself
        assert result["x_next"].isnan().all() == (not is_momentum_alone), name
    if row in SUMS:
        case = make_guided(row, (2, 3, 4, 4), only_read=True)
        case.options |= {"reduces": False, "mask": None, "known": None}
        assert case.run(reference.sampler_step)["x_next"].isnan().all()


# Wrong inputs.


def call(row="w", replace=None, **options):
    def run():
        case = make_guided(row, (2, 3, 6, 6), only_read=True)
        arguments = case.arguments if replace is None else (*case.arguments[:2], replace, *case.arguments[3:])
        sampler_step(*arguments, **{**case.options, **options})

    return run


Z = torch.zeros(2, 3, 6, 6)
BAD = [
    (call(second_output=None), ValueError, "second_output must be given where w of the table is not 1, .* w = 4 in"),
    (call("kn", second_output=None), ValueError, "second_output must be given where kn of the table is not 0"),
    (call("kc", second_output=None), ValueError, "second_output must be given where kc of the table is not 0"),
    (call("mu", update=None), ValueError, "update must be given where mu of the table is not 0, got None"),
    (call("h", gradient=None), ValueError, "gradient must be given where h of the table is not 0, got None with h"),
    (call("j", gradient=None), ValueError, "gradient must be given where j of the table is not 0, got None with j"),
    (call("known", known=None), ValueError, "known must be given where A of the table is not 0, got None with A"),
    (call("known", mask=None), ValueError, "mask must be given where known is, got None"),
    (call("phi", reduces=False), ValueError, "reduces must be True where phi of the table .* False with phi = 0.7"),
    (call("eta", reduces=False), ValueError, "reduces must be True where eta of the table .* False with eta = 0.2"),
    (call("rho", reduces=False), ValueError, "reduces must be True where rho of the table .* False with rho = 3"),
    (call("kg", reduces=True), ValueError, "second_output must be given where reduces is True, got None"),
    (call(replace=torch.zeros(3, 12)), ValueError, r"table must have shape \(S, 25\) where second_output is given"),
    (call("h", replace=torch.zeros(3, 6)), ValueError, r"table must have shape \(S, 25\) where gradient is given"),
    (call(replace=torch.zeros(3, 24)), ValueError, r"table must have shape \(S, 6\), .* or \(S, 25\), columns p, q"),
    (call(second_output=1.0), TypeError, "second_output must be a tensor, got float"),
    (call(second_output=Z.half()), TypeError, "second_output must have the dtype of model_output, torch.float32, got"),
    (call(second_output=Z[:1]), ValueError, r"second_output must have the shape of x, .* got \(1, 3, 6, 6\)"),
    (call(second_output=Z.to("meta")), ValueError, "second_output must be on the device of x, cpu, got meta"),
    (call("h", gradient=Z[:, :1]), ValueError, r"gradient must have the shape of x, .* got \(2, 1, 6, 6\)"),
    (call("h", gradient=Z.double()), TypeError, "gradient must have the dtype of x, torch.float32, got torch.float64"),
    (call("mu", update=Z.half()), TypeError, "update must have the dtype of x, torch.float32, got torch.float16"),
    (call("known", known=Z[:, :, :5]), ValueError, r"known must have the shape of x, .* got \(2, 3, 5, 6\)"),
    (call("known", mask=Z.bool()), TypeError, "mask must have the dtype of x, torch.float32, got torch.bool"),
    (call("known", mask=Z[0]), ValueError, r"mask must have the shape of x, .* got \(3, 6, 6\)"),
    (call("known", mask=Z[:, :2]), ValueError, r"mask must have the shape of x, .* got \(2, 2, 6, 6\)"),
    (call("known", mask=Z[..., :1]), ValueError, r"mask must have the shape of x, .* got \(2, 3, 6, 1\)"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call, error, sentence", BAD)
def test_bad_input_gets_one_sentence(call, error, sentence, backend):
    with use_backend(backend), pytest.raises(error, match=sentence) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_update_must_be_a_tensor_of_its_own():
    case = make_guided("mu", (2, 3, 6, 6))
    for other in (case.arguments[0], case.history[0]):
        with pytest.raises(ValueError, match="update must be another tensor than x and the other states"):
            sampler_step_(*case.arguments, x_start=case.history[0], **{**case.options, "update": other})


REFUSED = {
    "second_output is neither contiguous nor channels-last": ("w", "second_output", lambda t: t.transpose(2, 3)),
    "gradient is not contiguous": ("h", "gradient", lambda t: t.transpose(2, 3)),
    "mask is not contiguous": ("known", "mask", lambda t: t.transpose(2, 3)),
    "a gradient is wanted": ("w", "second_output", lambda t: t.requires_grad_()),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_native_refuses_runs_in_the_reference(reason):
    row, name, change = REFUSED[reason]
    case = make_guided(row, (2, 3, 6, 6), only_read=True)
    case.options[name] = change(case.options[name])
    with pytest.raises(RuntimeError, match=reason):
        case.run(sampler_step)
    with use_backend(None):
        actual = case.run(sampler_step)
    expected = case.run(reference.sampler_step)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "row, options, sentence",
    [
        ("w", {"second_output": None}, "second_output is needed where w, mu, kn or kc"),
        ("w", {"second_output": Z[:1]}, "second_output must have shape"),
        ("w", {"second_output": Z.half()}, "second_output must be Float, got Half"),
        ("w", {"second_output": Z.transpose(2, 3)}, "second_output must be contiguous or channels-last"),
        ("mu", {"update": None}, "update is needed where mu"),
        ("mu", {"update": Z[:1]}, "update must have shape"),
        ("mu", {"update": Z.transpose(2, 3)}, "update must be contiguous"),
        ("h", {"gradient": None}, "gradient is needed where h or j"),
        ("j", {"gradient": Z.double()}, "gradient must be float32"),
        ("known", {"known": None}, "known is needed where A"),
        ("known", {"known": Z[:1]}, "known must have shape"),
        ("known", {"mask": Z.bool()}, "mask must be float32"),
        ("known", {"mask": Z[..., :1]}, "mask must have shape"),
        ("known", {"mask": Z.transpose(2, 3)}, "mask must be contiguous"),
        ("phi", {"reduces": False}, "reduces is needed where phi, eta or rho"),
        ("w", {"table": torch.zeros(3, 12)}, "table must have 25 columns where a step is guided or masked"),
    ],
)
def test_the_operator_itself_guards_memory(row, options, sentence):
    case = make_guided(row, (2, 3, 6, 6), only_read=True)
    names = ("second_output", "gradient", "known", "mask", "update", "reduces")
    guidance = [options.get(name, case.options[name]) for name in names]
    for name in options.keys() & set(names):
        guidance[names.index(name)] = options[name]
    x, output, table, step, seed = case.arguments
    given = (x, output, options.get("table", table), step, seed, None, None, None, None, True, 0, 1, *guidance)
    with pytest.raises((TypeError, ValueError), match=sentence):
        torch.ops.ddpm_fast.sampler_step(*given)
