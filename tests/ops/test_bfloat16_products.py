"""Products of bfloat16 pairs, on processors that have the instructions: what they compute and what they leave alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from ddpm_fast import explain, use_backend
from ddpm_fast.ops.attention_block.op import group_norm_attention_block
from ddpm_fast.ops.linear_attention.op import linear_attention
from ddpm_fast.ops.linear_attention_block.op import linear_attention_block
from ddpm_fast.ops.norm_linear.op import linear, linear_residual, norm_linear
from ddpm_fast.ops.preactivation_block.op import preactivation_block
from ddpm_fast.ops.resnet_block.op import resnet_block
from ddpm_fast.runtime import extension
from ddpm_fast.testing import attention_block_cases
from ddpm_fast.testing.native_cases import CHANNELS_LAST, PAIRS, instruction_sets, instructions, threads
from ddpm_fast.testing.truth import assert_close_to_truth, poisoned_memory

pytestmark = pytest.mark.skipif(
    PAIRS not in instruction_sets((PAIRS,)),
    reason="this build or processor has no AVX512_BF16 (or the extension is missing)",
)


@pytest.fixture(autouse=True)
def pairs() -> Iterator[None]:
    with instructions(PAIRS):
        yield


def random(seed: int) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        tensor = torch.randn(*size, generator=generator)
        return tensor.contiguous(memory_format=CHANNELS_LAST) if len(size) == 4 and size[2:] != (1, 1) else tensor

    return normal


def linear_case(C: int, skip: int, K: int, rows: int, bias: bool = True) -> tuple[Callable, dict]:
    normal = random(C + K)
    tensors = {"x": normal(2, C, rows, 3), "weight": normal(K, C + skip, 1, 1) / (C + skip) ** 0.5}
    if skip:
        tensors["skip"] = normal(2, skip, rows, 3)
    if bias:
        tensors["bias"] = normal(K)

    def call(x, weight, skip=None, bias=None):
        return linear(x if skip is None else (x, skip), weight, bias)

    return call, tensors


def residual_case() -> tuple[Callable, dict]:
    normal = random(1)
    tensors = {"x": normal(2, 24, 5, 5), "weight": normal(40, 24, 1, 1) / 5, "bias": normal(40)}
    return linear_residual, tensors | {"residual": normal(2, 40, 5, 5)}


def norm_case(B: int, C: int, K: int, H: int, W: int) -> tuple[Callable, dict]:
    normal = random(C + K + H)
    tensors = {"x": 2 * normal(B, C, H, W) + 0.5, "gain": 1 + 0.3 * normal(1, C, 1, 1)}
    return norm_linear, tensors | {"weight": normal(K, C, 1, 1) / C**0.5}


def attention_case(block: bool, B, heads, D, C, M, H, W) -> tuple[Callable, dict]:
    normal, hidden = random(B + C), heads * D
    tensors = {"x": normal(B, C, H, W), "gain_in": 1 + 0.3 * normal(1, C, 1, 1)} if block else {}
    tensors |= {"weight_qkv": normal(3 * hidden, C, 1, 1) / C**0.5} if block else {"qkv": normal(B, 3 * hidden, H, W)}
    tensors |= {"mem_kv": normal(2, heads, D, M), "weight": normal(C, hidden, 1, 1) / hidden**0.5}
    tensors |= {"bias": 0.5 * normal(C), "gain": 1 + 0.3 * normal(1, C, 1, 1), "residual": normal(B, C, H, W)}
    op = linear_attention_block if block else linear_attention
    return (lambda **given: op(**given, heads=heads)), tensors


def group_attention_case(shape: tuple[int, ...], groups: int, **options) -> tuple[Callable, dict]:
    """shape: B, heads, D, C, h, w."""
    tensors, given = attention_block_cases.make(shape, groups=groups, output_scale=0.5**0.5, **options)
    return (lambda **leaves: group_norm_attention_block(**leaves, **given)), tensors


def block_case(op: Callable, C: int, skip: int, K: int) -> tuple[Callable, dict]:
    normal = random(C)

    def weight(out, inputs, side):
        return normal(out, inputs, side, side) / (inputs * side * side) ** 0.5

    tensors = {"x": normal(2, C, 6, 5), "weight1": weight(K, C + skip, 3), "weight2": weight(K, K, 3)}
    tensors |= {"bias1": normal(K), "bias2": normal(K), "res_weight": weight(K, C + skip, 1), "res_bias": normal(K)}
    if skip:
        tensors["skip"] = normal(2, skip, 6, 5)
    if op is preactivation_block:
        tensors |= {"gain1": 1 + 0.3 * normal(C + skip), "offset1": normal(C + skip)}
        tensors |= {"gain2": 1 + 0.3 * normal(K), "offset2": normal(K)}
        return (lambda **given: op(**given, groups1=1, groups2=1)), tensors
    return op, tensors | {"gain1": 1 + 0.3 * normal(1, K, 1, 1), "gain2": 1 + 0.3 * normal(1, K, 1, 1)}


CASES = {
    "linear": lambda: linear_case(64, 0, 96, 7),
    "linear, odd": lambda: linear_case(33, 0, 17, 5),
    "linear, one of each": lambda: linear_case(1, 0, 1, 1),
    "linear of two": lambda: linear_case(34, 17, 50, 9),
    "linear of two, the first odd": lambda: linear_case(17, 34, 50, 9),
    "linear, 4 KB apart": lambda: linear_case(2048, 0, 70, 3, bias=False),
    "linear_residual": residual_case,
    "norm_linear": lambda: norm_case(2, 64, 96, 9, 7),
    "norm_linear, an odd row": lambda: norm_case(2, 33, 96, 3, 5),
    "norm_linear, an odd output": lambda: norm_case(1, 34, 97, 3, 5),
    "norm_linear, one pair": lambda: norm_case(1, 2, 2, 1, 1),
    "norm_linear, parts of panels": lambda: norm_case(3, 50, 38, 1, 67),
    "norm_linear, rows in segments": lambda: norm_case(1, 70, 34, 51, 41),
    "norm_linear, 4 KB apart": lambda: norm_case(1, 2048, 6, 5, 5),
    "attention tail": lambda: attention_case(False, 3, 2, 8, 3, 1, 1, 3),
    "attention tail, groups": lambda: attention_case(False, 2, 4, 32, 64, 4, 33, 17),
    "attention block": lambda: attention_case(True, 3, 4, 32, 64, 4, 7, 7),
    "attention block, odd": lambda: attention_case(True, 1, 3, 5, 17, 2, 7, 1),
    "attention block, a sample alone": lambda: attention_case(True, 1, 3, 10, 66, 2, 13, 11),
    "attention block, groups": lambda: attention_case(True, 2, 4, 32, 65, 4, 33, 17),
    "group attention block": lambda: group_attention_case((2, 4, 32, 64, 7, 7), 8),
    "group attention block, odd": lambda: group_attention_case((2, 3, 5, 17, 7, 1), 1, order="h3d", residual=False),
    "group attention block, one of each": lambda: group_attention_case((1, 1, 1, 1, 1, 1), 0, biases=False),
    "group attention block, several goes": lambda: group_attention_case((3, 2, 20, 33, 24, 25), 3),
    "group attention block, folded": lambda: group_attention_case((3, 1, 24, 24, 6, 5), 4),
    "group attention block, folded, odd": lambda: group_attention_case((9, 1, 17, 17, 12, 13), 0, biases=False),
    "group attention block, folded, tiles": lambda: group_attention_case((1, 1, 40, 40, 33, 17), 5),
    "resnet_block": lambda: block_case(resnet_block, 16, 8, 32),
    "preactivation_block": lambda: block_case(preactivation_block, 16, 8, 32),
}
MAPS = ("x", "skip", "qkv", "residual")


def results(call: Callable, tensors: dict, backend: str = "native") -> dict[str, torch.Tensor]:
    """The output and the gradient of every tensor, with poisoned memory: what is not written is NaN."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    with poisoned_memory():
        with use_backend(backend):
            out = call(**leaves)
        # The gradient of a bfloat16 map, exact in every type.
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).bfloat16().to(out.dtype)
        gradients = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"out": out.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}


def narrowed(tensors: dict, dtype: torch.dtype, only: tuple[str, ...] | None = None) -> dict:
    return {name: t.to(dtype) if only is None or name in only else t for name, t in tensors.items()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("parameters", ["float32", "bfloat16"])
def test_equals_the_reference(name, parameters):
    """Four units in the last place of a bfloat16 map, for gradients of parameters in float32, too."""
    call, tensors = CASES[name]()
    tensors = narrowed(tensors, torch.bfloat16, None if parameters == "bfloat16" else MAPS)
    actual, expected = results(call, tensors), results(call, tensors, "reference")
    truth = results(call, {key: tensor.double() for key, tensor in tensors.items()}, "reference")
    for key in truth:
        units = torch.finfo(torch.bfloat16).eps / torch.finfo(actual[key].dtype).eps
        assert_close_to_truth(actual[key], expected[key], truth[key], floor=4 * units, name=key)


@pytest.mark.parametrize("name", CASES)
def test_other_types_are_computed_as_without_them(name):
    call, tensors = CASES[name]()
    for dtype in (torch.float32, torch.float16):
        given = narrowed(tensors, dtype, MAPS)
        actual = results(call, given)
        with instructions("avx512"):
            expected = results(call, given)
        for key in expected:
            assert torch.equal(actual[key], expected[key]), (key, dtype)


@pytest.mark.parametrize(
    "name",
    ["linear", "linear of two", "norm_linear", "attention tail", "attention block", "group attention block"]
    + ["group attention block, folded", "resnet_block"],
)
def test_they_are_used(name):
    """Weights in float32 lose their digits in the products of bfloat16 alone."""
    call, tensors = CASES[name]()
    given = narrowed(tensors, torch.bfloat16, MAPS)
    actual = results(call, given)
    with instructions("avx512"):
        wide = results(call, given)
    assert any(not torch.equal(actual[key], wide[key]) for key in wide)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("linear")])
def test_a_product_of_bfloat16_is_exact_but_for_its_sum(name):
    """Factors that are bfloat16 already: the sums are float32, so that rounding them differs by one unit at most."""
    call, tensors = CASES[name]()
    given = narrowed(tensors, torch.bfloat16)
    actual = results(call, given)
    with instructions("avx512"):
        wide = results(call, given)
    for key in ("out", "dx"):
        a, b = actual[key].float(), wide[key].float()
        assert (a != b).float().mean() <= 0.02, key
        assert ((a - b).abs() <= 2**-7 * b.abs() + 1e-5 * b.abs().max()).all(), key


@pytest.mark.parametrize(
    "name",
    ["linear of two", "norm_linear, rows in segments", "attention tail, groups", "attention block, groups"]
    + [f"group attention block, {name}" for name in ("several goes", "folded, odd", "folded, tiles")],
)
def test_the_number_of_threads_changes_nothing(name):
    call, tensors = CASES[name]()
    given = narrowed(tensors, torch.bfloat16, MAPS)
    found = []
    for count in (1, 2, 3, 5, 7):
        with threads(count):
            found.append(results(call, given))
    for other in found[1:]:
        assert all(torch.equal(found[0][key], other[key]) for key in other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad):
    call, tensors = CASES["linear"]()
    given = narrowed(tensors, torch.bfloat16)
    given["x"][0, 3, 1, 1] = bad
    actual, expected = results(call, given), results(call, given, "reference")
    for key in expected:
        assert torch.equal(actual[key].isfinite(), expected[key].isfinite()), key


def test_explain_names_them():
    assert extension.instruction_set() == PAIRS
    assert f"uses the instruction set {PAIRS}" in str(explain())
