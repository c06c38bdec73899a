"""How long processes wait for each other: for one that never comes, and for one that samples."""

from __future__ import annotations

import subprocess
from pathlib import Path

from forks import run_code
from torch import distributed

# Ranks of two, each a fork of one process, which has imported what takes longest.
RANKS = """
import os
from datetime import timedelta
from torch import distributed
from ddpm_fast.training import accelerator

accelerator._LONGEST_START = timedelta(seconds={seconds})
accelerator._LONGEST_WAIT = timedelta(hours=3)
children = []
for rank in range({ranks}):
    children.append(os.fork())
    if not children[-1]:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        if {group!r} == "the user's":
            distributed.init_process_group("gloo", timeout=timedelta(hours=1))
        made = accelerator.make_accelerator("no", True, False)
        made.wait_for_everyone()
        waits = distributed.group.WORLD._get_backend(made.device).options._timeout
        os.write(1, f"{{waits}}{{os.linesep}}".encode())  # print() may write twice, and ranks share a file
        made.end_training()
        raise SystemExit
for child in children:
    os.waitpid(child, 0)
"""


def run(folder: Path, ranks: int, seconds: float, group: str = "") -> subprocess.CompletedProcess:
    """As torchrun starts the first ranks of two."""
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    variables |= {"TORCHELASTIC_RESTART_COUNT": 0, "WORLD_SIZE": 2, "OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": ""}
    environment = {name: str(value) for name, value in variables.items()}
    return run_code(RANKS.format(ranks=ranks, seconds=seconds, group=group), folder, **environment)


def test_a_process_that_never_comes_ends_the_others(tmp_path):
    done = run(tmp_path, 1, seconds=3)  # in which it has to reach the store on any machine
    assert not done.stdout and "DistStoreError: wait timeout after 3000ms" in done.stderr, done.stderr


def test_once_all_have_come_they_wait_for_the_one_that_samples(tmp_path):
    assert run(tmp_path, 2, seconds=600).stdout == "3:00:00\n" * 2


def test_a_group_of_the_users_keeps_its_timeout(tmp_path):
    assert run(tmp_path, 2, seconds=600, group="the user's").stdout == "1:00:00\n" * 2
