"""Writing this step's keys and values into the paged cache.

    key_cache[slot // page_size, slot % page_size] = key[token],    slot = slot_mapping[token]

and the same for values, in the cache's format (`kernels/attention/kv_cache.py`): as they are, or quantised to float8 or
int8. The caches are `[pages, page_size, kv_heads, head_size]`; the strides of the first three dimensions are free, so
that K and V may be halves of one buffer, or heads may stand before tokens in memory. Paging after Kwon et al.,
"Efficient Memory Management for Large Language Model Serving with PagedAttention" (2023),
https://arxiv.org/abs/2309.06180.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.kernels.attention.kv_cache import check_kv_cache, native_fp8, scale_stride, strides_of, write_rows
from octavo.kernels.checks import FLOATS, INTS, check_device, check_dtype, check_last_dim_contiguous, check_shape
from octavo.kernels.launch import launch
from octavo.kernels.registry import register
from octavo.kernels.replay import replayed
from octavo.kernels.tiles import cdiv, chains, let_next_start, next_power_of_2, wait_for_previous
from octavo.reference import attention as reference


@dataclass(frozen=True)
class _Tiles:
    block_rows: int
    block_d: int
    num_warps: int


def choose_tiles(head_size: int) -> _Tiles:
    """Rows (one head of one token each) that a program copies: about 2048 elements of K and as many of V."""
    block_d = next_power_of_2(head_size)
    return _Tiles(max(2048 // block_d, 1), block_d, 4)


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def _write_kv_kernel(
    # Bound by memory: key and value read once and written once. A row is one head of one token.
    key_ptr,
    value_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slot_mapping_ptr,
    k_scale_ptr,
    v_scale_ptr,
    key_scale_cache_ptr,
    value_scale_cache_ptr,
    num_rows,
    num_slots,
    stride_key_token,
    stride_key_head,
    stride_value_token,
    stride_value_head,
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
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHAINED: tl.constexpr,
):
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [ROWS]
    token, head = row // HEADS, row % HEADS
    there = row < num_rows
    slot = tl.load(slot_mapping_ptr + token, mask=there, other=-1).to(tl.int64)
    page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE
    wanted = (slot >= 0) & (slot < num_slots)
    write_rows(
        key_cache_ptr,
        key_scale_cache_ptr,
        k_scale_ptr,
        key_ptr,
        token * stride_key_token + head * stride_key_head,
        page * stride_key_cache_page + offset * stride_key_cache_slot + head * stride_key_cache_head,
        page * stride_key_scale_page + offset * stride_key_scale_slot + head * stride_key_scale_head,
        head,
        stride_k_scale,
        there,
        wanted,
        D,
        NATIVE_FP8,
        BLOCK_D,
    )
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


def _write_kv_cuda(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    key_scale_cache: torch.Tensor | None,
    value_scale_cache: torch.Tensor | None,
) -> None:
    tokens, heads, head_size = key.shape
    pages, page_size = key_cache.shape[:2]
    tiles = choose_tiles(head_size)
    launch(
        _write_kv_kernel,
        (cdiv(tokens * heads, tiles.block_rows),),
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        k_scale,
        v_scale,
        key_scale_cache,
        value_scale_cache,
        tokens * heads,
        pages * page_size,
        *key.stride()[:2],
        *value.stride()[:2],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        scale_stride(k_scale),
        scale_stride(v_scale),
        *strides_of(key_scale_cache),
        *strides_of(value_scale_cache),
        device=key.device,
        num_warps=tiles.num_warps,
        HEADS=heads,
        D=head_size,
        PAGE_SIZE=page_size,
        NATIVE_FP8=native_fp8(key_cache),
        BLOCK_ROWS=tiles.block_rows,
        BLOCK_D=tiles.block_d,
        CHAINED=chains(key.device),
    )


def _write_kv_fake(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    key_scale_cache: torch.Tensor | None,
    value_scale_cache: torch.Tensor | None,
) -> None:
    return None


_write_kv = register(
    "write_kv(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping, "
    "Tensor? k_scale, Tensor? v_scale, Tensor(c!)? key_scale_cache, Tensor(d!)? value_scale_cache) -> ()",
    reference=reference.write_kv,
    launcher=_write_kv_cuda,
    fake=_write_kv_fake,
)


@replayed
def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    key_scale_cache: torch.Tensor | None = None,
    value_scale_cache: torch.Tensor | None = None,
) -> None:
    """Writes one key and one value a token into the slots of a paged cache, in the cache's format.

    `key_cache[slot // page_size, slot % page_size] = key[token]`, `slot = slot_mapping[token]`; and so for value. A
    float8 or int8 cache takes `round(key / scale)`.

    Args:
        key: `[tokens, kv_heads, head_size]`, fp16, bf16 or fp32; last dimension contiguous, the others of any stride.
        value: as key.
        key_cache: `[pages, page_size, kv_heads, head_size]`, **written in place**: key's dtype (copied bit for bit),
            float8_e4m3fn (sm_89 or later), float8_e5m2 or int8; last dimension contiguous, the others of any stride: a
            view into a buffer that K and V share will do, and for a cache with heads first, `[pages, kv_heads,
            page_size, head_size]`, pass `cache.transpose(1, 2)`.
        value_cache: as key_cache, **written in place**; its strides may differ.
        slot_mapping: `[tokens]`, int32 or int64, contiguous: `page · page_size + offset`; -1 skips the token (padding
            of a CUDA graph). No slot may occur twice.
        k_scale: of a float8 key_cache, fp32: one element for all heads, or `[kv_heads]`; None is 1.0. Quotients beyond
            the dtype's range become its largest number, a NaN stays NaN.
        v_scale: as k_scale, of value_cache.
        key_scale_cache: of an int8 key_cache, and only of that: `[pages, page_size, kv_heads]` fp32 of any strides,
            **written in place** with the largest magnitude of the token's head / 127. A head of zeros has the scale 0;
            one that holds an infinity or a NaN has that for its scale, and reads back as NaN, while no other does.
        value_scale_cache: as key_scale_cache, of value_cache, **written in place**.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, stride or device that does not fit; a scale that is missing or not the cache's; on the CPU,
            a slot below -1 or past the cache. A GPU kernel skips such slots, since it can't raise without a
            synchronisation.

    Quotients are correctly rounded fp32, then rounded half to even. Safe in a CUDA graph.
    https://arxiv.org/abs/2309.06180
    """
    check_dtype("key", key, FLOATS)
    if key.dim() != 3 or 0 in key.shape[1:]:
        raise ValueError(f"key: shape {tuple(key.shape)}; expected [tokens, kv_heads, head_size], heads not empty")
    check_dtype("value", value, (key.dtype,))
    check_shape("value", value, key.shape, "the shape of key")
    check_dtype("slot_mapping", slot_mapping, INTS)
    check_shape("slot_mapping", slot_mapping, key.shape[:1], "[tokens], one slot a token of key")
    for name, x in dict(key=key, value=value, slot_mapping=slot_mapping).items():
        check_last_dim_contiguous(name, x)
        check_device(name, x, "key", key)
    scales = k_scale, v_scale, key_scale_cache, value_scale_cache
    check_kv_cache("key", key, key.shape[1], key_cache, value_cache, *scales)
    _write_kv(key, value, key_cache, value_cache, slot_mapping, *scales)
