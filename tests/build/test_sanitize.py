"""A few of the native tests under AddressSanitizer and UndefinedBehaviorSanitizer: `make release-tests`, since the
instrumented build takes minutes. `make sanitize` runs all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sanitize

from ddpm_fast.testing.isolation import alone


@pytest.mark.slow
@pytest.mark.release
def test_a_sample_of_the_native_tests_under_sanitizers(tmp_path):
    try:
        sanitize.libraries()
    except sanitize.SanitizerUnavailable as reason:
        pytest.skip(str(reason))
    command = [sys.executable, sanitize.__file__, "--folder", str(tmp_path), "--every", "9", "--seconds", "12"]
    result = subprocess.run(command, env=alone(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
    assert " passed" in result.stdout


def test_every_native_source_is_among_what_runs():
    sources = {source.stem for source in (sanitize.ROOT / "csrc" / "cpu" / "ops").glob("*.cpp")} - {"register"}
    tested = {Path(name).parent.name for name in sanitize.native_tests(sanitize.ROOT)}
    assert sources <= tested, sources - tested


def test_a_copy_takes_changed_files_and_drops_those_that_are_gone(tmp_path):
    sanitize.copy_sources(tmp_path)
    assert not list(tmp_path.rglob("*.so")) and not list(tmp_path.rglob("_build_info.json"))
    names = sanitize.native_tests(tmp_path)
    assert {"tests/ops/noise/test_native.py", "tests/ops/sampler_step/test_op.py"} <= set(names)
    gone, source = tmp_path / "csrc" / "core" / "gone.cpp", Path(sanitize.ROOT) / "csrc" / "core" / "philox.h"
    gone.write_text("")
    (tmp_path / "csrc" / "core" / "philox.h").write_text("")
    sanitize.copy_sources(tmp_path)
    assert not gone.exists() and (tmp_path / "csrc" / "core" / "philox.h").read_text() == source.read_text()
    assert (tmp_path / "csrc" / "core" / "philox.h").stat().st_mtime == pytest.approx(source.stat().st_mtime)
