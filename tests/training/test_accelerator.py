"""How long processes wait for each other: for one that never comes, and for one that samples."""

import os
import subprocess
import sys

from torch import distributed

RANK = """
import sys
from datetime import timedelta
from torch import distributed
from ddpm_fast.training import accelerator

accelerator._LONGEST_START = timedelta(seconds=float(sys.argv[1]))
accelerator._LONGEST_WAIT = timedelta(hours=3)
if sys.argv[2] == "the user's":
    distributed.init_process_group("gloo", timeout=timedelta(hours=1))
made = accelerator.make_accelerator("no", True, False)
made.wait_for_everyone()
print(distributed.group.WORLD._get_backend(made.device).options._timeout)
made.end_training()
"""


def start(rank: int, store: distributed.TCPStore, seconds: float, group: str = "") -> subprocess.Popen:
    """A process of two, as torchrun starts it."""
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    variables |= {"TORCHELASTIC_RESTART_COUNT": 0, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-c", RANK, str(seconds), group],
        env=environment | {name: str(value) for name, value in variables.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def make_store() -> distributed.TCPStore:
    return distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_a_process_that_never_comes_ends_the_others():
    store = make_store()
    said, error = start(0, store, seconds=1).communicate(timeout=120)
    assert not said and "DistStoreError: wait timeout after 1000ms" in error, error


def test_once_all_have_come_they_wait_for_the_one_that_samples():
    store = make_store()
    ranks = [start(rank, store, seconds=100) for rank in range(2)]
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == ["3:00:00\n"] * 2


def test_a_group_of_the_users_keeps_its_timeout():
    store = make_store()
    ranks = [start(rank, store, seconds=100, group="the user's") for rank in range(2)]
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == ["1:00:00\n"] * 2
