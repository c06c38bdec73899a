"""What `accelerate` saves on CUDA, counted on meta tensors, and the benchmark's table."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import bench_foreign  # noqa: E402
from cuda_model import foreign  # noqa: E402

from ddpm_fast.measure.foreign import NETWORKS  # noqa: E402
from ddpm_fast.testing.foreign_packages import import_edm  # noqa: E402


@pytest.mark.gate
@pytest.mark.parametrize("name", NETWORKS)
def test_counts(gate, name):
    if name.startswith("edm"):
        import_edm()
    counts = foreign.count(name)
    assert counts.operators <= 0.5 and counts.bytes_moved <= 0.6
    gate("accelerated", f"{name}, training step: operators over eager's", counts.operators)
    gate("accelerated", f"{name}, training step: bytes over eager's", counts.bytes_moved)


def test_rows_of_the_benchmark():
    timings = {"eager": {"median": 2.0}, "accelerated": {"median": 0.5}}
    result = {"batch": 8, "phases": {"training step": timings, "forward": timings}}
    first, second = bench_foreign.rows("torchcfm", result, (2.2, 2.5))
    assert first == ["torchcfm, batch 8", "training step", "2000", "500", "4.00", "2.2"] and second[-1] == "2.5"
    timings["ours"] = {"median": 0.5}
    (first, _) = bench_foreign.rows("upstream", result, None)
    assert first[-1] == "3.80"
