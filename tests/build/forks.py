"""Python's code in processes of their own, which have torch already: its import takes longer than most code here."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from ddpm_fast.testing.isolation import alone

# A fork for each line that it reads.
SERVER = """
import json, os, sys
import torch
for line in sys.stdin:
    code, folder, output, environment = json.loads(line)
    child = os.fork()
    if not child:
        for descriptor, name in enumerate(output, 1):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        os.chdir(folder)
        os.environ.update(environment)
        sys.path.insert(0, folder)
        exec(code, {"__name__": "__main__"})
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def server() -> subprocess.Popen:
    """It ends with this process, which closes its input."""
    environment = {name: value for name, value in alone().items() if not name.startswith("DDPM_FAST_")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", SERVER], env=environment, **pipes)


def run_code(code: str, folder: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a folder, which is the first to import from; the code must not need a process without torch."""
    with tempfile.TemporaryDirectory() as scratch:
        outputs = [Path(scratch) / name for name in ("stdout", "stderr")]
        print(json.dumps([code, str(folder), [*map(str, outputs)], environment]), file=server().stdin, flush=True)
        status = int(server().stdout.readline())
        printed, errors = (file.read_text() for file in outputs)
    assert not check or status == 0, printed + errors
    return subprocess.CompletedProcess(code, status, printed, errors)
