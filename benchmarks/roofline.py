"""The launches of a training step and a sampling step on CUDA, and the times of their parts on two GPUs.

    python benchmarks/roofline.py [--keep FILE]         what `make cuda-model` prints; about a minute, no GPU

Launches, bytes and operations are counted (cuda_model/recorder.py), the host's time is measured with launches that do
nothing (cuda_model/host.py), and times on the GPUs follow from those and from assumptions, which are printed, too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import triton
from cuda_model import host, roofline, steps
from cuda_model.cards import H100
from cuda_model.roofline import Named
from network_cases import SEED

from ddpm_fast.runtime.measured import SEPARATE


def report() -> str:
    """Markdown."""
    torch.set_num_threads(1)
    network = f"Unet({SEED['dim']}, {SEED['dim_mults']}), {steps.IMAGE_SIZE}x{steps.IMAGE_SIZE}"
    measured = host.measure_steps(H100.target, "bf16")
    named = []
    for dtype, what in (("bf16", "bf16 autocast"), ("fp32", "fp32 (TF32 convolutions)")):
        batch = steps.TRAINING_BATCH
        step = steps.record_training(H100.target, batch, dtype)
        title = f"Training step: {network}, batch {batch}, {what}; loss, backward, clipping, fused Adam"
        named.append(Named(title, step, dtype, batch, measured["training"] if dtype == "bf16" else None))
    batch = steps.SAMPLING_BATCH
    step = steps.record_sampling(H100.target, batch, "bf16")
    title = f"Sampling step: {network}, batch {batch}, bf16 autocast; one call of the network and the sampler's update"
    named.append(Named(title, step, "bf16", batch, measured["sampling"]))
    apart = [record(H100.target, form=SEPARATE) for record in (steps.record_training, steps.record_sampling)]
    training, sampling = (
        {**one.step.variants, **other.variants} for one, other in zip((named[0], named[2]), apart, strict=True)
    )
    both = len(training | sampling)
    cold = (
        f"Cold start: a first training step compiles {len(training)} kernels, a first sampling step {len(sampling)}, "
        f"both together {both}; benchmarks/precompile.py compiles them ahead."
    )
    eager = host.against_upstream(H100.target)
    hosts = (
        f"The host's time of an eager training step, bf16, foreach Adam: {1e3 * eager['ours']:.1f} ms, upstream "
        f"{1e3 * eager['upstream']:.1f} ms."
    )
    forms = (
        "In half types 3x3 convolutions with up to 128 outputs are counted with their norms in them, conv_norm above: "
        "the form that a card would have to find faster. With separate convolutions and norms the training step moves "
        f"{apart[0].bytes_moved / 1e9:.2f} GB in {apart[0].count} launches, the sampling step "
        f"{apart[1].bytes_moved / 1e9:.2f} GB in {apart[1].count}."
    )
    versions = f"torch {torch.__version__}, Triton {triton.__version__}; the time of a step on a GPU is estimated."
    tables = (roofline.table(one) for one in named)
    return "\n\n".join(["# A CUDA step without a GPU", versions, *tables, forms, hosts, cold, roofline.assumptions()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--keep", type=Path, metavar="FILE", help="write what is printed there, too")
    options = parser.parse_args()
    text = report()
    print(text)
    if options.keep:
        options.keep.write_text(text + "\n")


if __name__ == "__main__":
    main()
