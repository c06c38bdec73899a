"""Forms of a computation: which one runs where, and what is measured."""

from __future__ import annotations

import contextlib
from threading import Thread
from time import sleep

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ddpm_fast.runtime import dispatch, measured, recording
from ddpm_fast.runtime.measured import COMPILE, FUSED, LOOK_UP, MEASURE, SEPARATE, use_form
from ddpm_fast.testing.recorders import PretendedCuda, PretendedCudaRecorder

X = torch.empty(1)


@pytest.fixture(autouse=True)
def clean():
    measured.forget()
    yield
    measured.forget()


@pytest.fixture
def timed(monkeypatch):
    """Forms that say when they run, and the seconds that a measurement finds."""
    seconds, ran = {FUSED: 2e-4, SEPARATE: 3e-4}, []

    def form(name):
        def call():
            ran.append(name)
            return name

        call.seconds = name
        return call

    def time(call):
        call()
        return seconds[call.seconds]

    monkeypatch.setattr(measured, "_timed", time)
    return seconds, ran, {name: form(name) for name in (FUSED, SEPARATE)}


def test_outside_of_loops_they_are_separate(timed):
    _, ran, forms = timed
    assert measured.run("op", 1, forms, measured.way(), X) == SEPARATE
    assert ran == [SEPARATE]


@pytest.mark.parametrize("faster", [FUSED, SEPARATE])
def test_the_faster_one_is_measured_once_and_looked_up(timed, faster):
    seconds, ran, forms = timed
    seconds[faster] = 1e-4
    with measured.stage(MEASURE):
        how = measured.way()
        assert measured.run("op", 1, forms, how, X) == faster
        began = len(ran)
        assert began >= 2 * measured._ROUNDS
        seconds[faster] = 1.0
        assert measured.run("op", 1, forms, how, X) == faster and len(ran) == began + 1
    with measured.stage(LOOK_UP):
        assert measured.run("op", 1, forms, measured.way(), X) == faster
        assert measured.run("op", 2, forms, measured.way(), X) == SEPARATE
        assert measured.run("other", 1, forms, measured.way(), X) == SEPARATE
    assert len(ran) == began + 4


def test_of_about_equals_the_separate_one(timed):
    seconds, _, forms = timed
    for i, (share, form) in enumerate([(1.0, SEPARATE), (0.96, SEPARATE), (0.94, FUSED)]):
        seconds[FUSED] = share * seconds[SEPARATE]
        assert measured.run("op", i, forms, MEASURE, X) == form


def test_compiling_runs_both_and_measures_nothing(timed):
    _, ran, forms = timed
    assert measured.run("op", 1, forms, COMPILE, X) == SEPARATE
    assert sorted(ran) == [FUSED, SEPARATE] and not measured._choices


def test_a_setting_decides_and_deterministic_algorithms_measure_nothing(timed):
    _, ran, forms = timed
    with measured.stage(MEASURE):
        for name in (FUSED, SEPARATE):
            with use_form(name):
                assert measured.run("op", 1, forms, measured.way(), X) == name
        torch.use_deterministic_algorithms(True)
        try:
            assert measured.run("op", 1, forms, measured.way(), X) == SEPARATE
        finally:
            torch.use_deterministic_algorithms(False)
    assert len(ran) == 3 and measured.setting() == (measured.MEASURED,) and measured.way() == SEPARATE
    with pytest.raises(ValueError, match="name must be one of fused, separate, measured, got 'fast'"):
        use_form("fast")


def test_a_recording_measures_and_looks_up(monkeypatch):
    """The stages of the calls of a body; a recording depends on the setting."""
    seen: list[str] = []
    PretendedCuda((2, 14)).install(monkeypatch)
    PretendedCudaRecorder(torch.device("cpu")).record(lambda: seen.append(measured.way()), lambda: None)
    assert seen == [*[MEASURE] * recording._WARM_UPS, LOOK_UP] and measured.way() == SEPARATE
    before = recording.settings()
    with use_form(FUSED):
        assert recording.settings() != before


def test_explain_names_the_choices(timed):
    _, _, forms = timed
    assert "fused or separate: in training and sampling on CUDA the faster one, as measured" in dispatch.explain()
    measured.run("conv_norm", ("cuda:0", (1, 2)), forms, MEASURE, X)
    assert "conv_norm ('cuda:0', (1, 2)): fused (fused 200.0 us, separate 300.0 us)" in dispatch.explain()
    with use_form(SEPARATE):
        assert "fused or separate: separate, by use_form" in dispatch.explain()


def test_steps_on_a_card_measure_and_others_do_not():
    with measured.steps_on(torch.device("cuda", 0)):
        assert measured.way() == MEASURE
        with measured.stage(LOOK_UP):
            assert measured.way() == LOOK_UP
        assert measured.way() == MEASURE
    with measured.steps_on(torch.device("cpu")):
        assert measured.way() == SEPARATE


def test_the_clock_is_that_of_the_tensors_device(timed, monkeypatch):
    _, _, forms = timed
    entered: list[torch.Tensor] = []

    @contextlib.contextmanager
    def device_of(x):
        entered.append(x)
        yield
        entered.append(None)

    time = measured._timed
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(measured, "_timed", lambda call: time(call) if entered == [X] else pytest.fail("elsewhere"))
    measured.run("op", 1, forms, MEASURE, X)
    assert entered == [X, None]


def test_threads_measure_one_after_another(timed, monkeypatch):
    _, _, forms = timed
    time, inside, most = measured._timed, [], []

    def timed_slowly(call):
        inside.append(call)
        most.append(len(inside))
        sleep(1e-3)
        inside.pop()
        return time(call)

    monkeypatch.setattr(measured, "_timed", timed_slowly)
    keys = [1, 1, 2, 3]
    threads = [Thread(target=measured.run, args=("op", key, forms, MEASURE, X)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) == 2 * measured._ROUNDS * len(set(keys))


def test_ranks_agree_on_the_choices_of_the_first(timed):
    _, _, forms = timed
    measured.run("op", 1, forms, MEASURE, X)  # fused
    measured.agree([{"op 1": FUSED}, {"op 2": SEPARATE}])
    assert measured.setting() == (measured.MEASURED,), "no rank has chosen otherwise: recordings go on"
    measured.agree([{"op 1": SEPARATE, "op 3": FUSED}, {"op 1": FUSED}])
    assert measured.run("op", 1, forms, MEASURE, X) == SEPARATE
    assert measured.chosen() == {"op 1": SEPARATE, "op 3": FUSED}


def test_fake_tensors_are_not_timed():
    with measured.stage(MEASURE):
        assert measured.way(torch.empty(1)) == MEASURE
        with FakeTensorMode():
            x = torch.empty(1)
            assert measured.way(x) == SEPARATE
            with use_form(FUSED):
                assert measured.way(x) == FUSED


def test_a_capture_of_the_users_own_measures_nothing(timed, monkeypatch):
    _, ran, forms = timed
    monkeypatch.setattr(measured, "_is_capturing", lambda: True)
    assert measured.run("op", 1, forms, MEASURE, X) == SEPARATE and ran == [SEPARATE]


@pytest.mark.parametrize("form", [FUSED, SEPARATE])
def test_the_choices_of_a_checkpoint_hold(timed, form):
    seconds, ran, forms = timed
    seconds[form] = 1e-4
    measured.run("op", ("card", (1, 2)), forms, MEASURE, X)
    kept = measured.chosen()
    assert kept == {"op ('card', (1, 2))": form}
    measured.forget()
    seconds[form] = 1.0  # another measurement would find the other one
    before = recording.settings()
    measured.adopt(kept)
    assert recording.settings() != before
    ran.clear()
    assert measured.run("op", ("card", (1, 2)), forms, MEASURE, X) == form and ran == [form]
    assert f"op ('card', (1, 2)): {form}, as a checkpoint or rank 0 has it" in dispatch.explain()
    assert measured.run("op", ("card", (3, 4)), forms, MEASURE, X) != form
    assert measured.chosen() == {**kept, "op ('card', (3, 4))": FUSED if form == SEPARATE else SEPARATE}
    measured.adopt({})
    assert measured.run("op", ("card", (1, 2)), forms, MEASURE, X) != form
