"""FlashInfer's attention over a paged cache: its decode and prefill wrappers; plans and page tables are set-up.

A mixed batch is one call of the prefill wrapper, or one of each wrapper. The workspace is shared by all of them.
"""

import os
from typing import Any

import torch

from octavo.bench.attention_peers import Call
from octavo.bench.harness import Inputs, LeftOut, Unsupported
from octavo.bench.paged_inputs import apart
from octavo.bench.providers import flashinfer_workspace, page_tables


def fa2(inputs: Inputs) -> Call:
    """Its decode kernels on tensor cores, its FlashAttention-2 kernels for more than one query."""
    out = torch.empty_like(inputs["query"])
    return _prefill(inputs, out, "fa2") if inputs["max_seqlen_q"] > 1 else _decode(inputs, out)


def fa3(inputs: Inputs) -> Call:
    """Its FlashAttention-3 kernels, which take minutes to compile: only where OCTAVO_BENCH_FA3=1 asks for them."""
    import flashinfer  # noqa: F401  (missing is said before disabled)

    if inputs["max_seqlen_q"] == 1:
        raise Unsupported("prefill only")
    return _prefill(inputs, torch.empty_like(inputs["query"]), "fa3")


def two_calls_fa2(inputs: Inputs) -> Call:
    return _two_calls(inputs, "fa2")


def two_calls_fa3(inputs: Inputs) -> Call:
    return _two_calls(inputs, "fa3")


def _two_calls(inputs: Inputs, backend: str) -> Call:
    """The decode wrapper for the decode tokens of a mixed batch, the prefill wrapper for its chunks."""
    import flashinfer  # noqa: F401

    decodes, chunks = apart(inputs)
    out = torch.empty_like(inputs["query"])
    tokens = decodes["query"].shape[0]
    second = _prefill(chunks, out[tokens:], backend)
    first = _decode(decodes, out[:tokens])

    def call() -> torch.Tensor:
        first()
        second()
        return out

    return call


def _decode(inputs: Inputs, out: torch.Tensor) -> Call:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    query, caches, scales = inputs["query"], _caches(inputs), _scales(inputs)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(flashinfer_workspace(query.device), "NHD", use_tensor_cores=True)
    wrapper.plan(*_pages(inputs), **_kinds(inputs))
    return lambda: wrapper.run(query, caches, out=out, **scales)


def _prefill(inputs: Inputs, out: torch.Tensor, backend: str) -> Call:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    query, caches, scales = inputs["query"], _caches(inputs), _scales(inputs)
    if backend == "fa3":
        if scales:
            raise Unsupported("a float8 cache beside float8 queries only")
        if os.environ.get("OCTAVO_BENCH_FA3") != "1":
            raise LeftOut("takes minutes to compile; set OCTAVO_BENCH_FA3=1")
    wrapper = BatchPrefillWithPagedKVCacheWrapper(flashinfer_workspace(query.device), "NHD", backend=backend)
    wrapper.plan(inputs["cu_seqlens_q"], *_pages(inputs), causal=True, **_kinds(inputs))
    return lambda: wrapper.run(query, caches, out=out, **scales)


def _caches(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    if "key_scale_cache" in inputs:
        raise Unsupported("no int8 cache")
    return inputs["key_cache"], inputs["value_cache"]


def _scales(inputs: Inputs) -> dict[str, float]:
    return {name: inputs[name].item() for name in ("k_scale", "v_scale") if name in inputs}


def _pages(inputs: Inputs) -> tuple[Any, ...]:
    """The page tables, query heads, KV heads, head size and page size: the middle of both wrappers' `plan`."""
    _, page_size, kv_heads, size = inputs["key_cache"].shape
    tables = page_tables(inputs["block_table"], inputs["seq_lens"], page_size)
    return *tables, inputs["query"].shape[1], kv_heads, size, page_size


def _kinds(inputs: Inputs) -> dict[str, Any]:
    return {
        "window_left": (inputs["window"] or 0) - 1,
        "q_data_type": inputs["query"].dtype,
        "kv_data_type": inputs["key_cache"].dtype,
    }
