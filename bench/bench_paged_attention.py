"""Attention over a paged KV cache: decode steps, prefills and chunks of prefills, causal.

A decode step is bound by the bytes of K and V, a prefill by the tensor cores. All sequences of a case have one length;
their pages are scattered over the whole cache.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

import octavo
from octavo.bench import attention_peers as peers
from octavo.bench.harness import Inputs, Provider, Shape
from octavo.bench.providers import drawn, full_fp32, wide_dtype
from octavo.bench.shapes import FALCON_7B, LLAMA_2_70B, LLAMA_3_8B, MISTRAL_7B, Model

OP = "paged_attention"
DTYPES = (torch.bfloat16,)

# Scores held at once by the exact computation: 512 MB in fp32.
SCORES = 2**27

# (sequences, new tokens of each, context with them)
DECODE = [(b, 1, c) for b, c in ((1, 1024), (1, 4096), (1, 32768), (16, 1024), (16, 4096), (64, 1024), (64, 4096))]
DECODE += [(256, 1, 1024), (256, 1, 4096)]
WIDE_DECODE = [(1, 1, 4096), (64, 1, 4096), (256, 1, 1024)]
WINDOW_DECODE = [(1, 1, 32768), (16, 1, 32768)]
PREFILL = [(8, 2048, 2048), (2, 8192, 8192), (1, 16384, 16384)]
CHUNKS = [(1, 2048, 8192), (1, 2048, 32768), (4, 512, 4096)]
LARGE_PAGE_DECODE = [(1, 1, 4096), (16, 1, 4096), (64, 1, 4096)]
SHORT = [(1, 1, 2048), (64, 1, 2048), (8, 2048, 2048)]  # Falcon's context ends at 2048


def _shapes(model: Model, cases: Iterable[tuple[int, int, int]], page: int = 16, window: int = 0) -> list[Shape]:
    heads = {"heads": model.heads, "kv_heads": model.kv_heads, "D": model.head_dim}
    return [{"B": b, "q": q, "ctx": ctx} | heads | {"page": page, "window": window} for b, q, ctx in cases]


def shapes() -> list[Shape]:
    """`window` is 0 for none. Pages of 128 as well where a peer is known to be faster with them."""
    return [
        *_shapes(LLAMA_3_8B, DECODE),
        *_shapes(LLAMA_3_8B, LARGE_PAGE_DECODE, page=128),
        *_shapes(LLAMA_2_70B, WIDE_DECODE),
        *_shapes(MISTRAL_7B, WINDOW_DECODE, window=MISTRAL_7B.window or 0),
        *_shapes(LLAMA_3_8B, PREFILL),
        *_shapes(LLAMA_3_8B, PREFILL, page=128),
        *_shapes(LLAMA_3_8B, CHUNKS),
        *_shapes(FALCON_7B, SHORT),
    ]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    sequences, page_size = shape["B"], shape["page"]
    pages = -(-shape["ctx"] // page_size)
    fresh = drawn(dtype, device, generator)
    cache = sequences * pages, page_size, shape["kv_heads"], shape["D"]
    table = torch.randperm(sequences * pages, generator=generator, device=device).to(torch.int32)
    ints: dict[str, Any] = {"device": device, "dtype": torch.int32}
    return {
        "query": torch.randn(sequences * shape["q"], shape["heads"], shape["D"], **fresh),
        "key_cache": torch.randn(cache, **fresh),
        "value_cache": torch.randn(cache, **fresh),
        "block_table": table.view(sequences, pages),
        "seq_lens": torch.full((sequences,), shape["ctx"], **ints),
        "cu_seqlens_q": torch.arange(sequences + 1, **ints) * shape["q"],
        "max_seqlen_q": shape["q"],
        "max_seqlen_k": shape["ctx"],
        "window": shape["window"] or None,
    }


def exact(inputs: Inputs) -> torch.Tensor:
    """Softmax of all visible scores; in fp64 on a CPU, in fp32 on a GPU; a sequence and some queries at a time."""
    query, new, context = inputs["query"], inputs["max_seqlen_q"], inputs["max_seqlen_k"]
    wide, rows = wide_dtype(query.device), max(1, SCORES // (query.shape[1] * context))
    out = torch.empty(query.shape, dtype=wide, device=query.device)
    with full_fp32():
        for sequence, pages in enumerate(inputs["block_table"].long()):
            key, value = (
                inputs[name][pages].flatten(0, 1)[:context].to(wide).transpose(0, 1)
                for name in ("key_cache", "value_cache")
            )
            for start in range(0, new, rows):
                part = slice(sequence * new + start, sequence * new + min(start + rows, new))
                out[part] = _attend(query[part].to(wide), key, value, context - new + start, inputs["window"])
    return out


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position: int, window: int | None
) -> torch.Tensor:
    """Queries `[n, Hq, D]` at `position` and after, keys and values `[Hkv, context, D]` → `[n, Hq, D]`."""
    count, heads, size = query.shape
    first = max(0, position - window + 1) if window else 0
    last = position + count
    at = torch.arange(position, last, device=query.device)[:, None]
    keys = torch.arange(first, last, device=query.device)
    hidden = keys > at
    if window:
        hidden |= keys <= at - window
    grouped = query.view(count, key.shape[0], -1, size).permute(1, 2, 0, 3)  # [Hkv, group, n, D]
    scores = grouped @ key[:, None, first:last].transpose(-1, -2) * size**-0.5
    result = scores.masked_fill_(hidden, float("-inf")).softmax(-1) @ value[:, None, first:last]
    return result.permute(2, 0, 1, 3).reshape(count, heads, size)


def visible_pairs(shape: Shape) -> int:
    """How many (query, key) pairs one head computes."""
    first, window = shape["ctx"] - shape["q"], shape["window"]
    return shape["B"] * sum(min(p + 1, window or p + 1) for p in range(first, shape["ctx"]))


def flops(shape: Shape) -> int:
    """Two products of D a visible pair and head; the softmax is not counted."""
    return 4 * shape["heads"] * shape["D"] * visible_pairs(shape)


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    """Query read, output written, each key and value that any query sees read once, and the tables."""
    rows = shape["B"] * shape["q"]
    keys = min(shape["ctx"], shape["window"] + shape["q"] - 1) if shape["window"] else shape["ctx"]
    elements = 2 * rows * shape["heads"] + 2 * shape["B"] * keys * shape["kv_heads"]
    tables = shape["B"] * -(-keys // shape["page"]) + 2 * shape["B"] + 1
    return elements * shape["D"] * dtype.itemsize + 4 * tables


def _octavo(inputs: Inputs) -> Callable[[], torch.Tensor]:
    names = ("query", "key_cache", "value_cache", "block_table", "seq_lens", "cu_seqlens_q")
    arguments = [inputs[name] for name in names]
    longest, window = inputs["max_seqlen_q"], inputs["window"]
    return lambda: octavo.paged_attention(*arguments, max_seqlen_q=longest, window_size=window)


def _planned(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """One layer of many: the plan of the step is there."""
    query, key_cache, value_cache, *tables = [
        inputs[name] for name in ("query", "key_cache", "value_cache", "block_table", "seq_lens", "cu_seqlens_q")
    ]
    options: dict[str, Any] = {"max_seqlen_q": inputs["max_seqlen_q"], "window_size": inputs["window"]}
    plan = octavo.plan_attention(query, key_cache, *tables, **options)
    return lambda: octavo.paged_attention(query, key_cache, value_cache, *tables, **options, plan=plan)


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch (dense K/V)": Provider(peers.torch_dense, devices=("cpu", "cuda"), package="torch"),
    "torch cuDNN (dense K/V)": Provider(peers.cudnn_dense, package="torch"),
    "octavo, planned": Provider(_planned, package="octavo"),
    "flashinfer": Provider(peers.flashinfer, "flashinfer", package="flashinfer-python"),
    "flashinfer fa3": Provider(peers.flashinfer_fa3, "flashinfer", package="flashinfer-python"),
    "vllm fa3": Provider(peers.vllm_fa3, "vllm", package="vllm"),
    "vllm triton": Provider(peers.vllm_triton, "vllm", package="vllm"),
    "conch": Provider(peers.conch, "triton-peers", package="conch-triton-kernels"),
}
