"""What stands between the qkv projection and attention, in one launch: norm and rotation of heads, and the cache write.

    query[t] = turn(norm(query[t])),   key_cache[slot] = turn(norm(key[t])),   value_cache[slot] = value[t]

with slot = slot_mapping[t]. `norm` is the RMSNorm of each head that Qwen 3 and Gemma 3 have (and nothing without a
weight), `turn` the rotation of `rotary_embedding` by the token's position; the caches are those of `write_kv`, in any
of their formats. The query is overwritten; key and value are only read, since attention reads them from the cache.

The three ops one by one move a key six times through memory, this one twice. All mathematics is fp32 and rounded once,
at the store, where the separate ops round between the steps.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.kernels.attention.kv_cache import check_kv_cache, native_fp8, scale_stride, strides_of, write_rows
from octavo.kernels.attention.turned_heads import turn_and_write, turn_in_place
from octavo.kernels.checks import (
    FLOATS,
    INTS,
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    check_rotary,
    check_shape,
    check_turnable,
)
from octavo.kernels.launch import launch
from octavo.kernels.registry import register
from octavo.kernels.replay import replayed
from octavo.kernels.tiles import cdiv, chains, let_next_start, next_power_of_2, wait_for_previous
from octavo.reference import attention as reference


@dataclass(frozen=True)
class _Tiles:
    block_heads: int
    block_d: int
    num_warps: int


def choose_tiles(head_size: int, heads: int, plain: bool) -> _Tiles:
    """Heads of one token that a program takes: about 2048 elements, 16 a thread, which is two 16-byte loads in fp16.

    With norms or a quantised cache half of both, because a row's sums and weights take time and registers (Llama-3-8B's
    heads with both, one token and 1024: 1.7 and 11.1 µs, where the larger tile takes 3.7 and 14.4).
    """
    elements, a_thread = (2048, 16) if plain else (1024, 8)
    block_d = next_power_of_2(head_size)
    block_heads = min(max(elements // block_d, 1), next_power_of_2(heads))
    return _Tiles(block_heads, block_d, min(max(block_heads * block_d // (32 * a_thread), 1), 4))


@triton.jit(do_not_specialize=["max_position", "num_slots"])
def _rotary_embedding_write_kv_kernel(
    # Bound by memory: query read and written, key and value read, a slot of each cache written; few tokens by latency,
    # which is that of two loads, position and table's row, and a store. One program a token and a group of heads:
    # query's groups first, then key's, then value's. What is the model's is constexpr, as in `rotary_embedding`.
    query_ptr,
    key_ptr,
    value_ptr,
    positions_ptr,
    table_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slot_mapping_ptr,
    q_norm_weight_ptr,
    k_norm_weight_ptr,
    k_scale_ptr,
    v_scale_ptr,
    key_scale_cache_ptr,
    value_scale_cache_ptr,
    query_heads,
    kv_heads,
    query_groups,
    kv_groups,
    max_position,
    num_slots,
    eps,
    weight_offset,
    stride_query_token,
    stride_query_head,
    stride_key_token,
    stride_key_head,
    stride_value_token,
    stride_value_head,
    stride_table_row,
    stride_key_cache_page,
    stride_key_cache_slot,
    stride_key_cache_head,
    stride_value_cache_page,
    stride_value_cache_slot,
    stride_value_cache_head,
    stride_k_scale,
    stride_v_scale,
    stride_key_scale_page,
    stride_key_scale_slot,
    stride_key_scale_head,
    stride_value_scale_page,
    stride_value_scale_slot,
    stride_value_scale_head,
    D: tl.constexpr,
    HALF: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHAINED: tl.constexpr,
):
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    groups = query_groups + 2 * kv_groups
    token = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    position = tl.load(positions_ptr + token).to(tl.int64)
    table_ptr += position * stride_table_row
    inside = (position >= 0) & (position < max_position)
    if group < query_groups:
        query_head = group * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
        turn_in_place(
            query_ptr + token * stride_query_token + query_head.to(tl.int64) * stride_query_head,
            query_head < query_heads,
            q_norm_weight_ptr,
            eps,
            weight_offset,
            table_ptr,
            inside,
            D,
            HALF,
            INTERLEAVED,
        )
    else:
        slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
        page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE
        head = ((group - query_groups) % kv_groups * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)
        there = head < kv_heads
        wanted = there & (slot >= 0) & (slot < num_slots)
        if group < query_groups + kv_groups:
            turn_and_write(
                key_ptr + token * stride_key_token + head[:, None] * stride_key_head,
                there,
                k_norm_weight_ptr,
                eps,
                weight_offset,
                table_ptr,
                inside,
                key_cache_ptr,
                key_scale_cache_ptr,
                k_scale_ptr,
                page * stride_key_cache_page + offset * stride_key_cache_slot + head * stride_key_cache_head,
                page * stride_key_scale_page + offset * stride_key_scale_slot + head * stride_key_scale_head,
                head,
                stride_k_scale,
                wanted,
                D,
                HALF,
                INTERLEAVED,
                NATIVE_FP8,
            )
        else:
            write_rows(
                value_cache_ptr,
                value_scale_cache_ptr,
                v_scale_ptr,
                value_ptr,
                token * stride_value_token + head * stride_value_head,
                page * stride_value_cache_page + offset * stride_value_cache_slot + head * stride_value_cache_head,
                page * stride_value_scale_page + offset * stride_value_scale_slot + head * stride_value_scale_head,
                head,
                stride_v_scale,
                there,
                wanted,
                D,
                NATIVE_FP8,
                BLOCK_D,
            )


def _rotary_embedding_write_kv_cuda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    q_norm_weight: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    interleaved: bool,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    key_scale_cache: torch.Tensor | None,
    value_scale_cache: torch.Tensor | None,
) -> None:
    tokens, query_heads, head_size = query.shape
    kv_heads, half = key.shape[1], cos_sin_cache.shape[1] // 2
    pages, page_size = key_cache.shape[:2]
    plain = q_norm_weight is None and k_norm_weight is None and key_cache.dtype == key.dtype
    tiles = choose_tiles(head_size, max(query_heads, kv_heads), plain)
    query_groups, kv_groups = cdiv(query_heads, tiles.block_heads), cdiv(kv_heads, tiles.block_heads)
    launch(
        _rotary_embedding_write_kv_kernel,
        (tokens * (query_groups + 2 * kv_groups),),
        query,
        key,
        value,
        positions,
        cos_sin_cache,
        key_cache,
        value_cache,
        slot_mapping,
        q_norm_weight,
        k_norm_weight,
        k_scale,
        v_scale,
        key_scale_cache,
        value_scale_cache,
        query_heads,
        kv_heads,
        query_groups,
        kv_groups,
        cos_sin_cache.shape[0],
        pages * page_size,
        eps,
        weight_offset,
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        cos_sin_cache.stride(0),
        *strides_of(key_cache),
        *strides_of(value_cache),
        scale_stride(k_scale),
        scale_stride(v_scale),
        *strides_of(key_scale_cache),
        *strides_of(value_scale_cache),
        device=query.device,
        num_warps=tiles.num_warps,
        D=head_size,
        HALF=half,
        PAGE_SIZE=page_size,
        INTERLEAVED=interleaved,
        NATIVE_FP8=native_fp8(key_cache),
        BLOCK_HEADS=tiles.block_heads,
        BLOCK_D=tiles.block_d,
        CHAINED=chains(query.device),
    )


_rotary_embedding_write_kv = register(
    "rotary_embedding_write_kv(Tensor(a!) query, Tensor key, Tensor value, Tensor positions, Tensor cos_sin_cache, "
    "Tensor(b!) key_cache, Tensor(c!) value_cache, Tensor slot_mapping, Tensor? q_norm_weight, Tensor? k_norm_weight, "
    "float eps, float weight_offset, bool interleaved, Tensor? k_scale, Tensor? v_scale, "
    "Tensor(d!)? key_scale_cache, Tensor(e!)? value_scale_cache) -> ()",
    reference=reference.rotary_embedding_write_kv,
    launcher=_rotary_embedding_write_kv_cuda,
    fake=lambda *arguments: None,
)


@replayed
def rotary_embedding_write_kv(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    q_norm_weight: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    interleaved: bool = False,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    key_scale_cache: torch.Tensor | None = None,
    value_scale_cache: torch.Tensor | None = None,
) -> None:
    """Normalises and turns query and key, and writes key and value into a paged cache, in one launch.

    `query[t] = turn(norm(query[t]));  key_cache[slot] = turn(norm(key[t]));  value_cache[slot] = value[t]`, where
    `norm(x) = x / sqrt(mean(x²) + eps) · (weight + weight_offset)` over a head, and `turn` is `rotary_embedding`'s

    Args:
        query: `[tokens, query_heads, head_size]`, fp16, bf16 or fp32, **overwritten**; last dimension contiguous, token
            and head strides free (a view into a fused qkv projection will do).
        key: `[tokens, kv_heads, head_size]`, query's dtype, of such strides; only read. May be a view into query's
            buffer, but must not overlap query.
        value: as key.
        positions: `[tokens]`, int32 or int64, contiguous. A token whose position is negative or has no row in the
            table stays unrotated on a GPU; the CPU reference raises.
        cos_sin_cache: `[max_position, rotary_dim]`, as `rotary_embedding` takes it; elements of a head from rotary_dim
            on are not turned.
        key_cache, value_cache: as `write_kv` takes them, **written in place**: query's dtype, float8 or int8.
        slot_mapping: `[tokens]`, int32 or int64, contiguous: `page · page_size + offset`; -1 writes nothing to the
            caches for the token (padding of a CUDA graph), whose query is normalised and turned like any other. No slot
            may occur twice.
        q_norm_weight: `[head_size]`, fp16, bf16 or fp32, or None for no norm of the query's heads.
        k_norm_weight: as q_norm_weight, of the key's heads.
        eps: added to the mean of squares.
        weight_offset: 0, or 1 for Gemma's weights, which are stored minus one.
        interleaved: False pairs element i with i + rotary_dim/2 (NeoX), True 2i with 2i + 1 (GPT-J).
        k_scale, v_scale, key_scale_cache, value_scale_cache: of float8 and int8 caches, as `write_kv` takes them.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, stride or device that does not fit; an odd rotary_dim or one beyond head_size; a scale that
            is missing or not the cache's; on the CPU, a position outside the table or a slot outside the cache.

    Computed in fp32 and rounded once, also to float8 and int8: closer to exact than the separate ops, which round
    between the steps. Safe in a CUDA graph. A token's bits do not depend on the other tokens.
    https://arxiv.org/abs/2104.09864, https://arxiv.org/abs/1910.07467, https://arxiv.org/abs/2309.06180
    """
    check_dtype("query", query, FLOATS)
    check_turnable("query", query, "[tokens, query_heads, head_size]")
    check_rotary(query, positions, cos_sin_cache)
    tokens, _, head_size = query.shape
    check_ndim("key", key, 3, "[tokens, kv_heads, head_size]")
    kv_heads = key.shape[1]
    if kv_heads == 0:
        raise ValueError(f"key: shape {tuple(key.shape)}; expected at least one head")
    for name, x in (("key", key), ("value", value)):
        check_dtype(name, x, (query.dtype,))
        check_shape(name, x, (tokens, kv_heads, head_size), "[tokens, kv_heads, head_size], as query")
        check_last_dim_contiguous(name, x)
        check_device(name, x, "query", query)
    for name, weight in (("q_norm_weight", q_norm_weight), ("k_norm_weight", k_norm_weight)):
        if weight is not None:
            check_dtype(name, weight, FLOATS)
            check_shape(name, weight, (head_size,), "[head_size], as query")
            check_last_dim_contiguous(name, weight)
            check_device(name, weight, "query", query)
    check_dtype("slot_mapping", slot_mapping, INTS)
    check_shape("slot_mapping", slot_mapping, (tokens,), "[tokens], as query")
    check_last_dim_contiguous("slot_mapping", slot_mapping)
    check_device("slot_mapping", slot_mapping, "query", query)
    if eps < 0:
        raise ValueError(f"eps: {eps}; expected a number of at least 0")
    scales = k_scale, v_scale, key_scale_cache, value_scale_cache
    check_kv_cache("key", key, kv_heads, key_cache, value_cache, *scales)
    caches = key_cache, value_cache, slot_mapping
    norm = q_norm_weight, k_norm_weight, eps, weight_offset
    _rotary_embedding_write_kv(query, key, value, positions, cos_sin_cache, *caches, *norm, interleaved, *scales)
