"""The op `paged_attention`: its schema, its checks and its public function. The kernel is `paged.py`'s."""

from typing import Literal, overload

import torch

from octavo.kernels.attention.paged import _paged_attention_cuda, outputs
from octavo.kernels.attention.paged_check import (
    check_lengths,
    check_paged_attention,
    check_per_head,
    check_plan,
    check_rolling,
)
from octavo.kernels.registry import register
from octavo.kernels.replay import replayed
from octavo.reference import attention as reference


def _paged_attention_fake(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    scale: float,
    causal: bool,
    window_size: int | None,
    softcap: float,
    return_lse: bool,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    key_scale_cache: torch.Tensor | None,
    value_scale_cache: torch.Tensor | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    rolling: bool,
    batch_invariant: bool,
    plan: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return outputs(query, return_lse)


_paged_attention = register(
    "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens, "
    "Tensor cu_seqlens_q, SymInt max_seqlen_q, float scale, bool causal, int? window_size, float softcap, "
    "bool return_lse, Tensor? k_scale, Tensor? v_scale, Tensor? key_scale_cache, Tensor? value_scale_cache, "
    "Tensor? sinks, Tensor? alibi_slopes, bool rolling, bool batch_invariant, Tensor? plan) -> (Tensor, Tensor)",
    reference=reference.paged_attention,
    launcher=_paged_attention_cuda,
    fake=_paged_attention_fake,
)


@overload
def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    max_seqlen_q: int,
    scale: float | None = None,
    causal: bool = True,
    window_size: int | None = None,
    rolling: bool = False,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    key_scale_cache: torch.Tensor | None = None,
    value_scale_cache: torch.Tensor | None = None,
    batch_invariant: bool = False,
    plan: torch.Tensor | None = None,
    return_lse: Literal[False] = False,
) -> torch.Tensor: ...
@overload
def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    max_seqlen_q: int,
    scale: float | None = None,
    causal: bool = True,
    window_size: int | None = None,
    rolling: bool = False,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    key_scale_cache: torch.Tensor | None = None,
    value_scale_cache: torch.Tensor | None = None,
    batch_invariant: bool = False,
    plan: torch.Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@replayed
def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    max_seqlen_q: int,
    scale: float | None = None,
    causal: bool = True,
    window_size: int | None = None,
    rolling: bool = False,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    key_scale_cache: torch.Tensor | None = None,
    value_scale_cache: torch.Tensor | None = None,
    batch_invariant: bool = False,
    plan: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of new tokens over a paged KV cache that holds their keys and values already (`write_kv`).

    `out[i] = Σ_j softmax_j(score(i, j)) · value[j]`, with `score = scale · query[i] · key[j]`, capped to
    `softcap · tanh(score / softcap)` where softcap is not 0. Any mix of decode tokens and prefill chunks.

    Args:
        query: `[tokens, heads, head_size]`, fp16, bf16 or fp32; last dimension contiguous, the others of any stride;
            head_size a multiple of 8 up to 256. Sequence b owns rows `cu_seqlens_q[b]` to `cu_seqlens_q[b + 1]`: the
            last positions of its `seq_lens[b]` keys.
        key_cache: `[pages, page_size, kv_heads, head_size]`, query's dtype, float8_e4m3fn (sm_89 or later), float8_e5m2
            or int8, as `write_kv` writes them; last dimension contiguous, the others of any stride: for a cache with
            heads first, `[pages, kv_heads, page_size, head_size]`, pass `cache.transpose(1, 2)`. heads is a multiple of
            kv_heads; heads `h·group` to `(h+1)·group` use KV head h.
        value_cache: as key_cache; its strides may differ. Both may be views of one buffer.
        block_table: `[sequences, max_pages]` int32, the page ids of each sequence in order; rows of any stride. Entries
            past the sequence's end, or wholly before the window of its first query, are never read.
        seq_lens: `[sequences]` int32, keys of each sequence, this step's included; 0 for a padding entry.
        cu_seqlens_q: `[sequences + 1]` int32, starts at 0; rows from its last value on are padding.
        max_seqlen_q: upper bound of queries a sequence; it guides the tile choice only, so a wrong one costs speed
            (with rolling, also the keys of a longer query's past that have been replaced).
        scale: of the scores; `head_size ** -0.5` if None.
        causal: whether a query sees no key after its own position; else it sees all of its sequence's.
        window_size: a query sees its own position and the `window_size - 1` before it (Hugging Face's sliding_window);
            None for no limit. Without causal it limits the past alone.
        rolling: whether a row of block_table is a ring: position j lies in page `block_table[b, j // page_size %
            max_pages]`, slot `j % page_size`, and replaces what lay there, so that a sequence of any length keeps
            max_pages pages. With window_size only; the ring must hold what the step's queries see, `max_pages ·
            page_size ≥ window_size + max_seqlen_q - 1`: give longer prompts in chunks, the older ones' keys written and
            attended to before the next chunk is written. Slots for `write_kv` follow the same formula.
        softcap: in units of the scores (Gemma 2 has 50.0); 0.0 for none.
        alibi_slopes: `[heads]` fp32, or None: from each score, after the cap, `slope · |i - j|` is subtracted, i and j
            being the positions of query and key (ALiBi, as FlashAttention has it).
        sinks: `[heads]`, fp32 or query's dtype, or None: a score of each query head that stands in the softmax beside
            those of the keys and has no value (gpt-oss); neither scaled nor capped.
        k_scale: of a float8 key_cache, fp32: one element for all heads, or `[kv_heads]`; None is 1.0. Keys are the
            cache's numbers times it; an infinite one counts as NaN.
        v_scale: as k_scale, of value_cache.
        key_scale_cache: of an int8 key_cache, and only of that: `[pages, page_size, kv_heads]` fp32 of any strides,
            the scale of each token's head.
        value_scale_cache: as key_scale_cache, of value_cache.
        batch_invariant: whether a token's result has the same bits whatever else is in the batch (other sequences,
            their order and lengths, padding, max_seqlen_q) and, if causal, however its prompt was cut into chunks, down
            to single tokens: they depend on its query and on the keys and values that it sees alone, given the same
            options, kind of cache and kind of GPU. The exception is a value in the cache that is NaN or infinite: it
            may reach earlier tokens of its chunk. Slower, since all batches have one tile choice, and the keys of a
            long sequence are not shared out to several multiprocessors. Without it the bits depend on the batch.
        plan: what `plan_attention` returned for these lengths and options, which saves programs the search for their
            work where keys are shared out to them (decoding); None does without. All layers of a step can use one
            plan, which stays as it is; the result has the same bits as without. Not with batch_invariant.
        return_lse: also return the log-sum-exp of each row's scores.

    Returns:
        `[tokens, heads, head_size]`, contiguous, in query's dtype; with return_lse also `[tokens, heads]` fp32, natural
        logarithm. Rows with nothing to attend to (padding, a sequence of no keys) are 0, with a log-sum-exp of -inf.
        With sinks the log-sum-exp counts the sink, as FlashAttention's does, also in those rows, where it is the sink.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, stride, device or option that does not fit; a scale that is missing or not the cache's; a
            plan of another shape than this call's; on the CPU, a page id outside of the cache or lengths that
            contradict each other. A GPU kernel, which can't raise without a synchronisation, leaves out the keys of
            such pages, or on Hopper, with many queries, takes them for zeros.

    Sums, softmax and scores are fp32. Numbers of a quantised cache are multiplied in query's dtype, or in fp16, which
    hold them exactly; scales are applied to scores, weights and sums in fp32. A query that sees a key whose scale is
    NaN becomes NaN. The same inputs give the same bits. Safe in a CUDA graph, which may be replayed with other lengths
    and pages.
    https://arxiv.org/abs/2309.06180, https://arxiv.org/abs/2205.14135, https://arxiv.org/abs/2309.17453,
    https://arxiv.org/abs/2108.12409
    """
    scales = k_scale, v_scale, key_scale_cache, value_scale_cache
    check_paged_attention(query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, *scales)
    check_per_head("sinks", sinks, query, (torch.float32, query.dtype))
    check_per_head("alibi_slopes", alibi_slopes, query, (torch.float32,))
    check_plan(plan, query)
    if batch_invariant and plan is not None:
        raise ValueError("plan: given; expected None with batch_invariant, which shares out no keys")
    check_lengths(max_seqlen_q, window_size)
    if rolling:
        check_rolling(block_table, key_cache.shape[1], window_size, max_seqlen_q)
    if softcap < 0:
        raise ValueError(f"softcap: {softcap}; expected a positive number, or 0.0 for none")
    if scale is None:
        scale = query.shape[2] ** -0.5
    out, lse = _paged_attention(
        query,
        key_cache,
        value_cache,
        block_table,
        seq_lens,
        cu_seqlens_q,
        max_seqlen_q,
        scale,
        causal,
        window_size,
        softcap,
        return_lse,
        *scales,
        sinks,
        alibi_slopes,
        rolling,
        batch_invariant,
        plan,
    )
    return (out, lse) if return_lse else out
