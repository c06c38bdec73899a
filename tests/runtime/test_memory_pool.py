"""The memory pool of the native CPU operators: tensors never overlap, and unused memory returns to the system."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import threading
from pathlib import Path

import forks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ddpm_fast
from ddpm_fast.runtime import extension

module = extension.load()
pytestmark = [
    pytest.mark.skipif(module is None, reason=str(extension.reason())),
    pytest.mark.skipif(extension.info().get("sanitized", False), reason="AddressSanitizer watches malloc's memory"),
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere all memory is malloc's"),
]

MB = 2**20


def tensor(megabytes: float) -> torch.Tensor:
    return module.empty_tensor([int(megabytes * MB) // 4])


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def in_a_process(code: str) -> str:
    """The output of a process that imports this file, and whose pool is empty."""
    path = f"import sys; sys.path.append({str(Path(forks.__file__).parent)!r})\n"
    return forks.run_code(path + code, Path(__file__).parent).stdout


@settings(max_examples=200)
@given(
    st.lists(st.one_of(st.integers(0, 12), st.floats(0.1, 6).map(lambda size: round(size, 3))), min_size=1, max_size=40)
)
def test_tensors_do_not_overlap(actions):
    """An action is a float (allocate so many MB) or an integer (free the tensor of that index)."""
    alive = []
    for number, action in enumerate(actions):
        if isinstance(action, float):
            alive.append((tensor(action).fill_(number), number))
            assert alive[-1][0].data_ptr() % 64 == 0
        elif action < len(alive):
            del alive[action]
        for made, value in alive:
            assert made[0] == made[-1] == value
    for made, value in alive:
        assert (made == value).all()


def test_threads_allocate_and_free_at_once():
    wrong = []

    def work(seed: int):
        generator = torch.Generator().manual_seed(seed)
        mine = []
        for turn in range(60):
            value = 1000.0 * seed + turn
            mine.append((tensor(0.3 + 2 * torch.rand((), generator=generator).item()).fill_(value), value))
            if len(mine) > 4:
                made, value = mine.pop(turn % 4)
                wrong.extend([seed] if not bool((made == value).all()) else [])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _in_a_child(queue, kept):
    queue.put((kept.sum().item(), tensor(2).fill_(3).sum().item()))


def test_a_forked_child_has_its_own_pool():
    """Data loaders fork while another thread may hold the pool's lock."""
    kept = tensor(1).fill_(1)
    context = multiprocessing.get_context("fork")
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            tensor(1)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for _ in range(5):
            queue = context.Queue()
            child = context.Process(target=_in_a_child, args=(queue, kept))
            child.start()
            assert queue.get(timeout=600) == (MB / 4, 3 * 2 * MB / 4)
            child.join()
    finally:
        stop.set()
        thread.join()


def test_pickle_views_resize_and_sharing_work():
    made = tensor(1).fill_(2)
    assert torch.equal(pickle.loads(pickle.dumps(made)), made) and torch.equal(made.clone(), made)
    assert made.numpy()[0] == 2
    view = made.view(512, -1)[3:5]
    del made
    assert view.sum() == 2 * view.numel()
    grown = tensor(1).fill_(5)
    grown.resize_(MB)
    assert grown[: MB // 4].eq(5).all() and grown.numel() == MB
    shared = tensor(1).fill_(7).share_memory_()
    assert shared.is_shared() and shared[-1] == 7
    with torch.inference_mode():
        assert tensor(1).is_inference()
    assert not tensor(1).is_inference()
    assert module.empty_tensor([0, 3]).shape == (0, 3) and module.empty_tensor([]).numel() == 1


def test_empty_cache_returns_free_memory_only():
    keeps = tensor(8).fill_(1)
    ddpm_fast.empty_cache()
    below = resident()
    freed = tensor(64).fill_(1)
    assert resident() - below > 60 * MB
    del freed
    assert resident() - below > 60 * MB, "it stays for the next step"
    assert ddpm_fast.empty_cache() > 60 * MB
    assert resident() - below < 8 * MB and keeps.eq(1).all()
    assert tensor(64).fill_(2).eq(2).all()


def test_memory_unused_by_recent_steps_returns_to_the_system():
    output = in_a_process(
        "from test_memory_pool import *\n"
        "def step(megabytes): tensor(megabytes).fill_(1)\n"
        "step(1); module.age_memory(600); step(1)  # pages are huge now\n"
        "step(100); before = resident()\n"
        "step(10); step(20); print(before - resident())\n"
        "module.age_memory(600); step(10); print(before - resident())\n"
        "step(20); module.age_memory(600); step(20); print(before - resident())\n"
    )
    soon, late, later = map(int, output.split())
    assert soon < 8 * MB, "the next step may need it"
    assert 70 * MB < late < 85 * MB, "all but what the largest step since has needed"
    assert 70 * MB < later < 85 * MB


def test_pages_are_huge_once_the_process_is_some_seconds_old():
    output = in_a_process(
        "import re\n"
        "from test_memory_pool import *\n"
        "def is_huge(made):\n"
        "    for area in re.split(r'\\n(?=[0-9a-f]+-)', open('/proc/self/smaps').read()):\n"
        "        first, end = (int(n, 16) for n in area.split()[0].split('-'))\n"
        "        if first <= made.data_ptr() < end: return 'hg' in re.search('VmFlags:(.*)', area)[1].split()\n"
        "made = tensor(32).fill_(1); print(is_huge(made)); del made\n"
        "module.age_memory(600)\n"
        "kept = tensor(8).fill_(2); freed = tensor(32); del freed; print(is_huge(kept), kept.eq(2).all().item())\n"
        "del kept; made = tensor(32).fill_(3); print(is_huge(made), made.eq(3).all().item())\n"
    )
    assert output.split() == ["False", "False", "True", "True", "True"], "not while a step holds tensors"


def test_malloc_replaces_the_pool_under_an_address_limit():
    output = in_a_process(
        "import re, resource\n"
        "from test_memory_pool import *\n"
        "memory = 1024 * int(re.search(r'MemTotal: *(\\d+)', open('/proc/meminfo').read())[1])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (memory, memory))\n"
        "print(tensor(2).fill_(3).sum().item(), ddpm_fast.empty_cache())\n"
    )
    assert output.split() == [str(3.0 * 2 * MB / 4), "0"]


def test_training_steps_do_not_grow_memory():
    output = in_a_process(
        "from test_memory_pool import *\n"
        "module.age_memory(-3600)  # what is kept, and the pages, stay as they are\n"
        "torch.manual_seed(0)\n"
        "unet = ddpm_fast.Unet(32, dim_mults=(1, 2, 4))\n"
        "diffusion = ddpm_fast.GaussianDiffusion(unet, image_size=32)\n"
        "images = torch.rand(8, 3, 32, 32)\n"
        "seen = []\n"
        "for _ in range(6):\n"
        "    diffusion(images).backward(); unet.zero_grad(); seen.append(resident())\n"
        "print(*seen)\n"
    )
    seen = [int(number) for number in output.split()]
    assert max(seen[2:]) - seen[1] < 4 * MB, [number // MB for number in seen]
