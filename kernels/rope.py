"""Rotary position embedding of query and key, in place.

Each pair (a, b) of a head's elements is turned by its position times its frequency:

    a' = a·cos − b·sin        b' = b·cos + a·sin

NeoX pairing (Llama, Mistral, Qwen): pair i is elements i and i + rotary_dim/2. Interleaved pairing (GPT-J): elements
2i and 2i + 1. Cosines and sines come from a table that `rotary_cos_sin_cache` builds: row p holds the cosines of
position p, then its sines. Elements of a head from rotary_dim on stay as they are (partial rotary).

Su et al., "RoFormer" (2021), https://arxiv.org/abs/2104.09864. The mathematics is fp32 and rounded once, at the store.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.kernels.checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_rotary,
    check_same_dtype,
    check_shape,
    check_turnable,
)
from octavo.kernels.launch import launch
from octavo.kernels.registry import register
from octavo.kernels.replay import replayed
from octavo.kernels.tiles import cdiv, chains, let_next_start, next_power_of_2, wait_for_previous
from octavo.reference import rope as reference


@dataclass(frozen=True)
class _Tiles:
    block_heads: int
    block_half: int
    num_warps: int


def choose_tiles(half: int, heads: int) -> _Tiles:
    """Heads and pairs that one program turns: about 1024 pairs, eight a thread, which is one 16-byte load in fp16."""
    block_half = next_power_of_2(half)
    block_heads = min(max(1024 // block_half, 1), next_power_of_2(heads))
    return _Tiles(block_heads, block_half, min(max(block_heads * block_half // 256, 1), 4))


@triton.jit
def _rotate_heads(
    x_ptr,
    heads,
    first_head,
    stride_head,
    cos,
    sin,
    inside,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    head = first_head + tl.arange(0, BLOCK_HEADS)
    row_ptr = x_ptr + head.to(tl.int64)[:, None] * stride_head  # [BLOCK_HEADS, 1]
    row_mask = (inside & (head < heads))[:, None]  # [BLOCK_HEADS, 1]
    dtype = x_ptr.dtype.element_ty
    # The barriers: where a tile is smaller than a warp, threads hold copies of an element, and all must have loaded it
    # before one of them stores over it.
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        mask = row_mask & (cols < 2 * HALF)
        x = tl.load(row_ptr + cols, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_HEADS, 2 * BLOCK_HALF]
        a, b = tl.split(tl.reshape(x, (BLOCK_HEADS, BLOCK_HALF, 2)))
        y = tl.interleave(a * cos - b * sin, b * cos + a * sin)
        tl.debug_barrier()
        tl.store(row_ptr + cols, y.to(dtype), mask=mask)
    else:
        cols = tl.arange(0, BLOCK_HALF)[None, :]
        mask = row_mask & (cols < HALF)
        a = tl.load(row_ptr + cols, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_HEADS, BLOCK_HALF]
        b = tl.load(row_ptr + HALF + cols, mask=mask, other=0.0).to(tl.float32)
        tl.debug_barrier()
        tl.store(row_ptr + cols, (a * cos - b * sin).to(dtype), mask=mask)
        tl.store(row_ptr + HALF + cols, (b * cos + a * sin).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["max_position"])
def _rotary_embedding_kernel(
    # Bound by memory: query and key read once and written once; one program a token and a group of heads, all groups of
    # query's first. HALF is constexpr because it is the model's, not the request's, and because a mask over an odd
    # multiple of 8 (head size 80) keeps its 16-byte loads only when the compiler knows the number.
    query_ptr,
    key_ptr,
    positions_ptr,
    cache_ptr,
    query_heads,
    key_heads,
    query_groups,
    groups,
    max_position,
    stride_query_token,
    stride_query_head,
    stride_key_token,
    stride_key_head,
    stride_cache_row,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    CHAINED: tl.constexpr,
):
    program = tl.program_id(0)
    token = (program // groups).to(tl.int64)
    group = program % groups
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    position = tl.load(positions_ptr + token).to(tl.int64)
    inside = (position >= 0) & (position < max_position)
    cols = tl.arange(0, BLOCK_HALF)[None, :]
    mask = inside & (cols < HALF)
    cache_ptr += position * stride_cache_row
    cos = tl.load(cache_ptr + cols, mask=mask, other=0.0).to(tl.float32)  # [1, BLOCK_HALF]
    sin = tl.load(cache_ptr + HALF + cols, mask=mask, other=0.0).to(tl.float32)  # [1, BLOCK_HALF]
    if group < query_groups:
        _rotate_heads(
            query_ptr + token * stride_query_token,
            query_heads,
            group * BLOCK_HEADS,
            stride_query_head,
            cos,
            sin,
            inside,
            HALF,
            INTERLEAVED,
            BLOCK_HEADS,
            BLOCK_HALF,
        )
    elif key_ptr is not None:
        _rotate_heads(
            key_ptr + token * stride_key_token,
            key_heads,
            (group - query_groups) * BLOCK_HEADS,
            stride_key_head,
            cos,
            sin,
            inside,
            HALF,
            INTERLEAVED,
            BLOCK_HEADS,
            BLOCK_HALF,
        )


def _rotary_embedding_cuda(
    query: torch.Tensor,
    key: torch.Tensor | None,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    interleaved: bool,
) -> None:
    tokens, query_heads, _ = query.shape
    key_heads = 0 if key is None else key.shape[1]
    half = cos_sin_cache.shape[1] // 2
    tiles = choose_tiles(half, max(query_heads, key_heads))
    query_groups = cdiv(query_heads, tiles.block_heads)
    groups = query_groups + cdiv(key_heads, tiles.block_heads)
    launch(
        _rotary_embedding_kernel,
        (tokens * groups,),
        query,
        key,
        positions,
        cos_sin_cache,
        query_heads,
        key_heads,
        query_groups,
        groups,
        cos_sin_cache.shape[0],
        query.stride(0),
        query.stride(1),
        *((0, 0) if key is None else key.stride()[:2]),
        cos_sin_cache.stride(0),
        device=query.device,
        num_warps=tiles.num_warps,
        HALF=half,
        INTERLEAVED=interleaved,
        BLOCK_HEADS=tiles.block_heads,
        BLOCK_HALF=tiles.block_half,
        CHAINED=chains(query.device),
    )


def _rotary_embedding_fake(
    query: torch.Tensor,
    key: torch.Tensor | None,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    interleaved: bool,
) -> None:
    return None


_rotary_embedding = register(
    "rotary_embedding("
    "Tensor(a!) query, Tensor(b!)? key, Tensor positions, Tensor cos_sin_cache, bool interleaved) -> ()",
    reference=reference.rotary_embedding,
    launcher=_rotary_embedding_cuda,
    fake=_rotary_embedding_fake,
)


@replayed
def rotary_embedding(
    query: torch.Tensor,
    key: torch.Tensor | None,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    *,
    interleaved: bool = False,
) -> None:
    """Turns query and key by their positions, in place, in one launch.

    `a' = a·cos − b·sin;  b' = b·cos + a·sin` for each pair (a, b) of the first rotary_dim elements of every head

    Args:
        query: `[tokens, query_heads, head_size]`, fp16, bf16 or fp32, **overwritten**; last dimension contiguous, token
            and head strides free (a view into a fused qkv projection will do).
        key: `[tokens, key_heads, head_size]`, **overwritten**, as query, or None. May be a view into query's
            buffer, but must not overlap query.
        positions: `[tokens]`, int32 or int64, contiguous. A token whose position is negative or has no row in
            the table stays unrotated on a GPU, which cannot report it without a synchronisation (padding of a
            captured graph may carry −1); the CPU reference raises.
        cos_sin_cache: `[max_position, rotary_dim]`, fp32, fp16 or bf16, last dimension contiguous: cosines in the
            first half of the columns, sines in the second, as `rotary_cos_sin_cache` builds it. rotary_dim is even and
            at most head_size; what a head holds beyond it stays untouched.
        interleaved: False pairs element i with i + rotary_dim/2 (NeoX), True 2i with 2i + 1 (GPT-J).

    Raises:
        TypeError: a dtype that is not accepted, or key's differs from query's.
        ValueError: a shape, stride or device that does not fit; an odd rotary_dim or one beyond head_size; on the CPU,
            a position outside the table.

    Computed in fp32 and rounded once. Safe in a CUDA graph. A token's bits do not depend on the other tokens.
    https://arxiv.org/abs/2104.09864
    """
    check_dtype("query", query, FLOATS)
    check_turnable("query", query, "[tokens, query_heads, head_size]")
    if key is not None:
        check_same_dtype("key", key, "query", query)
        check_turnable("key", key, "[tokens, key_heads, head_size]")
        tokens, _, head_size = query.shape
        check_shape("key", key, (tokens, key.shape[1], head_size), "[tokens, key_heads, head_size], as query")
        check_device("key", key, "query", query)
    check_rotary(query, positions, cos_sin_cache)
    _rotary_embedding(query, key, positions, cos_sin_cache, interleaved)
