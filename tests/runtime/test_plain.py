"""Settings of any library become plain Python values."""

from __future__ import annotations

import enum
from collections import OrderedDict, deque, namedtuple
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_fast import GaussianDiffusion, Unet
from ddpm_fast.runtime.plain import as_int, as_ints, as_number, as_size, plain


class Width(enum.IntEnum):
    SMALL = 8


class Kind(enum.Enum):
    V = "pred_v"


class Name(str, enum.Enum):
    V = "pred_v"


class ListLike(list):
    """What a configuration library returns."""


Pair = namedtuple("Pair", "a b")


def is_plain(value) -> bool:
    """True if the value and all in it are of Python's own types, and not of a subclass."""
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(is_plain(key) and is_plain(entry) for key, entry in value.items())
    return value is None or type(value) in (bool, int, float, str)


@pytest.mark.parametrize(
    "value, expected",
    [
        (None, None),
        (True, True),
        (np.bool_(True), True),
        (np.int64(3), 3),
        (np.uint8(3), 3),
        (np.float64(0.1), 0.1),
        (np.float32(0.5), 0.5),
        (np.float16(0.5), 0.5),
        (np.longdouble(0.5), 0.5),
        (np.str_("pred_v"), "pred_v"),
        (np.array(2.5), 2.5),
        (np.array([1, 2]), [1, 2]),
        (np.array([[True], [False]]), [[True], [False]]),
        (torch.tensor(3), 3),
        (torch.tensor([0.5, 1.5]), [0.5, 1.5]),
        (torch.nn.Parameter(torch.tensor(0.5)), 0.5),
        (Width.SMALL, 8),
        (Kind.V, "pred_v"),
        (Name.V, "pred_v"),
        (Fraction(1, 2), 0.5),
        (Decimal("0.5"), 0.5),
        (Path("a") / "b", "a/b"),
        (ListLike([1, np.int64(2)]), [1, 2]),
        (deque([1]), [1]),
        (range(2), [0, 1]),
        (Pair(np.int64(1), 2), (1, 2)),
        (OrderedDict(s=np.float64(0.02)), {"s": 0.02}),
        ({"a": [np.float64(1), (np.int32(2),)]}, {"a": [1.0, (2,)]}),
    ],
    ids=repr,
)
def test_values_become_plain(value, expected):
    found = plain("name", value)
    assert found == expected and is_plain(found) and type(found) is type(expected)


@pytest.mark.parametrize("value", [object(), {1, 2}, b"ab", 1j, [lambda: None]], ids=["object", "set", "b", "1j", "f"])
def test_what_is_not_plain_is_named(value):
    with pytest.raises(TypeError, match="dropout must be made of numbers, text, lists and dictionaries; got a "):
        plain("dropout", value)


INTEGERS = [8, 8.0, np.int64(8), np.uint8(8), np.float32(8), np.array(8), np.array([8]), np.array([[8.0]])]


@pytest.mark.parametrize("value", [*INTEGERS, torch.tensor(8), torch.tensor([8.0]), Width.SMALL, Fraction(8)], ids=repr)
def test_integers_of_any_library(value):
    found = as_int("dim", value)
    assert found == 8 and type(found) is int


NO_INTEGERS = [
    True,
    np.bool_(True),
    torch.tensor(True),
    2.5,
    np.float64(2.5),
    float("nan"),
    float("inf"),
    "8",
    None,
    [8],
]


@pytest.mark.parametrize("value", [*NO_INTEGERS, np.array([8, 8]), torch.zeros(2), torch.zeros(0)], ids=repr)
def test_no_integers(value):
    with pytest.raises(ValueError, match="dim must be an integer; got ") as info:
        as_int("dim", value)
    assert "\n" not in str(info.value)


def test_limits_are_named():
    assert as_int("steps", 1e5, 1) == 100_000
    with pytest.raises(ValueError, match="steps must be a positive integer; got 0"):
        as_int("steps", 0, 1)
    with pytest.raises(ValueError, match="workers must be a non-negative integer; got -1"):
        as_int("workers", -1, 0)
    with pytest.raises(ValueError, match=r"decay must be a number in \[0, 1\]; got 1.5"):
        as_number("decay", 1.5, 0, 1)
    with pytest.raises(ValueError, match="lr must be a number; got '1e-4'"):
        as_number("lr", "1e-4")
    with pytest.raises(ValueError, match=r"lr must be a number; got np\.float64\(nan\)"):
        as_number("lr", np.float64("nan"))
    with pytest.raises(ValueError, match="dim_mults must be a sequence of integers; got 2"):
        as_ints("dim_mults", 2)
    with pytest.raises(ValueError, match="image_size must be a positive int or two of them"):
        as_size("image_size", [8, True])


@pytest.mark.parametrize(
    "value", [8, 8.0, np.int64(8), torch.tensor([8]), (8, 8), [8.0, np.int64(8)], np.array([8, 8])]
)
def test_sizes(value):
    assert as_size("image_size", value) == (8, 8)


MULTS = [np.array([1, 2]), ListLike([1, 2]), torch.tensor([1, 2]), (np.int64(1), 2.0), range(1, 3)]


@pytest.mark.parametrize("mults", MULTS, ids=repr)
def test_a_network_keeps_plain_arguments(mults):
    torch.manual_seed(0)
    unet = Unet(
        np.int64(8),
        init_dim=8.0,
        dim_mults=mults,
        channels=torch.tensor(1),
        dropout=np.float64(0.1),
        attn_heads=np.array([2, 2]),
        attn_dim_head=np.int32(4),
        full_attn=np.array([False, True]),
        self_condition=np.bool_(True),
        learned_sinusoidal_dim=np.int64(16),
        sinusoidal_pos_emb_theta=np.float32(10000),
        resnet_block_groups=np.int64(4),
        norm=np.str_("group"),
    )
    torch.manual_seed(0)
    expected = Unet(
        8, init_dim=8, dim_mults=(1, 2), channels=1, dropout=0.1, attn_heads=(2, 2), attn_dim_head=4,
        full_attn=[False, True], self_condition=True, sinusoidal_pos_emb_theta=10000, resnet_block_groups=4,
        norm="group",
    )  # fmt: skip
    assert is_plain(unet.config) and unet.config == expected.config
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, unet.state_dict()[name]), name


def test_a_process_keeps_plain_arguments():
    def make(**options):
        return GaussianDiffusion(Unet(8, dim_mults=(1,), channels=1), **options)

    process = make(
        image_size=np.array([8, 16]),
        timesteps=np.int64(30),
        sampling_timesteps=1e1,
        objective=np.str_("pred_x0"),
        beta_schedule=np.str_("cosine"),
        schedule_fn_kwargs=OrderedDict(s=np.float64(0.02)),
        ddim_sampling_eta=np.float32(0.5),
        auto_normalize=np.bool_(False),
        offset_noise_strength=np.float64(0.1),
        min_snr_loss_weight=np.bool_(True),
        min_snr_gamma=np.float64(3),
    )
    expected = make(
        image_size=(8, 16), timesteps=30, sampling_timesteps=10, objective="pred_x0", beta_schedule="cosine",
        schedule_fn_kwargs={"s": 0.02}, ddim_sampling_eta=0.5, auto_normalize=False, offset_noise_strength=0.1,
        min_snr_loss_weight=True, min_snr_gamma=3,
    )  # fmt: skip
    assert is_plain(process.config) and process.config == expected.config
    assert process.image_size == (8, 16) and is_plain(process.image_size)
    for name, tensor in expected.state_dict().items():
        if not name.startswith("model."):
            assert torch.equal(tensor, process.state_dict()[name]), name


def test_omegaconf_lists_become_plain():
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create({"dim": 8, "dim_mults": [1, 2], "kwargs": {"s": 0.02}})
    assert is_plain(plain("config", config)) and plain("config", config) == {
        "dim": 8,
        "dim_mults": [1, 2],
        "kwargs": {"s": 0.02},
    }
    assert Unet(config.dim, dim_mults=config.dim_mults, channels=1).config["dim_mults"] == (1, 2)
