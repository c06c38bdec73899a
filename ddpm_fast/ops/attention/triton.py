"""Triton kernels of attention, and their launches.

Of one sample and head, q, k and v are (N, D) matrices, adjacent in qkv and read in place through
strides; channels-last is the fast layout, contiguous works as well. Memory keys and values (M, D) come first, as tiles
of their own, so that nothing is concatenated. The softmax is online (Milakov & Gimelshein 2018; Dao et al. 2022,
"FlashAttention", algorithm 1): forward keeps per query

    lse = log2 Σ_j 2^(s_j)      s = q·kᵀ · scale · log2 e

and backward computes the probabilities again, p = 2^(s − lse), and with delta = Σ_d out·dout

    ds = p·(dout·vᵀ − delta)      dq = scale·ds·k      dk = scale·dsᵀ·q      dv = pᵀ·dout

in two launches: a program of the first owns queries and gives delta, dq, and its share of the memory's gradient; a
program of the second owns keys and gives dk and dv. Each number is written by one program: no atomics. Softmax, sums
and accumulators are float32; products take the dtype of qkv, as torch's attention kernels do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl

from ddpm_fast.ops.common.triton import cast, dot, dot_of_many
from ddpm_fast.runtime import triton_launch

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_rows(pointer, o_row, stride_row, stride_d, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a (ROWS, D) matrix: (rows, BLOCK_D), 0 where there is nothing."""
    o_d = tl.arange(0, BLOCK_D)
    mask = (o_row < ROWS)[:, None] & (o_d < D)[None, :]
    return tl.load(pointer + o_row[:, None] * stride_row + o_d[None, :] * stride_d, mask=mask, other=0.0)


@triton.jit
def _store_rows(
    pointer, b_value, o_row, stride_row, stride_d, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    o_d = tl.arange(0, BLOCK_D)
    mask = (o_row < ROWS)[:, None] & (o_d < D)[None, :]
    offsets = o_row[:, None] * stride_row + o_d[None, :] * stride_d
    tl.store(pointer + offsets, cast(b_value, pointer.dtype.element_ty), mask=mask)


@triton.jit
def _scores(b_q, b_k, o_k, scale2, KEYS: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """s of queries × keys, −∞ for keys that do not exist."""
    b_s = dot(b_q, tl.trans(b_k), None, PRECISION) * scale2
    if KEYS % BLOCK_K != 0:
        b_s = tl.where((o_k < KEYS)[None, :], b_s, float("-inf"))
    return b_s


@triton.jit
def _attend(
    b_out, b_max, b_sum, b_q, b_k, b_v, o_k, scale2, KEYS: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One more tile of keys in the online softmax; at least one of them exists."""
    b_s = _scores(b_q, b_k, o_k, scale2, KEYS, BLOCK_K, PRECISION)
    b_new_max = tl.maximum(b_max, tl.max(b_s, axis=1))
    b_p = tl.exp2(b_s - b_new_max[:, None])
    b_shrink = tl.exp2(b_max - b_new_max)
    b_sum = b_sum * b_shrink + tl.sum(b_p, axis=1)
    b_out = dot(cast(b_p, b_v.dtype), b_v, b_out * b_shrink[:, None], PRECISION)
    return b_out, b_new_max, b_sum


@triton.jit
def _score_gradient(
    b_q, b_do, b_lse, b_delta, b_k, b_v, o_k, scale2, KEYS: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """p and ds of queries × keys, 0 for keys that do not exist."""
    b_p = tl.exp2(_scores(b_q, b_k, o_k, scale2, KEYS, BLOCK_K, PRECISION) - b_lse[:, None])
    b_ds = b_p * (dot(b_do, tl.trans(b_v), None, PRECISION) - b_delta[:, None])
    return b_p, b_ds


@triton.jit
def attention_fwd_kernel(
    qkv_ptr,  # (B, 3, H, D, N) through stride_d and stride_n
    memory_ptr,  # (2, H, M, D), any dtype
    out_ptr,  # (B, H, D, N) through stride_d and out_stride_n
    lse_ptr,  # (B, H, N) float32
    H, stride_d, stride_n, out_stride_n, scale,
    N: tl.constexpr, M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (N + BLOCK_Q - 1) // BLOCK_Q
    i_bh, i_tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    i_b, i_h = (i_bh // H).to(tl.int64), i_bh % H
    HD = H * D
    q_ptr = qkv_ptr + i_b * (3 * HD * N) + i_h * D * stride_d
    k_ptr, v_ptr = q_ptr + HD * stride_d, q_ptr + 2 * HD * stride_d
    memory_k_ptr = memory_ptr + i_h * M * D
    memory_v_ptr = memory_k_ptr + HD * M
    scale2 = scale * _LOG2_E

    o_q = i_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b_q = _load_rows(q_ptr, o_q, stride_n, stride_d, N, D, BLOCK_D)
    b_max = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_Q,), tl.float32)
    b_out = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for i_m in range((M + BLOCK_M - 1) // BLOCK_M):
        o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        b_k = cast(_load_rows(memory_k_ptr, o_m, D, 1, M, D, BLOCK_D), b_q.dtype)
        b_v = cast(_load_rows(memory_v_ptr, o_m, D, 1, M, D, BLOCK_D), b_q.dtype)
        b_out, b_max, b_sum = _attend(b_out, b_max, b_sum, b_q, b_k, b_v, o_m, scale2, M, BLOCK_M, PRECISION)
    for i_k in range((N + BLOCK_K - 1) // BLOCK_K):
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        b_k = _load_rows(k_ptr, o_k, stride_n, stride_d, N, D, BLOCK_D)
        b_v = _load_rows(v_ptr, o_k, stride_n, stride_d, N, D, BLOCK_D)
        b_out, b_max, b_sum = _attend(b_out, b_max, b_sum, b_q, b_k, b_v, o_k, scale2, N, BLOCK_K, PRECISION)
    out_ptr += i_b * (HD * N) + i_h * D * stride_d
    _store_rows(out_ptr, b_out / b_sum[:, None], o_q, out_stride_n, stride_d, N, D, BLOCK_D)
    tl.store(lse_ptr + i_bh.to(tl.int64) * N + o_q, b_max + tl.log2(b_sum), mask=o_q < N)


@triton.jit
def attention_dq_kernel(
    grad_ptr,  # (B, H, D, N) through stride_d and out_stride_n; so is out
    qkv_ptr,  # (B, 3, H, D, N) through stride_d and stride_n; so is dqkv
    memory_ptr,  # (2, H, M, D), any dtype
    out_ptr,
    lse_ptr,  # (B, H, N) float32
    delta_ptr,  # (B, H, N) float32, written
    dqkv_ptr,  # its q third is written
    dmemory_ptr,  # (B, TILES, 2, H, M, D) float32, written: the share of each tile of queries
    H, stride_d, stride_n, out_stride_n, scale,
    N: tl.constexpr, M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (N + BLOCK_Q - 1) // BLOCK_Q
    i_bh, i_tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    i_b, i_h = (i_bh // H).to(tl.int64), i_bh % H
    HD = H * D
    o_sample, o_head = i_b * (3 * HD * N), i_h * D * stride_d
    q_ptr = qkv_ptr + o_sample + o_head
    k_ptr, v_ptr = q_ptr + HD * stride_d, q_ptr + 2 * HD * stride_d
    o_out, o_rows = i_b * (HD * N) + o_head, i_bh.to(tl.int64) * N
    o_memory = i_h * M * D
    dmemory_ptr += (i_b * TILES + i_tile) * (2 * HD * M) + o_memory
    memory_ptr += o_memory
    scale2 = scale * _LOG2_E

    o_q = i_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_q = o_q < N
    b_q = _load_rows(q_ptr, o_q, stride_n, stride_d, N, D, BLOCK_D)
    b_do = _load_rows(grad_ptr + o_out, o_q, out_stride_n, stride_d, N, D, BLOCK_D)
    b_out = _load_rows(out_ptr + o_out, o_q, out_stride_n, stride_d, N, D, BLOCK_D)
    b_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), axis=1)
    tl.store(delta_ptr + o_rows + o_q, b_delta, mask=m_q)
    b_lse = tl.load(lse_ptr + o_rows + o_q, mask=m_q, other=0.0)

    b_dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for i_m in range((M + BLOCK_M - 1) // BLOCK_M):
        o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        b_k = cast(_load_rows(memory_ptr, o_m, D, 1, M, D, BLOCK_D), b_q.dtype)
        b_v = cast(_load_rows(memory_ptr + HD * M, o_m, D, 1, M, D, BLOCK_D), b_q.dtype)
        b_p, b_ds = _score_gradient(b_q, b_do, b_lse, b_delta, b_k, b_v, o_m, scale2, M, BLOCK_M, PRECISION)
        b_ds = cast(b_ds, b_q.dtype)
        b_dq = dot(b_ds, b_k, b_dq, PRECISION)
        b_dk = dot(tl.trans(b_ds), b_q, None, PRECISION) * scale
        b_dv = dot(tl.trans(cast(b_p, b_q.dtype)), b_do, None, PRECISION)
        _store_rows(dmemory_ptr, b_dk, o_m, D, 1, M, D, BLOCK_D)
        _store_rows(dmemory_ptr + HD * M, b_dv, o_m, D, 1, M, D, BLOCK_D)
    for i_k in range((N + BLOCK_K - 1) // BLOCK_K):
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        b_k = _load_rows(k_ptr, o_k, stride_n, stride_d, N, D, BLOCK_D)
        b_v = _load_rows(v_ptr, o_k, stride_n, stride_d, N, D, BLOCK_D)
        _, b_ds = _score_gradient(b_q, b_do, b_lse, b_delta, b_k, b_v, o_k, scale2, N, BLOCK_K, PRECISION)
        b_dq = dot(cast(b_ds, b_q.dtype), b_k, b_dq, PRECISION)
    _store_rows(dqkv_ptr + o_sample + o_head, b_dq * scale, o_q, stride_n, stride_d, N, D, BLOCK_D)


@triton.jit
def attention_dkv_kernel(
    grad_ptr,  # (B, H, D, N) through stride_d and out_stride_n
    qkv_ptr,  # (B, 3, H, D, N) through stride_d and stride_n; so is dqkv
    lse_ptr,  # (B, H, N) float32; so is delta
    delta_ptr,
    dqkv_ptr,  # its k and v thirds are written
    H, stride_d, stride_n, out_stride_n, scale,
    N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (N + BLOCK_K - 1) // BLOCK_K
    i_bh, i_tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    i_b, i_h = (i_bh // H).to(tl.int64), i_bh % H
    HD = H * D
    o_sample, o_head = i_b * (3 * HD * N), i_h * D * stride_d
    q_ptr = qkv_ptr + o_sample + o_head
    grad_ptr += i_b * (HD * N) + o_head
    o_rows = i_bh.to(tl.int64) * N
    scale2 = scale * _LOG2_E

    o_k = i_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    b_k = _load_rows(q_ptr + HD * stride_d, o_k, stride_n, stride_d, N, D, BLOCK_D)
    b_v = _load_rows(q_ptr + 2 * HD * stride_d, o_k, stride_n, stride_d, N, D, BLOCK_D)
    b_dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    b_dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for i_q in range((N + BLOCK_Q - 1) // BLOCK_Q):
        o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
        m_q = o_q < N
        # A query that does not exist has q = dout = delta = lse = 0: p = 1, and it adds nothing.
        b_q = _load_rows(q_ptr, o_q, stride_n, stride_d, N, D, BLOCK_D)
        b_do = _load_rows(grad_ptr, o_q, out_stride_n, stride_d, N, D, BLOCK_D)
        b_lse = tl.load(lse_ptr + o_rows + o_q, mask=m_q, other=0.0)
        b_delta = tl.load(delta_ptr + o_rows + o_q, mask=m_q, other=0.0)
        # Keys × queries; rows of keys that do not exist are not stored.
        b_p = tl.exp2(dot(b_k, tl.trans(b_q), None, PRECISION) * scale2 - b_lse[None, :])
        b_dv = dot_of_many(cast(b_p, b_q.dtype), b_do, b_dv, PRECISION)
        b_ds = b_p * (dot(b_v, tl.trans(b_do), None, PRECISION) - b_delta[None, :])
        b_dk = dot_of_many(cast(b_ds, b_q.dtype), b_q, b_dk, PRECISION)
    dk_ptr = dqkv_ptr + o_sample + o_head + HD * stride_d
    _store_rows(dk_ptr, b_dk * scale, o_k, stride_n, stride_d, N, D, BLOCK_D)
    _store_rows(dk_ptr + HD * stride_d, b_dv, o_k, stride_n, stride_d, N, D, BLOCK_D)


@dataclass(frozen=True)
class Tile:
    """How a launch is cut up: queries and keys of a tile, warps per program, pipeline stages of its loop, and
    `triton_launch.register_bound`."""

    queries: int
    keys: int
    num_warps: int = 4
    num_stages: int = 1
    registers: int | None = None


# By kernel and kind of product: the tile for heads of at most so many dimensions. The largest that do not spill when
# compiled for sm_80, sm_90 and sm_100 (tests/ops/attention/test_aot.py); no GPU has timed them yet. "ieee" products of
# float32 run on the FMA units and hold their operands in registers.
_TILES = {
    "fwd": {
        "half": {32: Tile(64, 128, 4, 2), 128: Tile(64, 64, 4, 2)},
        "tf32": {64: Tile(64, 32), 128: Tile(32, 32)},
        "ieee": {32: Tile(64, 32), 64: Tile(32, 32, 8), 128: Tile(16, 16, 8)},
    },
    "dq": {
        "half": {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2)},
        "tf32": {64: Tile(64, 32), 128: Tile(32, 32)},
        "ieee": {32: Tile(64, 32), 64: Tile(32, 32, 8), 128: Tile(16, 16, 8)},
    },
    "dkv": {
        "half": {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2)},
        "tf32": {128: Tile(32, 32)},
        "ieee": {32: Tile(32, 32), 64: Tile(32, 32, 8, registers=128), 128: Tile(16, 32, 8)},
    },
}
# The interpreter's time is per operation: small tiles of unequal sides, so that a small test has several, then large
# ones.
_INTERPRETER = {128: Tile(64, 32, 1), 2**31: Tile(512, 256, 1)}  # up to so many positions
_SMALLEST_BLOCK = 16  # of a product


@cache
def choose_tile(name: str, kind: str, N: int, D: int, *, interpreted: bool = False) -> Tile:
    """The launch of a kernel. It depends on these arguments alone, and so do results.

    Args:
        name: "fwd", "dq" or "dkv".
        kind: see `product_kind`.
        N, D: positions, and dimensions of a head.
        interpreted: tiles for Triton's interpreter.
    """
    table, size = (_INTERPRETER, N) if interpreted else (_TILES[name][kind], D)
    tile = table[min(limit for limit in table if limit >= size)]
    largest = max(_SMALLEST_BLOCK, triton_launch.next_power_of_2(N))
    return replace(tile, queries=min(tile.queries, largest), keys=min(tile.keys, largest))


def block_of_memory(M: int) -> int:
    """Memory keys of a tile."""
    return min(64, max(_SMALLEST_BLOCK, triton_launch.next_power_of_2(max(M, 1))))


def product_kind(dtype: torch.dtype) -> str:
    """ "half", or for float32 "ieee" or, where the user lets torch's own products be so, "tf32"."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def attention(
    qkv: torch.Tensor,  # (B, 3·H·D, h, w), channels-last or contiguous
    mem_kv: torch.Tensor,  # (2, H, M, D)
    heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H·D, h, w) in the memory format of qkv, and lse, (B, H, N) float32."""
    launch = _Launch(qkv, mem_kv, heads, "fwd")
    B, channels, h, w = qkv.shape
    channels_last = qkv.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((B, channels // 3, h, w), dtype=qkv.dtype, device=qkv.device, memory_format=memory_format)
    lse = qkv.new_empty(B, heads, launch.N, dtype=torch.float32)
    with torch.cuda.device_of(qkv):
        attention_fwd_kernel[launch.grid](
            qkv, mem_kv.contiguous(), out, lse, *launch.numbers, **launch.constants, **launch.memory_constants
        )
    return out, lse


def attention_backward(
    grad: torch.Tensor,  # (B, H·D, h, w)
    qkv: torch.Tensor,
    mem_kv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of qkv, laid out as it is, and of mem_kv in float32; see `attention`."""
    dqkv = torch.empty_like(qkv)
    delta = torch.empty_like(lse)
    if grad.stride() != out.stride():
        grad = torch.empty_like(out).copy_(grad)
    first, second = (_Launch(qkv, mem_kv, heads, name) for name in ("dq", "dkv"))
    tiles = triton_launch.ceil_div(first.N, first.tile.queries)
    partial = qkv.new_empty(first.B, tiles, *mem_kv.shape, dtype=torch.float32)
    with torch.cuda.device_of(qkv):
        attention_dq_kernel[first.grid](
            grad, qkv, mem_kv.contiguous(), out, lse, delta, dqkv, partial, *first.numbers, **first.constants,
            **first.memory_constants,
        )  # fmt: skip
        attention_dkv_kernel[second.grid](grad, qkv, lse, delta, dqkv, *second.numbers, **second.constants)
    return dqkv, partial.sum((0, 1))


class _Launch:
    """Sizes, strides and constants of all launches of one call."""

    def __init__(self, qkv: torch.Tensor, mem_kv: torch.Tensor, heads: int, name: str):
        self.B, channels, h, w = qkv.shape
        self.N, D, M = h * w, mem_kv.shape[3], mem_kv.shape[2]
        kind = product_kind(qkv.dtype)
        self.tile = choose_tile(name, kind, self.N, D, interpreted=triton_launch.interpreted())
        owned = self.tile.keys if name == "dkv" else self.tile.queries
        self.grid = (self.B * heads * triton_launch.ceil_div(self.N, owned),)
        channels_last = qkv.is_contiguous(memory_format=torch.channels_last)
        strides = (1, channels, channels // 3) if channels_last else (self.N, 1, 1)
        self.numbers = (heads, *strides, D**-0.5)
        self.constants = {
            "N": self.N,
            "D": D,
            "BLOCK_D": max(_SMALLEST_BLOCK, triton_launch.next_power_of_2(D)),
            "BLOCK_Q": self.tile.queries,
            "BLOCK_K": self.tile.keys,
            "PRECISION": "tf32" if kind == "tf32" else "ieee",
            "num_warps": self.tile.num_warps,
            "num_stages": self.tile.num_stages,
            **triton_launch.register_bound(self.tile.registers),
        }
        self.memory_constants = {"M": M, "BLOCK_M": block_of_memory(M)}


triton_launch.hash_functions(globals())
