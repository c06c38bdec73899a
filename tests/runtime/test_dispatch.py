"""Choosing an implementation: preference, refusal, force, and the table that explains it."""

from __future__ import annotations

import pytest
import torch

import ddpm_fast
from ddpm_fast.runtime import dispatch
from ddpm_fast.runtime.dispatch import Implementation, Op, use_backend


@pytest.fixture
def op(monkeypatch):
    """An op whose native implementation takes even numbers only."""
    monkeypatch.setattr(dispatch, "_ops", {})
    return Op(
        "halve",
        [
            Implementation("native", lambda n: ("native", n // 2), lambda n: None if n % 2 == 0 else f"{n} is odd"),
            Implementation("reference", lambda n: ("reference", n / 2)),
        ],
        lambda device: ((3,), {}),
    )


def test_the_first_that_accepts_runs(op):
    assert op(4) == ("native", 2)
    assert op(3) == ("reference", 1.5)


def test_forcing(op):
    with use_backend("reference"):
        assert op(4) == ("reference", 2.0)
        with use_backend("native"):
            assert op(4) == ("native", 2)
        assert op(4) == ("reference", 2.0)
    assert op(4) == ("native", 2)


def test_a_forced_backend_that_refuses_raises_with_its_reason(op):
    with (
        use_backend("native"),
        pytest.raises(RuntimeError, match="halve: backend 'native' was forced and refuses: 3 is odd"),
    ):
        op(3)


def test_an_implementation_can_yield_and_still_be_forced(monkeypatch):
    monkeypatch.setattr(dispatch, "_ops", {})
    op = Op(
        "halve",
        [
            Implementation("native", lambda n: "native", yields=lambda n: None if n < 9 else f"{n} is large"),
            Implementation("reference", lambda n: "reference"),
        ],
        lambda device: ((4,), {}),
        {"halve, large": lambda device: ((10,), {})},
    )
    assert (op(4), op(10)) == ("native", "reference")

    def rows():
        return [line.split() for line in dispatch.explain(devices=[torch.device("cpu")]).splitlines()]

    assert ["halve", "cpu", "*", "native", "accepts"] in rows()
    assert ["halve,", "large", "cpu", "native", "10", "is", "large"] in rows()
    with use_backend("native"):
        assert op(10) == "native"
        assert ["halve,", "large", "cpu", "*", "native", "10", "is", "large"] in rows()


def test_an_op_without_the_forced_backend_chooses_freely(op):
    with use_backend("triton"):
        assert op(4) == ("native", 2)


def test_a_backend_that_a_block_lacks_is_forced_on_its_steps(op):
    block = Op(
        "halve_twice",
        [Implementation("native", lambda n: ("native", n // 4)), Implementation("composite", lambda n: op(op(n)[1]))],
        lambda device: ((8,), {}),
    )
    assert block(8) == ("native", 2)
    with use_backend("reference"):
        assert block(8) == ("reference", 2.0)
        assert "* composite" in dispatch.explain(devices=[torch.device("cpu")])
    with use_backend("native"):
        assert block(8) == ("native", 2)
    with use_backend("triton"):  # the steps have none and choose freely
        assert block(8) == ("native", 2) and block.choose(8).name == "composite"
    with torch.autograd.forward_ad.dual_level():
        assert block(8) == ("reference", 2.0)


def test_plain_call_forces_until_undone(op):
    use_backend("reference")
    try:
        assert op(4)[0] == "reference"
    finally:
        use_backend(None)
    assert op(4)[0] == "native"


def test_an_exception_inside_an_implementation_is_not_swallowed(monkeypatch):
    monkeypatch.setattr(dispatch, "_ops", {})

    def fails():
        raise ZeroDivisionError

    op = Op("broken", [Implementation("native", fails), Implementation("reference", lambda: 1)], None)
    with pytest.raises(ZeroDivisionError):
        op()


def test_unknown_backend():
    with pytest.raises(ValueError, match="name must be one of triton, native, sdpa, reference or None, got 'cudnn'"):
        use_backend("cudnn")


def test_the_last_implementation_may_not_refuse():
    with pytest.raises(ValueError, match="the last implementation must accept every call"):
        Op("picky", [Implementation("native", abs, lambda x: "never")], None)
    with pytest.raises(ValueError, match="the last implementation must accept every call"):
        Op("picky", [Implementation("native", abs, yields=lambda x: "never")], None)


def test_explain_names_the_reason(op):
    text = dispatch.explain(devices=[torch.device("cpu")])
    assert "3 is odd" in text and "* reference" in text
    with use_backend("native"):
        assert "forced by use_backend: native" in dispatch.explain(devices=[torch.device("cpu")])


@pytest.mark.parametrize("given", [[torch.device("cpu")], torch.device("cpu"), "cpu", torch.zeros(1)], ids=repr)
def test_explain_takes_a_model_first(given):
    with pytest.raises(TypeError, match="model must be a network or a pipeline, got .*; devices= takes devices"):
        ddpm_fast.explain(given)


def test_explain_covers_every_op_of_the_package():
    text = ddpm_fast.explain()
    for name in ("diffusion_loss", "fill_normal_", "q_sample", "sampler_step", "sampler_step_"):
        lines = [line for line in text.splitlines() if line.startswith(name + " ")]
        assert any("reference" in line for line in lines) and sum("* " in line for line in lines) == 1


def test_forward_mode_runs_the_reference(op):
    with torch.autograd.forward_ad.dual_level():
        assert op(4) == ("reference", 2.0)
        with use_backend("native"), pytest.raises(dispatch.BackendRefused, match="forward-mode differentiation is on"):
            op(4)
    assert op(4) == ("native", 2)
