"""Attention of a batch whose sequences share a prefix, such as a system prompt, which is read once for all of them.

The attention over the prefix's keys and that over each sequence's own are merged by their log-sum-exp, which is exact:
section 2.2 of Ye et al., "FlashInfer" (2025), https://arxiv.org/abs/2501.01005. Composed of the public ops, as an
engine could do it itself; it has no kernel and is no op of its own.
"""

from typing import Any, Literal, overload

import torch

from octavo.kernels.attention.merge import merge_attention_states
from octavo.kernels.attention.paged_attention import paged_attention
from octavo.kernels.checks import check_device, check_dtype, check_ndim, check_shape


@overload
def cascade_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    prefix_block_table: torch.Tensor,
    prefix_len: torch.Tensor,
    suffix_block_table: torch.Tensor,
    suffix_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    max_seqlen_q: int,
    scale: float | None = None,
    causal: bool = True,
    window_size: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    key_scale_cache: torch.Tensor | None = None,
    value_scale_cache: torch.Tensor | None = None,
    batch_invariant: bool = False,
    return_lse: Literal[False] = False,
) -> torch.Tensor: ...
@overload
def cascade_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    prefix_block_table: torch.Tensor,
    prefix_len: torch.Tensor,
    suffix_block_table: torch.Tensor,
    suffix_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    max_seqlen_q: int,
    scale: float | None = None,
    causal: bool = True,
    window_size: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    key_scale_cache: torch.Tensor | None = None,
    value_scale_cache: torch.Tensor | None = None,
    batch_invariant: bool = False,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
def cascade_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    prefix_block_table: torch.Tensor,
    prefix_len: torch.Tensor,
    suffix_block_table: torch.Tensor,
    suffix_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    max_seqlen_q: int,
    scale: float | None = None,
    causal: bool = True,
    window_size: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    key_scale_cache: torch.Tensor | None = None,
    value_scale_cache: torch.Tensor | None = None,
    batch_invariant: bool = False,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over a paged KV cache where all sequences begin with the same keys, which are read once for all.

    `paged_attention` over the prefix's keys and then each sequence's own, computed as
    `merge_attention_states(attention over the prefix, attention over the sequence's own keys)`

    Each length belongs to the table before it. Who has whole tables and lengths, as in vLLM, passes, for a prefix of
    `n` full pages, `block_table[:1, :n]`, its length, `block_table[:, n:]` and `seq_lens - prefix_len`.

    Args:
        query: as for `paged_attention`: `[tokens, heads, head_size]`, decode tokens and prefill chunks mixed. A
            sequence's queries are the last positions of its own keys, of which there are as many or more.
        key_cache: as for `paged_attention`, `[pages, page_size, kv_heads, head_size]`; it holds the prefix's keys and
            the sequences' own.
        value_cache: as key_cache.
        prefix_block_table: `[1, prefix_pages]` int32, the pages of the prefix that all sequences share.
        prefix_len: `[1]` int32 on query's device, keys of the prefix: its last page may be partly filled. 0 for none.
        suffix_block_table: `[sequences, max_pages]` int32, the pages of each sequence's own keys, the prefix's not
            among them: its first slot holds position `prefix_len`.
        suffix_lens: `[sequences]` int32, keys of each sequence that are its own, this step's included and the
            prefix's not. 0 for a padding entry, whose queries, if it has any, see the prefix alone.
        cu_seqlens_q: `[sequences + 1]` int32, as for `paged_attention`; rows from its last value on are padding.
        max_seqlen_q: upper bound of queries a sequence, as for `paged_attention`.
        scale: of the scores; `head_size ** -0.5` if None.
        causal: whether a query sees none of its sequence's keys after its own position; all see the whole prefix.
        window_size: None: a window would end at another place of the prefix for each query.
        softcap: as for `paged_attention`; 0.0 for none.
        alibi_slopes: None: a query's distance from the prefix is not known where the prefix is attended to.
        sinks: as for `paged_attention`; they stand once in the softmax over all keys.
        k_scale: as for `paged_attention`, of a float8 cache.
        v_scale: as k_scale.
        key_scale_cache: as for `paged_attention`, of an int8 cache.
        value_scale_cache: as key_scale_cache.
        batch_invariant: as for `paged_attention`, at the same division into prefix and own keys.
        return_lse: also return the log-sum-exp of each row's scores, over all keys.

    Returns:
        As `paged_attention`: `[tokens, heads, head_size]` in query's dtype; with return_lse also `[tokens, heads]`
        fp32.
        Rows of padding, and rows that see no key at all, are 0, with a log-sum-exp of -inf, or the sink.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a window or ALiBi slopes, for which `paged_attention` over whole tables is right; otherwise as
            `paged_attention`.

    The two parts are rounded to query's dtype before they are merged in fp32. Safe in a CUDA graph, which may be
    replayed with another prefix and other lengths and pages. https://arxiv.org/abs/2501.01005
    """
    for name, option in (("window_size", window_size), ("alibi_slopes", alibi_slopes)):
        if option is not None:
            given = f"shape {tuple(option.shape)}" if isinstance(option, torch.Tensor) else option
            raise ValueError(
                f"{name}: {given}; expected None, as the prefix is attended to without regard to positions: "
                "call paged_attention with whole block tables"
            )
    for name, x in (("prefix_block_table", prefix_block_table), ("suffix_block_table", suffix_block_table)):
        check_dtype(name, x, (torch.int32,))
        check_ndim(name, x, 2, "[sequences, max_pages], one row for the prefix")
        check_device(name, x, "query", query)
    if prefix_block_table.shape[0] != 1:
        raise ValueError(
            f"prefix_block_table: {prefix_block_table.shape[0]} rows; expected 1, the pages that all sequences share"
        )
    sequences = suffix_block_table.shape[0]
    shapes = (
        ("prefix_len", prefix_len, 1, "[1], a length in a tensor on query's device"),
        ("suffix_lens", suffix_lens, sequences, "[sequences], as many as suffix_block_table has rows"),
        ("cu_seqlens_q", cu_seqlens_q, sequences + 1, "[sequences + 1], where each sequence's queries start"),
    )
    for name, x, size, meaning in shapes:
        check_dtype(name, x, (torch.int32,))
        check_shape(name, x, (size,), meaning)
        check_device(name, x, "query", query)
    # One sequence that has all queries but those of padding, which see nothing in either part.
    all_queries = torch.cat((cu_seqlens_q[:1], cu_seqlens_q[-1:]))
    options: dict[str, Any] = dict(scale=scale, softcap=softcap, batch_invariant=batch_invariant, k_scale=k_scale)
    options |= dict(v_scale=v_scale, key_scale_cache=key_scale_cache, value_scale_cache=value_scale_cache)
    prefix = paged_attention(
        query,
        key_cache,
        value_cache,
        prefix_block_table,
        prefix_len,
        all_queries,
        max_seqlen_q=query.shape[0],
        causal=False,
        return_lse=True,
        **options,
    )
    own = paged_attention(
        query,
        key_cache,
        value_cache,
        suffix_block_table,
        suffix_lens,
        cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        causal=causal,
        sinks=sinks,
        return_lse=True,
        **options,
    )
    out, lse = merge_attention_states(*prefix, *own)
    return (out, lse) if return_lse else out
