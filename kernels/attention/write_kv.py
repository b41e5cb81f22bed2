"""Writing this step's keys and values into the paged cache.

    key_cache[slot // page_size, slot % page_size] = key[token],    slot = slot_mapping[token]

and the same for values. The caches are `[pages, page_size, kv_heads, head_size]`; the strides of the first three
dimensions are free, so that K and V may be halves of one buffer, or heads may stand before tokens in memory. Paging
after Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention" (2023),
https://arxiv.org/abs/2309.06180.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.kernels.checks import FLOATS, INTS, check_device, check_dtype, check_last_dim_contiguous, check_shape
from octavo.kernels.launch import launch
from octavo.kernels.registry import register
from octavo.kernels.replay import replayed
from octavo.kernels.tiles import cdiv, next_power_of_2
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


@triton.jit
def _copy_rows(cache_ptr, source_ptr, from_offsets, to_offsets, d, mask):
    # A quantised cache converts here, between the load and the store.
    x = tl.load(source_ptr + from_offsets[:, None] + d[None, :], mask=mask)  # [ROWS, D]
    tl.store(cache_ptr + to_offsets[:, None] + d[None, :], x, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def _write_kv_kernel(
    # Bound by memory: key and value read once and written once. A row is one head of one token.
    key_ptr,
    value_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slot_mapping_ptr,
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
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [ROWS]
    token, head = row // HEADS, row % HEADS
    slot = tl.load(slot_mapping_ptr + token, mask=row < num_rows, other=-1).to(tl.int64)
    page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE
    d = tl.arange(0, BLOCK_D)
    mask = ((slot >= 0) & (slot < num_slots))[:, None] & (d < D)[None, :]
    _copy_rows(
        key_cache_ptr,
        key_ptr,
        token * stride_key_token + head * stride_key_head,
        page * stride_key_cache_page + offset * stride_key_cache_slot + head * stride_key_cache_head,
        d,
        mask,
    )
    _copy_rows(
        value_cache_ptr,
        value_ptr,
        token * stride_value_token + head * stride_value_head,
        page * stride_value_cache_page + offset * stride_value_cache_slot + head * stride_value_cache_head,
        d,
        mask,
    )


def _write_kv_cuda(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
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
        tokens * heads,
        pages * page_size,
        *key.stride()[:2],
        *value.stride()[:2],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        device=key.device,
        num_warps=tiles.num_warps,
        HEADS=heads,
        D=head_size,
        PAGE_SIZE=page_size,
        BLOCK_ROWS=tiles.block_rows,
        BLOCK_D=tiles.block_d,
    )


def _write_kv_fake(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    return None


_write_kv = register(
    "write_kv(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping) -> ()",
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
) -> None:
    """Writes one key and one value a token into the slots of a paged cache.

    `key_cache[slot // page_size, slot % page_size] = key[token]`, `slot = slot_mapping[token]`; and so for value.

    Args:
        key: `[tokens, kv_heads, head_size]`, fp16, bf16 or fp32; last dimension contiguous, the others of any stride.
        value: as key.
        key_cache: `[pages, page_size, kv_heads, head_size]`, key's dtype, **written in place**; last dimension
            contiguous, the others of any stride: a view into a buffer that K and V share, or `[pages, kv_heads,
            page_size, head_size]` transposed, will do.
        value_cache: as key_cache, **written in place**; its strides may differ.
        slot_mapping: `[tokens]`, int32 or int64, contiguous: `page · page_size + offset`; -1 skips the token (padding
            of a CUDA graph). No slot may occur twice.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, stride or device that does not fit; on the CPU, a slot below -1 or past the cache. A GPU
            kernel skips such slots, since it can't raise without a synchronisation.

    Safe in a CUDA graph. https://arxiv.org/abs/2309.06180
    """
    check_dtype("key", key, FLOATS)
    if key.dim() != 3 or 0 in key.shape[1:]:
        raise ValueError(f"key: shape {tuple(key.shape)}; expected [tokens, kv_heads, head_size], heads not empty")
    check_dtype("value", value, (key.dtype,))
    check_shape("value", value, key.shape, "the shape of key")
    check_dtype("key_cache", key_cache, (key.dtype,))
    if key_cache.dim() != 4 or key_cache.shape[2:] != key.shape[1:] or key_cache.shape[1] == 0:
        raise ValueError(
            f"key_cache: shape {tuple(key_cache.shape)}; expected [pages, page_size, {key.shape[1]}, {key.shape[2]}] "
            f"with page_size at least 1, as key has {key.shape[1]} heads of size {key.shape[2]}"
        )
    check_dtype("value_cache", value_cache, (key.dtype,))
    check_shape("value_cache", value_cache, key_cache.shape, "the shape of key_cache")
    check_dtype("slot_mapping", slot_mapping, INTS)
    check_shape("slot_mapping", slot_mapping, key.shape[:1], "[tokens], one slot a token of key")
    for name, x in dict(
        key=key, value=value, key_cache=key_cache, value_cache=value_cache, slot_mapping=slot_mapping
    ).items():
        check_last_dim_contiguous(name, x)
        check_device(name, x, "key", key)
    _write_kv(key, value, key_cache, value_cache, slot_mapping)
