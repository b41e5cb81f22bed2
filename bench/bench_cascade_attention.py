"""Attention of sequences that share a prefix: it is read once for all of them, and each one's own keys for itself.

Bound by the bytes of K and V in a decode step, which are a fraction of what attention over whole sequences reads. All
sequences of a case have one length, the prefix fills whole pages, and pages are scattered over the cache.
"""

from collections.abc import Callable
from typing import Any

import torch

import octavo
from octavo.bench import attention_peers as peers
from octavo.bench import bench_paged_attention as whole
from octavo.bench.harness import Inputs, Provider, Shape
from octavo.bench.providers import drawn, flashinfer_workspace, page_tables
from octavo.bench.shapes import LLAMA_2_70B, LLAMA_3_8B

OP = "cascade_attention"
DTYPES = (torch.bfloat16,)

# (sequences, new tokens of each, keys of the prefix, keys of each sequence's own)
CASES = [(64, 1, 4096, 256), (16, 1, 4096, 256), (256, 1, 4096, 256), (64, 1, 512, 256), (64, 1, 32768, 256)]
CASES += [(8, 256, 4096, 256)]
WIDE = [(64, 1, 4096, 256)]


def shapes() -> list[Shape]:
    return [
        {"B": b, "q": q, "prefix": prefix, "own": own, "heads": m.heads, "kv_heads": m.kv_heads, "D": m.head_dim}
        | {"page": 16}
        for m, cases in ((LLAMA_3_8B, CASES), (LLAMA_2_70B, WIDE))
        for b, q, prefix, own in cases
    ]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    """Those of `paged_attention` over whole sequences, whose tables all begin with the prefix's pages."""
    sequences, page_size = shape["B"], shape["page"]
    shared, own = shape["prefix"] // page_size, -(-shape["own"] // page_size)
    fresh = drawn(dtype, device, generator)
    pages = shared + sequences * own
    cache = pages, page_size, shape["kv_heads"], shape["D"]
    order = torch.randperm(pages, generator=generator, device=device).to(torch.int32)
    table = torch.cat([order[:shared].expand(sequences, -1), order[shared:].view(sequences, own)], 1)
    ints: dict[str, Any] = {"device": device, "dtype": torch.int32}
    context = shape["prefix"] + shape["own"]
    return {
        "query": torch.randn(sequences * shape["q"], shape["heads"], shape["D"], **fresh),
        "key_cache": torch.randn(cache, **fresh),
        "value_cache": torch.randn(cache, **fresh),
        "block_table": table,
        "seq_lens": torch.full((sequences,), context, **ints),
        "cu_seqlens_q": torch.arange(sequences + 1, **ints) * shape["q"],
        "max_seqlen_q": shape["q"],
        "max_seqlen_k": context,
        "window": None,
        "prefix": shape["prefix"],
    }


def exact(inputs: Inputs) -> torch.Tensor:
    return whole.exact(inputs)


def flops(shape: Shape) -> int:
    """Two products of D a visible pair and head, whichever way it is computed; the merge is not counted."""
    return whole.flops({**shape, "ctx": shape["prefix"] + shape["own"], "window": 0})


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    """Query read, output written, the prefix's keys and values read once and each sequence's once, and the tables."""
    keys = shape["prefix"] + shape["B"] * shape["own"]
    elements = 2 * shape["B"] * shape["q"] * shape["heads"] + 2 * keys * shape["kv_heads"]
    pages = shape["prefix"] // shape["page"] + shape["B"] * -(-shape["own"] // shape["page"])
    return elements * shape["D"] * dtype.itemsize + 4 * (pages + 1 + 2 * shape["B"] + 1)


def _apart(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The prefix's table and length, and those of the sequences' own keys."""
    table, prefix = inputs["block_table"], inputs["prefix"]
    pages = prefix // inputs["key_cache"].shape[1]
    length = torch.full_like(inputs["seq_lens"][:1], prefix)
    return table[:1, :pages].contiguous(), length, table[:, pages:].contiguous(), inputs["seq_lens"] - prefix


def _octavo(inputs: Inputs) -> Callable[[], torch.Tensor]:
    arguments = [inputs[name] for name in ("query", "key_cache", "value_cache")]
    arguments += [*_apart(inputs), inputs["cu_seqlens_q"]]
    longest = inputs["max_seqlen_q"]
    return lambda: octavo.cascade_attention(*arguments, max_seqlen_q=longest)


def _flashinfer(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """Its wrapper for several levels, with two of them."""
    from flashinfer import MultiLevelCascadeAttentionWrapper

    query, caches = inputs["query"], (inputs["key_cache"], inputs["value_cache"])
    _, page_size, kv_heads, size = caches[0].shape
    starts = inputs["cu_seqlens_q"]
    table, length, own_table, own_lens = _apart(inputs)
    levels = page_tables(table, length, page_size), page_tables(own_table, own_lens, page_size)
    wrapper = MultiLevelCascadeAttentionWrapper(2, flashinfer_workspace(query.device), "NHD")
    wrapper.plan(
        [starts[:: starts.numel() - 1].contiguous(), starts],
        *([level[i] for level in levels] for i in range(3)),
        *(query.shape[1], kv_heads, size, page_size),
        causal=True,
        q_data_type=query.dtype,
    )
    return lambda: wrapper.run(query, caches)


def _vllm(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """vLLM's cascade of its FlashAttention-3 and its merge, as its FlashAttention backend composes them."""
    import vllm._custom_ops as ops
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    query, longest = inputs["query"], inputs["max_seqlen_q"]
    caches, starts, out = (inputs["key_cache"], inputs["value_cache"]), inputs["cu_seqlens_q"], torch.empty_like(query)
    table, length, own_table, own_lens = _apart(inputs)
    all_starts = starts[:: starts.numel() - 1].contiguous()
    prefix, own, options = inputs["prefix"], inputs["max_seqlen_k"] - inputs["prefix"], {"return_softmax_lse": True}

    def call() -> torch.Tensor:
        prefix_out, prefix_lse = flash_attn_varlen_func(
            *(query, *caches, query.shape[0], all_starts, prefix),
            seqused_k=length,
            block_table=table,
            causal=False,
            fa_version=3,
            **options,
        )
        own_out, own_lse = flash_attn_varlen_func(
            *(query, *caches, longest, starts, own),
            seqused_k=own_lens,
            block_table=own_table,
            causal=True,
            fa_version=3,
            **options,
        )
        ops.merge_attn_states(out, prefix_out, prefix_lse, own_out, own_lse)
        return out

    return call


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch (dense K/V)": Provider(peers.torch_dense, devices=("cpu", "cuda"), package="torch"),
    "octavo, plain": Provider(
        whole.PROVIDERS["octavo"].make,
        devices=("cpu", "cuda"),
        package="octavo",
        note="paged_attention over whole sequences",
    ),
    "flashinfer": Provider(_flashinfer, "flashinfer", package="flashinfer-python"),
    "vllm": Provider(_vllm, "vllm", package="vllm"),
}
