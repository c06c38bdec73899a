"""Folders as users leave them: which files count, in which order, links and loops, and what a million files cost."""

import os
import pickle
import sys
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.training.data import Dataset
from ddpm_fast.training.image_folder import PathSequence, find_images

ENDINGS = ["jpg", "png"]


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def cost_of(call):
    """The lines of Python that a call runs, and the most bytes that it holds: its time, on any machine."""
    lines = 0

    def trace(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    tracemalloc.start()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return lines, peak


def names_in(folder, exts=ENDINGS):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [str(path.relative_to(folder)) for path in find_images(folder, exts)]


def test_the_order_is_that_of_sorted_paths(tmp_path):
    names = ["b.png", "a.png", "a-b/c.png", "a/z.png", "a/b/c.png", "a b.png", "a.d/x.png", "Z.png", "ä.png", "a/é.png"]
    touch(tmp_path, *names)
    assert list(find_images(tmp_path, ENDINGS)) == sorted(tmp_path / name for name in names)


def test_paths_are_a_sequence_of_path(tmp_path):
    names = ["a/b.png", "c\nd.png", "e.png", os.fsdecode(b"\xff.png")]
    touch(tmp_path, *names)
    paths, expected = find_images(tmp_path, ENDINGS), sorted(tmp_path / name for name in names)
    assert len(paths) == 4 and paths == expected and list(reversed(paths)) == expected[::-1]
    assert paths[0] == expected[0] and paths[-1] == expected[-1] and paths[torch.tensor(2)] == expected[2]
    assert paths[1:3] == expected[1:3] and paths[::-2] == expected[::-2]
    assert all(isinstance(path, Path) for path in paths)
    assert expected[2] in paths and paths.index(expected[2]) == 2 and paths != expected[:2]
    assert pickle.loads(pickle.dumps(paths)) == expected
    for index in (4, -5):
        with pytest.raises(IndexError):
            paths[index]


def test_a_path_costs_its_name_and_eight_bytes():
    names = b"".join(b"n%08d/n%08d_%05d.JPEG\0" % (i, i, i) for i in range(1000))
    paths = PathSequence(Path("/data"), names)
    assert len(pickle.dumps(paths)) < 1000 * 42 + 1000
    assert paths[999] == Path("/data/n00000999/n00000999_00999.JPEG")


def test_every_ending_that_users_have_counts(tmp_path):
    endings = ["jpg", "jpeg", "png", "tiff", "tif", "bmp", "webp", "jfif", "avif", "npy"]
    touch(tmp_path, *(f"{index}.{ending}" for index, ending in enumerate(endings)), "10.TIF", "11.txt")
    with pytest.warns(UserWarning, match=r"left out 1 other files \(1 \.txt\)"):
        assert len(Dataset(tmp_path, 8)) == 11


def test_what_is_left_out_is_counted_in_one_warning(tmp_path):
    touch(tmp_path, "a.png", "sub/b.txt", "c.txt", "d.gif", "README")
    with pytest.warns(UserWarning, match=r"left out 4 other files \(2 \.txt, 1 no ending, 1 \.gif\)") as caught:
        assert len(find_images(tmp_path, ENDINGS)) == 1
    assert len(caught) == 1
    with pytest.raises(ValueError, match=r"holds no images.*it holds 5 other files \(2 \.txt"):
        find_images(tmp_path, ["tif"])


def test_endings_may_have_a_dot_and_must_be_endings(tmp_path):
    touch(tmp_path, "a.png", "b.jpg")
    assert names_in(tmp_path, [".PNG"]) == ["a.png"]
    for exts, error in (("png", TypeError), ([1], TypeError), ([], ValueError), ([""], ValueError)):
        with pytest.raises(error, match="exts must"):
            find_images(tmp_path, exts)


def test_linked_folders_are_followed_and_each_real_folder_once(tmp_path):
    folder, outside = tmp_path / "data", tmp_path / "outside"
    touch(folder, "a/1.png")
    touch(outside, "2.png", "deep/3.png")
    (folder / "b").symlink_to(outside)
    (folder / "c").symlink_to(outside / "deep")  # reached as b/deep before
    (folder / "0").symlink_to(folder / "a")  # inside: found at its own place
    (folder / "one.png").symlink_to(outside / "2.png")  # a linked file is a file
    assert names_in(folder) == ["a/1.png", "b/2.png", "b/deep/3.png", "one.png"]


def test_loops_of_links_end(tmp_path):
    folder, outside = tmp_path / "data", tmp_path / "outside"
    touch(folder, "a/1.png")
    touch(outside, "2.png", "deep/3.png")
    touch(tmp_path, "neighbour.png")
    (folder / "a" / "self").symlink_to(folder / "a")
    (folder / "a" / "root").symlink_to(folder)
    (folder / "a" / "above").symlink_to(tmp_path)  # around the folder: its neighbours are no part of it
    (folder / "b").symlink_to(outside)
    (outside / "deep" / "back").symlink_to(outside)
    (outside / "deep" / "home").symlink_to(folder)
    (folder / "x.png").symlink_to("x.png")  # a link to itself is a broken file
    assert names_in(folder) == ["a/1.png", "b/2.png", "b/deep/3.png", "x.png"]


def test_the_folder_itself_may_be_a_link(tmp_path):
    touch(tmp_path / "real", "a.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert list(find_images(tmp_path / "link", ENDINGS)) == [tmp_path / "link" / "a.png"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_no_file(tmp_path):
    touch(tmp_path, "a.png")
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "b.png")
    assert names_in(tmp_path) == ["a.png"]


def test_an_image_costs_the_same_whatever_the_size_of_the_folder(tmp_path):
    """A tuple of all indices per image was 70 ms of 1.28 million."""
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a.png")
    dataset = Dataset(tmp_path, 4)
    lines, peaks = [], []
    for count in (100, 100, 1_000_000):  # the first image imports what decodes it
        dataset.paths = PathSequence(tmp_path, b"a.png\0" * count)
        more = [cost_of(lambda index=index: dataset[index]) for index in (0, count // 2, count - 1)]
        lines.append([of for of, _ in more])
        peaks.append(max(peak for _, peak in more))
    assert lines[2] == lines[1] and peaks[2] < peaks[1] + 10_000


def test_many_broken_files_in_a_row_cost_little(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a.png")
    dataset = Dataset(tmp_path, 4)
    dataset.paths = PathSequence(tmp_path, b"a.png\0" * 1_000_000)
    dataset._is_broken[:] = True
    dataset._is_broken[7] = False
    dataset[7]
    known, peak = cost_of(lambda: dataset[7])
    for index in (8, 500_000, 999_999):
        lines, more = cost_of(lambda index=index: dataset[index])
        assert lines < known + 20 and more < peak + 10_000
        assert dataset[index].shape == (1, 4, 4)
    dataset._is_broken[7] = True
    with pytest.raises(ValueError, match="none of them could be read"):
        dataset[8]


def test_paths_may_be_replaced_as_upstreams(tmp_path):
    for index in range(3):
        Image.fromarray(np.full((4, 4), index, np.uint8)).save(tmp_path / f"{index}.png")
    dataset = Dataset(tmp_path, 4)
    dataset.paths = dataset.paths[1:]
    assert len(dataset) == 2 and [round(image.mean().item() * 255) for image in dataset] == [1, 2]
