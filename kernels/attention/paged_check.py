"""What `paged_attention` asks of its tensors."""

import torch

from octavo.kernels.attention.kv_cache import FLOAT8, check_kv_cache
from octavo.kernels.checks import (
    FLOATS,
    check_contiguous,
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    check_shape,
)

MAX_HEAD_SIZE = 256


def check_paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    key_scale_cache: torch.Tensor | None,
    value_scale_cache: torch.Tensor | None,
) -> None:
    """Raises TypeError or ValueError unless query, caches and tables fit together."""
    check_heads(query, key_cache)
    scales = k_scale, v_scale, key_scale_cache, value_scale_cache
    check_kv_cache("query", query, key_cache.shape[2], key_cache, value_cache, *scales)
    check_tables(query, block_table, seq_lens, cu_seqlens_q)


def check_heads(query: torch.Tensor, key_cache: torch.Tensor) -> None:
    """Raises TypeError or ValueError unless the heads of `query` go with those of `key_cache`."""
    check_dtype("query", query, FLOATS)
    check_ndim("query", query, 3, "[tokens, heads, head_size]")
    heads, head_size = query.shape[1:]
    if head_size % 8 or not 0 < head_size <= MAX_HEAD_SIZE:
        raise ValueError(f"query: head_size {head_size}; expected a multiple of 8 up to {MAX_HEAD_SIZE}")
    check_dtype("key_cache", key_cache, (query.dtype, *FLOAT8, torch.int8))
    check_ndim("key_cache", key_cache, 4, "[pages, page_size, kv_heads, head_size]")
    if key_cache.shape[3] != head_size or 0 in key_cache.shape:
        raise ValueError(
            f"key_cache: shape {tuple(key_cache.shape)}; expected [pages, page_size, kv_heads, {head_size}], the "
            "head_size of query, with at least one page, slot and head"
        )
    if heads == 0 or heads % key_cache.shape[2]:
        raise ValueError(f"query: {heads} heads; expected a multiple of the {key_cache.shape[2]} heads of key_cache")


def check_tables(
    query: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor, cu_seqlens_q: torch.Tensor
) -> None:
    """Raises TypeError or ValueError unless the tables, and where they are, go with `query`."""
    check_dtype("block_table", block_table, (torch.int32,))
    check_ndim("block_table", block_table, 2, "[sequences, max_pages]")
    sequences = block_table.shape[0]
    check_dtype("seq_lens", seq_lens, (torch.int32,))
    check_shape("seq_lens", seq_lens, (sequences,), "[sequences], as many as block_table has rows")
    check_dtype("cu_seqlens_q", cu_seqlens_q, (torch.int32,))
    check_shape("cu_seqlens_q", cu_seqlens_q, (sequences + 1,), "[sequences + 1], where each sequence's queries start")
    for name, x in dict(query=query, block_table=block_table, seq_lens=seq_lens, cu_seqlens_q=cu_seqlens_q).items():
        check_last_dim_contiguous(name, x)
        check_device(name, x, "query", query)


def check_per_head(name: str, x: torch.Tensor | None, query: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises TypeError or ValueError unless `x`, if it is given, is one number for each head of `query`."""
    if x is not None:
        check_dtype(name, x, dtypes)
        check_shape(name, x, query.shape[1:2], "[heads], as query")
        check_last_dim_contiguous(name, x)
        check_device(name, x, "query", query)


def check_lengths(max_seqlen_q: int, window_size: int | None) -> None:
    """Raises ValueError unless queries may be as many as `max_seqlen_q`, and see as far back as `window_size`."""
    if max_seqlen_q < 0:
        raise ValueError(f"max_seqlen_q: {max_seqlen_q}; expected at least 0")
    if window_size is not None and window_size < 1:
        raise ValueError(f"window_size: {window_size}; expected at least 1 (the token itself), or None for no window")


def check_rolling(block_table: torch.Tensor, page_size: int, window_size: int | None, max_seqlen_q: int) -> None:
    """Raises ValueError unless the rows of `block_table` can be rings that hold all that a step's queries see."""
    if window_size is None:
        raise ValueError("rolling: True without window_size; expected a window, as a ring holds the last keys only")
    needed, pages = window_size + max(max_seqlen_q, 1) - 1, block_table.shape[1]
    if pages * page_size < needed:
        raise ValueError(
            f"block_table: {pages} pages of {page_size} slots a sequence; expected at least {needed} slots, "
            "window_size + max_seqlen_q - 1, with rolling: pass more pages, or queries in smaller chunks"
        )


def check_plan(plan: torch.Tensor | None, query: torch.Tensor) -> None:
    """Raises TypeError or ValueError unless `plan`, if it is given, may be one; the launcher checks its shape."""
    if plan is not None:
        check_dtype("plan", plan, (torch.int32,))
        check_ndim("plan", plan, 2, "as octavo.plan_attention returns it")
        check_contiguous("plan", plan)
        check_device("plan", plan, "query", query)
