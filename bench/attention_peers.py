"""The providers of paged attention: torch over gathered K and V, vLLM's FlashAttention-3 and Triton, conch.

Scheduling metadata and what is gathered are set-up. All scale scores by `D ** -0.5`, which is every peer's default.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from octavo.bench.harness import Inputs, Unsupported
from octavo.bench.paged_inputs import apart

Call = Callable[[], torch.Tensor]


def torch_dense(inputs: Inputs) -> Call:
    """SDPA with the backend that torch chooses. K and V are gathered into dense tensors outside of the timing."""
    query, key, value = _dense(inputs)
    new, keys = query.shape[2], key.shape[2]
    if new == 1:
        return lambda: _packed(F.scaled_dot_product_attention(query, key, value, enable_gqa=True))
    if new == keys:
        return lambda: _packed(F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True))
    from torch.nn.attention.bias import causal_lower_right

    # The last query sees all keys. Torch's flash backend knows this mask by its type; no mask is read from memory.
    mask = causal_lower_right(new, keys)
    return lambda: _packed(F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True))


def cudnn_dense(inputs: Inputs) -> Call:
    """cuDNN's prefill: the ceiling of attention without pages."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query, key, value = _dense(inputs)
    if query.shape[2] != key.shape[2]:
        raise Unsupported("whole prefills only")

    def call() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return _packed(F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True))

    return call


def _dense(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value as SDPA takes them, `[B, heads, tokens, D]`; with a window, the keys in it alone."""
    sequences, context, window = inputs["block_table"].shape[0], inputs["max_seqlen_k"], inputs["window"]
    _require_plain(inputs)
    if inputs.get("chunks"):
        raise Unsupported("no mixed batch")
    if inputs["seq_lens"].min() < context:
        raise Unsupported("sequences of one length only")
    first = 0
    if window:
        if inputs["max_seqlen_q"] > 1:
            raise Unsupported("no window for more than one query")
        first = max(0, context - window)
    pages = inputs["block_table"].long()
    key, value = (
        inputs[name][pages].flatten(1, 2)[:, first:context].transpose(1, 2).contiguous()
        for name in ("key_cache", "value_cache")
    )
    query = inputs["query"].view(sequences, -1, *inputs["query"].shape[1:]).transpose(1, 2)
    return query, key, value


def _require_plain(inputs: Inputs) -> None:
    if inputs["key_cache"].element_size() == 1:
        raise Unsupported("no quantised cache beside queries of two bytes")


def _packed(out: torch.Tensor) -> torch.Tensor:
    """`[B, heads, tokens, D]` → `[B · tokens, heads, D]`, a view wherever SDPA keeps the query's layout."""
    return out.transpose(1, 2).reshape(-1, out.shape[1], out.shape[3])


def vllm_fa3(inputs: Inputs) -> Call:
    return _fa3(inputs, torch.empty_like(inputs["query"]))


def vllm_fa3_two_calls(inputs: Inputs) -> Call:
    """A call for the decode tokens of a mixed batch and one for its chunks, each with its own metadata."""
    import vllm.vllm_flash_attn  # noqa: F401  (missing is said before unsupported)

    decodes, chunks = apart(inputs)
    out = torch.empty_like(inputs["query"])
    tokens = decodes["query"].shape[0]
    first, second = _fa3(decodes, out[:tokens]), _fa3(chunks, out[tokens:])

    def call() -> torch.Tensor:
        first()
        second()
        return out

    return call


def _fa3(inputs: Inputs, out: torch.Tensor) -> Call:
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    _require_plain(inputs)
    query, key_cache, value_cache = (inputs[name] for name in ("query", "key_cache", "value_cache"))
    lengths, starts = inputs["seq_lens"], inputs["cu_seqlens_q"]
    longest_q, longest_k = inputs["max_seqlen_q"], inputs["max_seqlen_k"]
    _, page_size, kv_heads, size = key_cache.shape
    window = [inputs["window"] - 1, 0] if inputs["window"] else [-1, -1]
    metadata = get_scheduler_metadata(
        batch_size=lengths.shape[0],
        max_seqlen_q=longest_q,
        max_seqlen_k=longest_k,
        num_heads_q=query.shape[1],
        num_heads_kv=kv_heads,
        headdim=size,
        cache_seqlens=lengths,
        qkv_dtype=query.dtype,
        cu_seqlens_q=starts,
        page_size=page_size,
        causal=True,
        window_size=tuple(window),
    )
    return lambda: flash_attn_varlen_func(
        *(query, key_cache, value_cache, longest_q, starts, longest_k),
        seqused_k=lengths,
        block_table=inputs["block_table"],
        causal=True,
        window_size=window,
        out=out,
        fa_version=3,
        scheduler_metadata=metadata,
        num_splits=0,
    )


def vllm_triton(inputs: Inputs) -> Call:
    """vLLM's Triton backend as its engine calls it: decode over 16 segments up to 128 / kv_heads sequences."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    query, key_cache, value_cache = (inputs[name] for name in ("query", "key_cache", "value_cache"))
    scales = [
        inputs[x].expand(query.shape[0], key_cache.shape[2]) if x in inputs else None for x in ("k_scale", "v_scale")
    ]
    lengths, starts, out = inputs["seq_lens"], inputs["cu_seqlens_q"], torch.empty_like(query)
    longest_q, longest_k, table = inputs["max_seqlen_q"], inputs["max_seqlen_k"], inputs["block_table"]
    kv_heads, size = key_cache.shape[2:]
    window = (inputs["window"] - 1, 0) if inputs["window"] else (-1, -1)
    segments = (query.shape[0], query.shape[1], 16) if longest_q == 1 else (1, query.shape[1], 16)
    partial: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    scratch = dict(
        seq_threshold_3D=128 // kv_heads,
        num_par_softmax_segments=16,
        softmax_segm_output=torch.empty(*segments, 1 << (size - 1).bit_length(), **partial),
        softmax_segm_max=torch.empty(segments, **partial),
        softmax_segm_expsum=torch.empty(segments, **partial),
        **_vllm_quantisation(inputs),
    )

    def call() -> torch.Tensor:
        unified_attention(
            *(query, key_cache, value_cache, out, starts, longest_q, lengths, longest_k, size**-0.5, True, window),
            *(table, 0.0, None, *scales),
            **scratch,
        )
        return out

    return call


def _vllm_quantisation(inputs: Inputs) -> dict[str, Any]:
    """What a quantised cache is said to be: without it the scales are not read."""
    if inputs["key_cache"].element_size() > 1:
        return {}
    from vllm.v1.kv_cache_interface import KVQuantMode

    if "k_scale" in inputs:
        return {"kv_quant_mode": KVQuantMode.FP8_PER_TENSOR}
    scales = {f"{name[0]}_scale_cache": inputs[f"{name}_scale_cache"] for name in ("key", "value")}
    return {"kv_quant_mode": KVQuantMode.INT8_PER_TOKEN_HEAD, **scales}


def conch(inputs: Inputs) -> Call:
    """Its decode kernel for one query a sequence, its kernel for varying lengths otherwise."""
    from conch.ops.attention.paged_attention import paged_attention
    from conch.ops.attention.varlen_attention import varlen_attention

    _require_plain(inputs)
    if inputs["window"]:
        raise Unsupported("no sliding window")
    if inputs.get("chunks"):
        raise Unsupported("no mixed batch")
    if 1 < inputs["max_seqlen_q"] < inputs["max_seqlen_k"]:
        raise Unsupported("its causal mask lets query i see keys 0 to i: no chunk after a cached context")
    query, key_cache, value_cache = (inputs[name] for name in ("query", "key_cache", "value_cache"))
    table, lengths, out = inputs["block_table"], inputs["seq_lens"], torch.empty_like(query)
    longest_q, longest_k, starts = inputs["max_seqlen_q"], inputs["max_seqlen_k"], inputs["cu_seqlens_q"]
    if longest_q == 1:
        return lambda: paged_attention(query, key_cache, value_cache, table, lengths, output=out)
    return lambda: varlen_attention(
        *(query, key_cache, value_cache, starts, longest_q, lengths, longest_k, table), output=out, causal=True
    )
