"""Known and assumed rates of the GPUs, per second; a report from such a card is to replace the assumed ones."""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

from cuda_model.driver import target_of
from ddpm_fast.measure.traffic import H100_BYTES_PER_SECOND


@dataclass(frozen=True)
class Card:
    """A GPU.

    Args:
        peak: dense matrix products by dtype. Source: NVIDIA's datasheet.
        memory: bandwidth. Source: NVIDIA's datasheet.
        processors: multiprocessors. Source: NVIDIA's datasheet.
        copy: bandwidth that a large copy reaches, bytes read and written.
        share: assumed, of the bf16 peak, that cuDNN's convolutions reach, by the fewer of input and output channels:
            each entry holds up to its number of channels.
        launch: assumed, seconds of a launch that does next to nothing, in a CUDA graph.
        call: assumed, seconds of the host in the driver's call of a launch, which host.py leaves out.
    """

    name: str
    target: GPUTarget
    peak: dict[str, float]
    memory: float
    processors: int
    copy: float
    share: dict[int, float]
    launch: float = 2e-6
    call: float = 2.5e-6

    def rate(self, dtype: str, channels: int) -> float:
        """Floating-point operations of a convolution of so many channels."""
        widths = [width for width in self.share if channels <= width]
        return self.share[min(widths, default=max(self.share))] * self.peak[dtype]


# Shares of the peak that the outside review of 2026-11-28 estimated: 30, 300, 420, 480 and 520 TFLOP/s on an H100.
_SHARE = {8: 0.03, 64: 0.30, 128: 0.42, 256: 0.49, 512: 0.53}
WEIGHT_GRADIENT = 0.75  # of a convolution's rate, the same review
BIAS_GRADIENT = 0.6  # of the copy's bandwidth, the same review

H100 = Card(
    "H100 SXM",
    target_of("sm_90"),
    peak={"bf16": 989e12, "fp32": 494e12},  # fp32 convolutions run in TF32, torch's default
    memory=3.35e12,
    processors=132,
    copy=H100_BYTES_PER_SECOND,
    share=_SHARE,
)
# Copies and convolutions are assumed to reach the H100's shares of the peaks.
A100 = Card(
    "A100 SXM 80 GB",
    target_of("sm_80"),
    peak={"bf16": 312e12, "fp32": 156e12},
    memory=2.039e12,
    processors=108,
    copy=2.039e12 * H100_BYTES_PER_SECOND / 3.35e12,
    share=_SHARE,
)
CARDS = (H100, A100)
