"""FlashAttention's functions for inference, so that code which is written for them runs by importing octavo's.

    from octavo import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

Names, arguments, layouts and meanings are those of flash-attn 2 (https://github.com/Dao-AILab/flash-attention, Dao
2023, https://arxiv.org/abs/2307.08691). Composed of the public ops: keys and values are seen as a cache of pages
(`flash_views.py`), for which `paged_attention` takes any strides, and not copied but where a docstring says so. Dense
rows are cut where they lie into pages of 128, 16 or 1 tokens, the first that divides seqlen_k and the way from row to
row. Hopper's kernel for prefill needs a multiple of 16; packed sequences, as pages of one token, never reach it.
"""

from typing import Any

import torch

from octavo.kernels.attention.flash_views import (
    as_pages,
    check_cache_lengths,
    check_dropout,
    check_keys,
    check_numbers,
    check_packed_keys,
    check_query,
    check_rows,
    check_table,
    check_tables_of_angles,
    length_of,
    slots_of,
    table_of,
    turned,
    visible,
)
from octavo.kernels.attention.paged_attention import paged_attention
from octavo.kernels.attention.paged_check import check_per_head
from octavo.kernels.attention.write_kv import write_kv
from octavo.kernels.checks import check_dtype, check_ndim, check_shape


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: torch.Tensor | None = None,
) -> Any:
    """Attention of dense queries over dense keys and values, as flash-attn's `flash_attn_func`; forward only.

    `out[b, i] = Σ_j softmax_j(score(i, j)) · v[b, j]`, with `score = softmax_scale · q[b, i] · k[b, j]`, capped to
    `softcap · tanh(score / softcap)` where softcap is not 0. Query i stands at position `i + seqlen_k - seqlen_q`, so
    that the last query and the last key are at one place (masks are aligned to the bottom right).

    Args:
        q: `[batch, seqlen_q, heads, head_size]`, fp16, bf16 or fp32; last dimension contiguous, head_size a multiple of
            8 up to 256. It is copied if batch and seqlen_q can't be made one dimension.
        k: `[batch, seqlen_k, kv_heads, head_size]` in q's dtype; last dimension contiguous, the others of any stride.
            heads is a multiple of kv_heads; heads `h·group` to `(h+1)·group` use KV head h. Fastest where seqlen_k is
            a multiple of 16. k and v are copied, if not contiguous, where batch is more than 1 and rows lie no whole
            number of tokens apart, or not as many in both, or under torch.compile not side by side.
        v: as k; its strides may differ.
        dropout_p: 0.0.
        softmax_scale: of the scores; `head_size ** -0.5` if None.
        causal: whether a query sees no key after its own position.
        window_size: `(left, right)`: how many keys before its position a query sees, and how many after it; -1 for no
            limit. The right is 0 or -1, or as much as there are keys; with causal it is 0 whatever is given.
        softcap: in units of the scores; 0.0 for none.
        alibi_slopes: `[heads]` fp32 (not `[batch, heads]`), or None: `slope · |distance|` is subtracted from scores.
        deterministic: taken, and makes no difference: the same inputs give the same bits.
        return_attn_probs: also return the log-sum-exp, and an empty tensor where flash-attn has the pattern of dropout.
        s_aux: `[heads]`, fp32 or q's dtype, or None: attention sinks, as FlashAttention 3 and vLLM name them.

    Returns:
        `[batch, seqlen_q, heads, head_size]`, contiguous, in q's dtype; with return_attn_probs a tuple of that, the
        log-sum-exp of each row's scores, `[batch, heads, seqlen_q]` fp32, and an empty tensor. Rows that see no key are
        0, with a log-sum-exp of -inf, as in FlashAttention 3 (2 has +inf), or the sink.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: dropout; a window with another right side; a shape, stride, device or option that does not fit.

    fp32 sums and softmax; safe in a CUDA graph. https://arxiv.org/abs/2307.08691
    """
    check_dropout(dropout_p)
    check_query(q, 4, "[batch, seqlen_q, heads, head_size]")
    check_keys(q, k, v, 4, "[batch, seqlen_k, kv_heads, head_size]")
    batch, seqlen_k = k.shape[:2]
    check_shape("k", k, (q.shape[0], *k.shape[1:]), "[batch, seqlen_k, kv_heads, head_size], batch as in q")
    pages = as_pages(k, v, copies=True)
    out, lse = _of_batch(
        q,
        pages.key,
        pages.value,
        table_of(pages, batch),
        torch.full((batch,), seqlen_k, dtype=torch.int32, device=q.device),
        softmax_scale,
        visible(causal, window_size, seqlen_k),
        softcap,
        alibi_slopes,
        s_aux,
        return_attn_probs,
    )
    return (out, lse, q.new_empty(0)) if return_attn_probs else out


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    *,
    seqused_k: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
) -> Any:
    """Attention of packed sequences of any lengths, as flash-attn's `flash_attn_varlen_func`; forward only.

    `flash_attn_func` for each sequence, whose queries are rows `cu_seqlens_q[b]` to `cu_seqlens_q[b + 1]` of q, and
    whose keys are rows `cu_seqlens_k[b]` to `cu_seqlens_k[b + 1]` of k, or lie in pages.

    Args:
        q: `[total_q, heads, head_size]`, fp16, bf16 or fp32; last dimension contiguous, the others of any stride.
        k: `[total_k, kv_heads, head_size]`, or with block_table `[pages, page_size, kv_heads, head_size]`, in q's
            dtype; last dimension contiguous, the others of any stride.
        v: as k; its strides may differ.
        cu_seqlens_q: `[batch + 1]` int32, starts at 0; rows of q from its last value on are padding.
        cu_seqlens_k: as cu_seqlens_q, of the keys; with block_table only their differences, the lengths, count. None
            with both block_table and seqused_k.
        max_seqlen_q: upper bound of queries a sequence; it guides the tile choice only. A tensor of one element is
            taken, and costs a synchronisation with the host.
        max_seqlen_k: upper bound of keys a sequence, as max_seqlen_q; without block_table, keys beyond it are not seen.
        dropout_p: 0.0.
        softmax_scale: as for `flash_attn_func`.
        causal: as for `flash_attn_func`; each sequence is aligned to its own end.
        window_size: as for `flash_attn_func`.
        softcap: as for `flash_attn_func`.
        alibi_slopes: as for `flash_attn_func`, `[heads]`.
        deterministic: taken, and makes no difference.
        return_attn_probs: as for `flash_attn_func`.
        block_table: `[batch, max_pages]` int32, the page ids of each sequence in order, or None for packed keys.
        seqused_k: `[batch]` int32, or None: how many keys of each sequence are used, from its first on.
        s_aux: as for `flash_attn_func`.

    Returns:
        `[total_q, heads, head_size]`, contiguous, in q's dtype; with return_attn_probs a tuple of that, the log-sum-exp
        `[heads, total_q]` fp32, and an empty tensor. Rows that see no key, and padding, are as for `flash_attn_func`.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: as `flash_attn_func`; lengths that are missing; on the CPU, lengths that contradict each other.

    fp32 sums and softmax; safe in a CUDA graph, which may be replayed with other lengths up to the same maxima.
    https://arxiv.org/abs/2307.08691
    """
    check_dropout(dropout_p)
    check_query(q, 3, "[total_q, heads, head_size]")
    check_dtype("cu_seqlens_q", cu_seqlens_q, (torch.int32,))
    check_ndim("cu_seqlens_q", cu_seqlens_q, 1, "[batch + 1]")
    batch = cu_seqlens_q.shape[0] - 1
    if batch < 0:
        raise ValueError("cu_seqlens_q: shape (0,); expected [batch + 1], which starts with 0: at least one number")
    if block_table is None:
        check_keys(q, k, v, 3, "[total_k, kv_heads, head_size]")
    else:
        check_keys(q, k, v, 4, "[pages, page_size, kv_heads, head_size], with block_table")
        check_table(block_table, q, batch)
    if cu_seqlens_k is not None:
        check_numbers("cu_seqlens_k", cu_seqlens_k, q, batch + 1, "[batch + 1], as cu_seqlens_q")
    elif block_table is None or seqused_k is None:
        raise ValueError("cu_seqlens_k: None; expected [batch + 1] int32, unless there are block_table and seqused_k")
    if seqused_k is not None:
        check_numbers("seqused_k", seqused_k, q, batch, "[batch], one less than cu_seqlens_q has")
    max_seqlen_q, max_seqlen_k = length_of("max_seqlen_q", max_seqlen_q), length_of("max_seqlen_k", max_seqlen_k)
    check_packed_keys(cu_seqlens_k, seqused_k, k.shape[0] if block_table is None else None, max_seqlen_k)
    masks = visible(causal, window_size, max_seqlen_k)
    seq_lens = seqused_k
    if seq_lens is None:
        assert cu_seqlens_k is not None
        seq_lens = cu_seqlens_k[1:] - cu_seqlens_k[:-1]
    if block_table is None:
        assert cu_seqlens_k is not None
        k, v = k.unsqueeze(1), v.unsqueeze(1)
        width = torch.arange(max(max_seqlen_k, 1), dtype=torch.int32, device=q.device)
        block_table = cu_seqlens_k[:-1, None] + width
    options = softmax_scale, masks, softcap, alibi_slopes, s_aux, return_attn_probs
    out, lse = _attend(q, k, v, block_table, seq_lens, cu_seqlens_q, max_seqlen_q, *options)
    return (out, lse.t().contiguous(), q.new_empty(0)) if lse is not None else out


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: torch.Tensor | None = None,
) -> Any:
    """Attention over a cache, dense or paged, after new keys and values were appended to it, as flash-attn's.

    `k_cache[b, cache_seqlens[b] : cache_seqlens[b] + seqlen_new] = k[b]`, so for v, then `flash_attn_func` of q over
    each row's keys so far: the last query and the last new key stand at one position.

    Args:
        q: `[batch, seqlen_q, heads, head_size]`, as for `flash_attn_func`.
        k_cache: `[rows, capacity, kv_heads, head_size]`, or with block_table `[pages, page_size, kv_heads, head_size]`,
            in q's dtype, **written in place** where k is given; last dimension contiguous, the others of any stride.
            Rows as `flash_attn_func` copies them are not copied, but one page each: each capacity compiles kernels.
        v_cache: as k_cache, **written in place**; its strides may differ.
        k: `[batch, seqlen_new, kv_heads, head_size]`, or None: what is appended. Copied if batch and seqlen_new can't
            be made one dimension. What would lie past the capacity is not written.
        v: as k.
        rotary_cos: `[seqlen, rotary_dim / 2]`, seqlen at least the capacity, fp16, bf16 or fp32, or None: k is turned
            by its position in the cache before it is written, q (a copy) by that of the new keys, or, without causal
            and a window, all of it by cache_seqlens. Only with k, and without cache_leftpad.
        rotary_sin: as rotary_cos.
        cache_seqlens: `[batch]` int32, or one number for all: keys of each row before this step. None, without k, for
            the capacity.
        cache_batch_idx: `[batch]` int32, or None: the row of a dense cache that each of the batch has; None for b's b.
        cache_leftpad: `[batch]` int32, or None: where each row's keys begin in a dense cache; cache_seqlens count from
            the row's start. With it, caches that are not written may be copied: where their rows lie no whole number of
            tokens apart, or under torch.compile not side by side.
        block_table: `[batch, max_pages]` int32, the page ids of each of the batch in order, or None for dense caches.
        softmax_scale: as for `flash_attn_func`.
        causal: as for `flash_attn_func`.
        window_size: as for `flash_attn_func`, the capacity standing for the keys.
        softcap: as for `flash_attn_func`.
        rotary_interleaved: True turns elements 2i and 2i + 1 (GPT-J), False i and i + rotary_dim/2 (NeoX).
        alibi_slopes: as for `flash_attn_func`, `[heads]`.
        num_splits: taken, and makes no difference: keys are shared out over the GPU as need be.
        return_softmax_lse: also return the log-sum-exp.
        s_aux: as for `flash_attn_func`.

    Returns:
        `[batch, seqlen_q, heads, head_size]`, contiguous, in q's dtype; with return_softmax_lse also the log-sum-exp
        `[batch, heads, seqlen_q]` fp32. Rows that see no key are as for `flash_attn_func`.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: as `flash_attn_func`; k without v or cache_seqlens; arguments that exclude each other; caches to be
            written whose rows lie so that cache_leftpad would copy them; lengths beyond the capacity, which are seen
            on the CPU, or anywhere in a number for all.

    fp32 sums and softmax; safe in a CUDA graph, which may be replayed with other lengths and pages in the tensors.
    https://arxiv.org/abs/2307.08691
    """
    check_query(q, 4, "[batch, seqlen_q, heads, head_size]")
    layout = "[pages, page_size, kv_heads, head_size]" if block_table is not None else "[rows, capacity, kv_heads, …]"
    check_keys(q, k_cache, v_cache, 4, layout, cache="_cache")
    batch, past = q.shape[0], cache_seqlens
    if isinstance(past, torch.Tensor):
        check_numbers("cache_seqlens", past, q, batch, "[batch], as q")
    if (k is None) != (v is None):
        raise ValueError(f"v: {'given without' if k is None else 'None with'} k; expected both, or neither")
    if k is not None and v is not None:
        check_keys(q, k, v, 4, "[batch, seqlen_new, kv_heads, head_size]")
        check_shape("k", k, (batch, k.shape[1], *k_cache.shape[2:]), "[batch, seqlen_new, kv_heads, head_size]")
    if k is not None and past is None:
        raise ValueError("cache_seqlens: None with k; expected how many keys each row has so far")
    if block_table is None:
        capacity = k_cache.shape[1]
        k_cache, v_cache, block_table = _as_paged(q, k_cache, v_cache, cache_batch_idx, cache_leftpad, k is not None)
    else:
        check_table(block_table, q, batch)
        capacity = block_table.shape[1] * k_cache.shape[1]
        for name, x in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
            if x is not None:
                raise ValueError(f"{name}: given with block_table; expected None, as pages say where keys lie")
    masks = visible(causal, window_size, capacity)
    check_cache_lengths(q, past, cache_leftpad, capacity, 0 if k is None else k.shape[1])
    if not isinstance(past, torch.Tensor):
        past = torch.full((batch,), capacity if past is None else past, dtype=torch.int32, device=q.device)
    if cache_leftpad is not None:
        past = past - cache_leftpad  # from here on, positions are those in the table
    if rotary_cos is not None or rotary_sin is not None:
        if rotary_cos is None or rotary_sin is None or k is None or cache_leftpad is not None:
            raise ValueError("rotary_cos: expected with rotary_sin and k, and without cache_leftpad, or not at all")
        check_tables_of_angles(q, rotary_cos, rotary_sin, capacity)
        moving = masks[0] or masks[1] is not None
        q = turned(q, past, moving, rotary_cos, rotary_sin, rotary_interleaved)
        k = turned(k, past, True, rotary_cos, rotary_sin, rotary_interleaved)
    if k is not None and v is not None:
        new, heads = k.shape[1], k_cache.shape[2:]
        slots = slots_of(past, new, block_table, k_cache.shape[1])
        write_kv(k.reshape(-1, *heads), v.reshape(-1, *heads), k_cache, v_cache, slots)
        past = past + new
    options = softmax_scale, masks, softcap, alibi_slopes, s_aux, return_softmax_lse
    out, lse = _of_batch(q, k_cache, v_cache, block_table, past, *options)
    return (out, lse) if return_softmax_lse else out


def _as_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rows: torch.Tensor | None,
    leftpad: torch.Tensor | None,
    written: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dense caches as paged ones, and their block table, in which the keys begin after `leftpad`."""
    batch = q.shape[0]
    for name, x in (("cache_batch_idx", rows), ("cache_leftpad", leftpad)):
        if x is not None:
            check_numbers(name, x, q, batch, "[batch], as q")
    check_rows(rows, batch, k_cache.shape[0])
    pages = as_pages(k_cache, v_cache) if leftpad is None else as_pages(k_cache, v_cache, (1,))
    if leftpad is not None and pages.of_row != k_cache.shape[1] and not written:
        pages = as_pages(k_cache.contiguous(), v_cache.contiguous(), (1,))
    if leftpad is not None and pages.of_row != k_cache.shape[1]:
        raise ValueError(
            f"k_cache: strides {k_cache.stride()}, v_cache: {v_cache.stride()}; with k and cache_leftpad, expected "
            "rows a whole number of tokens apart, as many in both, or under torch.compile side by side"
        )
    return pages.key, pages.value, table_of(pages, batch, rows, leftpad)


Masks = tuple[bool, int | None]


def _of_batch(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`_attend` for q of `[batch, seqlen_q, heads, head_size]`; the log-sum-exp is `[batch, heads, seqlen_q]`."""
    batch, seqlen_q, heads, head_size = q.shape
    if seqlen_q:
        cu_seqlens_q = torch.arange(0, batch * seqlen_q + 1, seqlen_q, dtype=torch.int32, device=q.device)
    else:
        cu_seqlens_q = torch.zeros(batch + 1, dtype=torch.int32, device=q.device)
    rows = q.reshape(batch * seqlen_q, heads, head_size)
    out, lse = _attend(rows, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, seqlen_q, *options)
    if lse is not None:
        lse = lse.view(batch, seqlen_q, heads).transpose(1, 2).contiguous()
    return out.view(q.shape), lse


def _attend(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    softmax_scale: float | None,
    masks: Masks,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    s_aux: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    check_per_head("s_aux", s_aux, q, (torch.float32, q.dtype))
    if key_cache.numel() == 0:  # no key at all, which is no cache
        key_cache = value_cache = q.new_empty((1, 1, 1, q.shape[2]))
        block_table = block_table.new_zeros((seq_lens.shape[0], 1))
        seq_lens = torch.zeros_like(seq_lens)
    options: dict[str, Any] = dict(max_seqlen_q=max_seqlen_q, scale=softmax_scale, softcap=softcap, sinks=s_aux)
    options |= dict(causal=masks[0], window_size=masks[1], alibi_slopes=alibi_slopes)
    args = q, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q
    if return_lse:
        return paged_attention(*args, **options, return_lse=True)
    return paged_attention(*args, **options), None
