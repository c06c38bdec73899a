"""A recording that fails restores all state: captures in a stand-in for torch's CUDA, and real tapes."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ddpm_fast import GaussianDiffusion, Unet
from ddpm_fast.runtime import recording
from ddpm_fast.testing.recorders import (
    FrozenRecorder,
    Operators,
    PretendedCuda,
    PretendedCudaRecorder,
    Waits,
    WaitsInBackward,
)
from ddpm_fast.training.average import Average
from ddpm_fast.training.captured_step import TrainingStep

RELEASES = [(2, 11), (2, 13), (2, 14)]
SHAPE = (2, 3, 4, 4)


@pytest.fixture(params=RELEASES, ids=str)
def cuda(request, monkeypatch):
    found = PretendedCuda(request.param)
    found.install(monkeypatch)
    # Both read values, on the CPU only.
    monkeypatch.setattr(GaussianDiffusion, "_check_images", lambda *args, **kwargs: None)
    monkeypatch.setattr(GaussianDiffusion, "_check_times", lambda self, t, x: t)
    with Operators(found):
        yield found
    assert found.left_behind().keys() <= {"memory"}, "recordings that are kept"


class FailsAtItsEnd(torch.nn.Conv2d):
    def forward(self, x):
        super().forward(x)
        raise KeyError("not yet")


def make(recorder: type = PretendedCudaRecorder) -> GaussianDiffusion:
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(Unet(8, dim_mults=(1,), attn_heads=1, attn_dim_head=4), image_size=4, timesteps=6)
    diffusion.graphs = recording.GraphCache(recorder=recorder)
    return diffusion


def both(diffusion, batch: int = 2) -> torch.Tensor:
    """Samples, after checking that recorded and step by step they are the same bits."""
    recorded, stepped = (diffusion.sample(batch, seed=3, progress=False, graph=graph) for graph in (None, False))
    assert torch.equal(recorded, stepped)
    return recorded


def test_a_capture_that_succeeds(cuda):
    diffusion = make()
    both(diffusion)
    assert len(diffusion.graphs) == 1 and cuda.offset > 0, "the seed of a run is drawn"


def test_sampling_goes_on_after_a_capture_that_failed(cuda):
    diffusion = make()
    before = both(diffusion), both(diffusion, batch=1)
    diffusion.model.final_conv.__class__ = Waits
    sentence = (
        r"^`assert x.sum\(\).item\(\) != 12345` in forward \(recorders.py, line \d+\) cannot be captured "
        r"into a CUDA graph: CUDA error: operation not permitted when stream is capturing; graph=False runs without "
        r"one$"
    )
    for _ in range(2):
        with pytest.raises(RuntimeError, match=sentence) as error:
            diffusion.sample(1, progress=False, graph=True)
        assert cuda.left_behind() == {} and len(diffusion.graphs) == 0
        assert "not permitted" in str(error.value.__cause__)
        diffusion.sample(1, progress=False, graph=False)
    diffusion.model.final_conv.__class__ = torch.nn.Conv2d
    assert torch.equal(both(diffusion), before[0]) and torch.equal(both(diffusion, batch=1), before[1])
    assert len(diffusion.graphs) == 2


def test_the_stand_in_sees_what_a_failed_capture_leaves_behind(cuda, monkeypatch):
    """As the package was without `_forget`; the pool is the one that fails next."""
    with monkeypatch.context() as patch:
        patch.setattr(recording.CudaRecorder, "_forget", lambda self, graph, *, is_ended: None)
        recorder, number = PretendedCudaRecorder(torch.device("cpu")), torch.zeros(())
        with pytest.raises(RuntimeError, match="cannot be captured"):
            recorder.record(number.item, lambda: None)
        found = {"generator", "recording", "memory"} if cuda.release < (2, 13) else {"memory"}
        if cuda.release < (2, 14):
            assert cuda.left_behind().keys() == found
        if cuda.release < (2, 13):
            with pytest.raises(RuntimeError, match="Offset increment outside graph capture"):
                torch.rand(())
            with pytest.raises(RuntimeError, match="already recording"):
                recorder.record(number.zero_, lambda: None)
    cuda.generator_captures, cuda.recording_pools = False, []


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), torch.OutOfMemoryError("CUDA out of memory")])
@pytest.mark.parametrize("spoils", [False, True])
def test_errors_of_a_bodys_own_keep_their_type(cuda, error, spoils):
    recorder, number = PretendedCudaRecorder(torch.device("cpu")), torch.zeros(())

    def body():
        if cuda.capture is not None:
            cuda.capture.is_spoilt = spoils
            raise error

    for _ in range(2):
        with pytest.raises(type(error)) as found:
            recorder.record(body, lambda: None)
        assert found.value is error and cuda.left_behind() == {}
    recorder.record(number.zero_, lambda: None)
    torch.rand(())


def test_a_capture_that_fails_without_an_error_of_the_bodys(cuda):
    """A library has swallowed the error."""
    recorder = PretendedCudaRecorder(torch.device("cpu"))

    def body():
        if cuda.capture is not None:
            cuda.capture.is_spoilt = True

    with pytest.raises(RuntimeError, match="cannot be captured.*previous error during capture; graph=False runs"):
        recorder.record(body, lambda: None)
    assert cuda.left_behind() == {}


def test_what_fails_before_a_capture_is_no_captures_fault(cuda):
    recorder, number = PretendedCudaRecorder(torch.device("cpu")), torch.zeros(2)
    with pytest.raises(RuntimeError, match="shape '\\[3\\]' is invalid"):
        recorder.record(lambda: number.view(3), lambda: None)
    assert cuda.left_behind() == {}


def adam(diffusion):
    return torch.optim.Adam(diffusion.parameters(), torch.tensor(1e-2), fused=True, capturable=True)


def step_of(diffusion, recorder=PretendedCudaRecorder) -> TrainingStep:
    options = {"ema": None, "max_grad_norm": 1.0, "autocast": None, "any_module": True}
    return TrainingStep(diffusion, adam(diffusion), SHAPE, recorder=recorder, **options)


@pytest.mark.parametrize("culprit", [Waits, WaitsInBackward])
def test_training_goes_on_after_a_capture_that_failed(cuda, culprit):
    ours, plain = make(), make()
    step, plain_step = step_of(ours), step_of(plain, recording.EagerRecorder)
    images = torch.rand(SHAPE)

    def check() -> None:
        for each in (step, plain_step):
            torch.manual_seed(5)
            each(images)
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))

    check()
    ours.model.final_conv.__class__ = culprit
    before = [parameter.detach().clone() for parameter in ours.parameters()]
    where = "assert x.sum" if culprit is Waits else "return grad \\* "
    with pytest.raises(RuntimeError, match=f"^`{where}.*cannot be captured.*graph=False runs without one"):
        step(images)
    assert cuda.left_behind() == {}
    assert all(parameter.grad is None for parameter in ours.parameters())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), before, strict=True))
    ours.model.final_conv.__class__ = torch.nn.Conv2d
    check()
    check()


class FailsOnce(FrozenRecorder):
    def record(self, body, reset):
        if self.fails:
            self.fails = False
            raise RuntimeError("cannot be captured")
        return super().record(body, reset)


def test_an_average_whose_beginning_failed_begins_at_the_next_step():
    from ema_pytorch import EMA

    diffusion = make()
    ema = EMA(diffusion, update_every=1, update_after_step=0)
    FailsOnce.fails = True
    average = Average(ema, diffusion.device, FailsOnce)
    with torch.no_grad():
        diffusion.model.final_conv.bias.fill_(7)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        average.begin()
        average.finish()
    assert not ema.initted and ema.step == 0
    average.begin()
    average.finish()
    assert (
        ema.initted
        and ema.step == 1
        and torch.equal(ema.ema_model.model.final_conv.bias, diffusion.model.final_conv.bias)
    )


def tapes_can_be_made() -> str | None:
    return recording.TapeRecorder.why_not(torch.device("cpu"))


@pytest.mark.skipif(tapes_can_be_made() is not None, reason=str(tapes_can_be_made()))
class TestTapes:
    def test_a_body_that_raises_is_written_down_anew(self):
        out, numbers = torch.zeros(2), torch.tensor([1.0, 2.0])
        state = {"fails": True}

        def body():
            out.copy_(numbers * 2)
            if state["fails"]:
                raise KeyError("not yet")
            out.add_(1)

        replay = recording.TapeRecorder(torch.device("cpu")).record(body, lambda: None)
        with pytest.raises(KeyError):
            replay()
        assert _get_current_dispatch_mode() is None
        state["fails"] = False
        for _ in range(3):  # written down, and called again
            numbers += 1
            replay()
            assert torch.equal(out, numbers * 2 + 1)

    def test_sampling_goes_on_after_a_tape_that_failed(self):
        diffusion = make(recording.TapeRecorder)
        before = both(diffusion)
        diffusion.model.final_conv.__class__ = FailsAtItsEnd
        with pytest.raises(KeyError):
            diffusion.sample(2, progress=False, graph=True)
        assert _get_current_dispatch_mode() is None and len(diffusion.graphs) == 0
        diffusion.model.final_conv.__class__ = torch.nn.Conv2d
        assert torch.equal(both(diffusion), before)
