"""Attention over a paged KV cache: decode steps, prefills, chunks of prefills and mixed batches, causal.

A decode step is bound by the bytes of K and V, a prefill by the tensor cores. `paged_inputs.py` says what the keys of a
shape mean.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

import octavo
from octavo.bench import attention_peers as peers
from octavo.bench import flashinfer_peers
from octavo.bench.harness import Inputs, Provider, Shape
from octavo.bench.paged_inputs import bytes_moved, exact, flops, inputs, visible_pairs
from octavo.bench.shapes import (
    FALCON_7B,
    FALCON_40B,
    GEMMA_2_9B,
    LLAMA_2_70B,
    LLAMA_3_2_1B,
    LLAMA_3_8B,
    MISTRAL_7B,
    PHI_3_MINI,
    Model,
)

__all__ = ["DTYPES", "OP", "PROVIDERS", "bytes_moved", "exact", "flops", "inputs", "shapes", "visible_pairs"]

OP = "paged_attention"
DTYPES = (torch.bfloat16,)

# (sequences, new tokens of each, context with them)
DECODE = [(b, 1, c) for b, c in ((1, 1024), (1, 4096), (1, 32768), (16, 1024), (16, 4096), (64, 1024), (64, 4096))]
DECODE += [(256, 1, 1024), (256, 1, 4096)]
WIDE_DECODE = [(1, 1, 4096), (64, 1, 4096), (256, 1, 1024)]
WINDOW_DECODE = [(1, 1, 32768), (16, 1, 32768)]
PREFILL = [(8, 2048, 2048), (2, 8192, 8192), (1, 16384, 16384)]
CHUNKS = [(1, 2048, 8192), (1, 2048, 32768), (4, 512, 4096)]
WINDOW_PREFILL = [(1, 16384, 16384), (1, 32768, 32768)]
OTHER_HEADS = [(4, 4096, 4096)]
# ((decoding sequences, 1, their context), (chunks, new tokens of each, context with them))
MIXED = [((60, 1, 4096), (2, 2048, 4096)), ((8, 1, 32768), (1, 4096, 8192))]
PAGES = [(1, 1, 4096), (16, 1, 4096), (64, 1, 4096)]
QUANTIZED = [(1, 1, 4096), (16, 1, 1024), (16, 1, 4096), (64, 1, 1024), (64, 1, 4096), (256, 1, 1024)]
SHORT = [(1, 1, 2048), (64, 1, 2048), (8, 2048, 2048)]  # Falcon's context ends at 2048


def _shapes(
    model: Model, cases: Iterable[tuple[int, int, int]], page: int = 16, window: int = 0, **more: int
) -> list[Shape]:
    heads = {"heads": model.heads, "kv_heads": model.kv_heads, "D": model.head_dim}
    return [{"B": b, "q": q, "ctx": ctx} | heads | {"page": page, "window": window} | more for b, q, ctx in cases]


def shapes() -> list[Shape]:
    """`window` is 0 for none. Pages of 128 as well where a peer is known to be faster with them. One sequence of 65,536
    keys beside 63 of 1024 is as many bytes as 64 of 2032."""
    return [
        *_shapes(LLAMA_3_8B, DECODE),
        *(shape for page in (64, 128, 256) for shape in _shapes(LLAMA_3_8B, PAGES, page)),
        *_shapes(LLAMA_3_8B, QUANTIZED, fp8=1),
        *_shapes(LLAMA_3_8B, QUANTIZED, int8=1),
        *_shapes(LLAMA_3_8B, [(64, 1, 2032)]),
        *_shapes(LLAMA_3_8B, [(64, 1, 1024)], long=65536),
        *_shapes(LLAMA_2_70B, WIDE_DECODE),
        *_shapes(MISTRAL_7B, WINDOW_DECODE, window=MISTRAL_7B.window or 0),
        *_shapes(LLAMA_3_8B, PREFILL),
        *_shapes(LLAMA_3_8B, PREFILL, page=128),
        *_shapes(LLAMA_3_8B, PREFILL[:2], page=64),
        *_shapes(LLAMA_3_8B, CHUNKS),
        *_shapes(LLAMA_3_8B, CHUNKS, page=128),
        *_shapes(LLAMA_3_8B, [*PREFILL[:2], *CHUNKS[:2]], fp8=1),
        *_shapes(MISTRAL_7B, WINDOW_PREFILL, window=MISTRAL_7B.window or 0),
        *(shape for model in (LLAMA_3_2_1B, PHI_3_MINI, GEMMA_2_9B) for shape in _shapes(model, OTHER_HEADS)),
        *(
            _shapes(LLAMA_3_8B, [decodes], page, chunks=chunks, chunk_q=new, chunk_ctx=context)[0]
            for page in (16, 128)
            for decodes, (chunks, new, context) in MIXED
        ),
        *_shapes(FALCON_7B, SHORT),
        *_shapes(FALCON_40B, SHORT[:2]),
    ]


TABLES = ("block_table", "seq_lens", "cu_seqlens_q")
SCALES = ("k_scale", "v_scale", "key_scale_cache", "value_scale_cache")


def _octavo(inputs: Inputs) -> Callable[[], torch.Tensor]:
    arguments = [inputs[name] for name in ("query", "key_cache", "value_cache", *TABLES)]
    options: dict[str, Any] = {"max_seqlen_q": inputs["max_seqlen_q"], "window_size": inputs["window"]}
    options |= {name: inputs[name] for name in SCALES if name in inputs}
    return lambda: octavo.paged_attention(*arguments, **options)


def _planned(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """One layer of many: the plan of the step is there."""
    query, key_cache, value_cache, *tables = [inputs[name] for name in ("query", "key_cache", "value_cache", *TABLES)]
    options: dict[str, Any] = {"max_seqlen_q": inputs["max_seqlen_q"], "window_size": inputs["window"]}
    options["plan"] = octavo.plan_attention(query, key_cache, *tables, **options)
    options |= {name: inputs[name] for name in SCALES if name in inputs}
    return lambda: octavo.paged_attention(query, key_cache, value_cache, *tables, **options)


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch (dense K/V)": Provider(peers.torch_dense, devices=("cpu", "cuda"), package="torch"),
    "torch cuDNN (dense K/V)": Provider(peers.cudnn_dense, package="torch"),
    "octavo, planned": Provider(_planned, package="octavo"),
    "flashinfer": Provider(flashinfer_peers.fa2, "flashinfer", package="flashinfer-python"),
    "flashinfer fa3": Provider(flashinfer_peers.fa3, "flashinfer", package="flashinfer-python"),
    "flashinfer, two calls": Provider(flashinfer_peers.two_calls_fa2, "flashinfer", package="flashinfer-python"),
    "flashinfer fa3, two calls": Provider(flashinfer_peers.two_calls_fa3, "flashinfer", package="flashinfer-python"),
    "vllm fa3": Provider(peers.vllm_fa3, "vllm", package="vllm"),
    "vllm fa3, two calls": Provider(peers.vllm_fa3_two_calls, "vllm", package="vllm"),
    "vllm triton": Provider(peers.vllm_triton, "vllm", package="vllm"),
    "conch": Provider(peers.conch, "triton-peers", package="conch-triton-kernels"),
}
