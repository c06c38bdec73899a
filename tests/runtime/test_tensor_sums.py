"""The sum of tensors' bytes: what changes it and what does not."""

import pytest
import torch

from ddpm_fast.runtime.tensor_sums import byte_sum


def words(*tensors):
    """The sum in plain Python, of tensors that are multiples of 8 bytes."""
    data = b"".join(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors)
    return sum(int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)) % 2**64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("size", [8, 4096, 8192])
def test_it_is_the_sum_of_words(dtype, size):
    tensors = [(torch.randn(size) * 10).to(dtype) for _ in range(3)]
    assert byte_sum({"a": tensors[0], "b": [tensors[1], {"c": (tensors[2], 3, None)}]}) == words(*tensors)


@pytest.mark.parametrize("size", [1, 3, 100, 4097, 5000])
def test_every_byte_counts(size):
    """In small tensors, large ones, and those that no number of words fills."""
    tensors = [torch.randn(size), torch.randn(()), torch.randn(3).bfloat16()]
    before = byte_sum(tensors)
    for tensor in tensors:
        data = tensor.view(-1).view(torch.uint8)
        for at in {0, 1, len(data) // 2, len(data) - 1}:
            data[at] ^= 64
            assert byte_sum(tensors) != before
            data[at] ^= 64
    assert byte_sum(tensors) == before


@pytest.mark.parametrize("shape", [(64, 32, 3, 3), (5, 3, 3, 3)])
def test_of_views_and_memory_formats(tmp_path, shape):
    weight = torch.randn(shape).to(memory_format=torch.channels_last)
    flat = torch.randn(30_001)
    given = {
        "weight": weight,
        "odd offset": flat[1:],
        "every second": flat[::2],
        "transposed": flat[:20_000].view(2, -1).t(),
    }
    torch.save(given, tmp_path / "file")
    assert byte_sum(torch.load(tmp_path / "file")) == byte_sum(given)
    assert byte_sum(torch.load(tmp_path / "file", mmap=True)) == byte_sum(given)


def test_nothing_to_sum():
    meta, sparse = torch.empty(3, device="meta"), torch.eye(3).to_sparse()
    assert byte_sum({}) == byte_sum([torch.empty(0), meta, sparse, "text", None]) == 0
