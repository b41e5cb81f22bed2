"""Attention over a paged KV cache: decode steps, prefills and chunks of prefills, causal.

A decode step is bound by the bytes of K and V, a prefill by the tensor cores. All sequences of a case have one length,
but for the first, which has `long` keys where a shape says so; their pages are scattered over the whole cache. With
`fp8` the cache is float8_e4m3fn with one scale, with `int8` it has a scale for each token and head.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

import octavo
from octavo.bench import attention_peers as peers
from octavo.bench.harness import Inputs, Provider, Shape
from octavo.bench.providers import drawn, full_fp32, wide_dtype
from octavo.bench.shapes import FALCON_7B, FALCON_40B, LLAMA_2_70B, LLAMA_3_8B, MISTRAL_7B, Model

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
        *_shapes(LLAMA_3_8B, CHUNKS),
        *_shapes(FALCON_7B, SHORT),
        *_shapes(FALCON_40B, SHORT[:2]),
    ]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    sequences, page_size, longest = shape["B"], shape["page"], shape.get("long", shape["ctx"])
    lengths = [longest] + [shape["ctx"]] * (sequences - 1)
    counts = [-(-length // page_size) for length in lengths]
    fresh = drawn(dtype, device, generator)
    ids = torch.randperm(sum(counts), generator=generator, device=device).to(torch.int32)
    table = torch.zeros(sequences, max(counts), dtype=torch.int32, device=device)
    for row, own in zip(table, ids.split(counts), strict=True):
        row[: len(own)] = own
    ints: dict[str, Any] = {"device": device, "dtype": torch.int32}
    return {
        "query": torch.randn(sequences * shape["q"], shape["heads"], shape["D"], **fresh),
        **_caches((sum(counts), page_size, shape["kv_heads"], shape["D"]), shape, fresh),
        "block_table": table,
        "seq_lens": torch.tensor(lengths, **ints),
        "cu_seqlens_q": torch.arange(sequences + 1, **ints) * shape["q"],
        "max_seqlen_q": shape["q"],
        "max_seqlen_k": longest,
        "window": shape["window"] or None,
    }


def _caches(size: tuple[int, int, int, int], shape: Shape, fresh: dict[str, Any]) -> Inputs:
    key, value = (torch.randn(size, **fresh) for _ in range(2))
    if shape.get("fp8"):
        scale = torch.full((1,), 0.03, device=key.device)
        key, value = ((x.float() / scale).to(torch.float8_e4m3fn) for x in (key, value))
        return {"key_cache": key, "value_cache": value, "k_scale": scale, "v_scale": scale.clone()}
    if shape.get("int8"):
        (key, key_scale), (value, value_scale) = (_per_head(x) for x in (key, value))
        scales = {"key_scale_cache": key_scale, "value_scale_cache": value_scale}
        return {"key_cache": key, "value_cache": value} | scales
    return {"key_cache": key, "value_cache": value}


def _per_head(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 with the scale of each token's head, as `write_kv` has it."""
    scale = x.float().abs().amax(-1) / 127
    return (x.float() / scale[..., None]).round().to(torch.int8), scale


def _wide(inputs: Inputs, name: str, pages: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """Keys or values of some pages as they are read back, `[slots, kv_heads, D]`."""
    values = inputs[f"{name}_cache"][pages].flatten(0, 1).to(wide)
    if f"{name}_scale_cache" in inputs:
        return values * inputs[f"{name}_scale_cache"][pages].flatten(0, 1).to(wide)[..., None]
    return values * inputs[f"{name[0]}_scale"].to(wide) if f"{name[0]}_scale" in inputs else values


def exact(inputs: Inputs) -> torch.Tensor:
    """Softmax of all visible scores; in fp64 on a CPU, in fp32 on a GPU; a sequence and some queries at a time."""
    query, new = inputs["query"], inputs["max_seqlen_q"]
    wide, rows = wide_dtype(query.device), max(1, SCORES // (query.shape[1] * inputs["max_seqlen_k"]))
    out = torch.empty(query.shape, dtype=wide, device=query.device)
    page_size = inputs["key_cache"].shape[1]
    with full_fp32():
        for sequence, context in enumerate(inputs["seq_lens"].tolist()):
            pages = inputs["block_table"][sequence, : -(-context // page_size)].long()
            key, value = (_wide(inputs, name, pages, wide)[:context].transpose(0, 1) for name in ("key", "value"))
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
    window = shape["window"]
    contexts = [shape.get("long", shape["ctx"])] + [shape["ctx"]] * (shape["B"] - 1)
    return sum(min(p + 1, window or p + 1) for context in contexts for p in range(context - shape["q"], context))


def flops(shape: Shape) -> int:
    """Two products of D a visible pair and head; the softmax is not counted."""
    return 4 * shape["heads"] * shape["D"] * visible_pairs(shape)


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    """Query read, output written, each key and value that any query sees read once, and the tables."""
    rows, window = shape["B"] * shape["q"], shape["window"]
    contexts = [shape.get("long", shape["ctx"])] + [shape["ctx"]] * (shape["B"] - 1)
    keys = [min(context, window + shape["q"] - 1) if window else context for context in contexts]
    of_head = shape["D"] * dtype.itemsize
    if shape.get("fp8") or shape.get("int8"):
        of_head = shape["D"] + 4 * shape.get("int8", 0)
    tables = sum(-(-n // shape["page"]) for n in keys) + 2 * shape["B"] + 1
    return (
        2 * rows * shape["heads"] * shape["D"] * dtype.itemsize
        + 2 * sum(keys) * shape["kv_heads"] * of_head
        + 4 * tables
    )


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
    "flashinfer": Provider(peers.flashinfer, "flashinfer", package="flashinfer-python"),
    "flashinfer fa3": Provider(peers.flashinfer_fa3, "flashinfer", package="flashinfer-python"),
    "vllm fa3": Provider(peers.vllm_fa3, "vllm", package="vllm"),
    "vllm triton": Provider(peers.vllm_triton, "vllm", package="vllm"),
    "conch": Provider(peers.conch, "triton-peers", package="conch-triton-kernels"),
}
