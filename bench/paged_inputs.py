"""What attention over a paged cache is measured on: the inputs of a shape, the exact result, and the least work.

A shape is `B` sequences of `q` new tokens with a context of `ctx` keys, their own among them; the first has `long` keys
where the shape says so. With `chunks` it is a mixed batch: behind these come so many sequences of `chunk_q` new tokens
with `chunk_ctx` keys. Pages are scattered over the whole cache. With `fp8` the cache is float8_e4m3fn with one scale,
with `int8` it has a scale for each token and head.
"""

from typing import Any

import torch

from octavo.bench.harness import Inputs, Shape, Unsupported
from octavo.bench.providers import drawn, full_fp32, wide_dtype

# Scores held at once by the exact computation: 512 MB in fp32.
SCORES = 2**27


def sequences(shape: Shape) -> list[tuple[int, int]]:
    """Each sequence's new tokens and its context with them."""
    alike = [(shape["q"], shape["ctx"])] * (shape["B"] - 1)
    chunks = [(shape["chunk_q"], shape["chunk_ctx"])] * shape["chunks"] if "chunks" in shape else []
    return [(shape["q"], shape.get("long", shape["ctx"])), *alike, *chunks]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    new, lengths = zip(*sequences(shape), strict=True)
    page_size = shape["page"]
    counts = [-(-length // page_size) for length in lengths]
    fresh = drawn(dtype, device, generator)
    ids = torch.randperm(sum(counts), generator=generator, device=device).to(torch.int32)
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32, device=device)
    for row, own in zip(table, ids.split(counts), strict=True):
        row[: len(own)] = own
    ints: dict[str, Any] = {"device": device, "dtype": torch.int32}
    return {
        "query": torch.randn(sum(new), shape["heads"], shape["D"], **fresh),
        **_caches((sum(counts), page_size, shape["kv_heads"], shape["D"]), shape, fresh),
        "block_table": table,
        "seq_lens": torch.tensor(lengths, **ints),
        "cu_seqlens_q": torch.tensor([0, *new], **ints).cumsum(0, dtype=torch.int32),
        "max_seqlen_q": max(new),
        "max_seqlen_k": max(lengths),
        "window": shape["window"] or None,
        "chunks": shape.get("chunks", 0),
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


def apart(inputs: Inputs) -> tuple[Inputs, Inputs]:
    """A mixed batch as two over the same cache, for peers that are called for each: the decode tokens, and the chunks.

    Raises:
        Unsupported: it is not mixed.
    """
    if not inputs.get("chunks"):
        raise Unsupported("mixed batches only")
    total = inputs["seq_lens"].numel()
    decodes = total - inputs["chunks"]
    return _part(inputs, 0, decodes), _part(inputs, decodes, total)


def _part(inputs: Inputs, begin: int, end: int) -> Inputs:
    """The sequences from `begin` to `end` alone."""
    starts, lengths = inputs["cu_seqlens_q"][begin : end + 1], inputs["seq_lens"][begin:end].clone()
    first, last = int(starts[0]), int(starts[-1])
    part = {
        "query": inputs["query"][first:last],
        "block_table": inputs["block_table"][begin:end],
        "seq_lens": lengths,
        "cu_seqlens_q": starts - first,
        "max_seqlen_q": int(starts.diff().max()),
        "max_seqlen_k": int(lengths.max()),
        "chunks": 0,
    }
    return {**inputs, **part}


def exact(inputs: Inputs) -> torch.Tensor:
    """Softmax of all visible scores; in fp64 on a CPU, in fp32 on a GPU; a sequence and some queries at a time."""
    query, starts = inputs["query"], inputs["cu_seqlens_q"].tolist()
    wide, rows = wide_dtype(query.device), max(1, SCORES // (query.shape[1] * inputs["max_seqlen_k"]))
    out = torch.empty(query.shape, dtype=wide, device=query.device)
    page_size = inputs["key_cache"].shape[1]
    with full_fp32():
        for sequence, context in enumerate(inputs["seq_lens"].tolist()):
            pages = inputs["block_table"][sequence, : -(-context // page_size)].long()
            key, value = (_wide(inputs, name, pages, wide)[:context].transpose(0, 1) for name in ("key", "value"))
            begin, end = starts[sequence : sequence + 2]
            for start in range(begin, end, rows):
                part = slice(start, min(start + rows, end))
                out[part] = _attend(query[part].to(wide), key, value, context - end + start, inputs["window"])
    return out


def _wide(inputs: Inputs, name: str, pages: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """Keys or values of some pages as they are read back, `[slots, kv_heads, D]`."""
    values = inputs[f"{name}_cache"][pages].flatten(0, 1).to(wide)
    if f"{name}_scale_cache" in inputs:
        return values * inputs[f"{name}_scale_cache"][pages].flatten(0, 1).to(wide)[..., None]
    return values * inputs[f"{name[0]}_scale"].to(wide) if f"{name[0]}_scale" in inputs else values


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
    return sum(min(p + 1, window or p + 1) for new, context in sequences(shape) for p in range(context - new, context))


def flops(shape: Shape) -> int:
    """Two products of D a visible pair and head; the softmax is not counted."""
    return 4 * shape["heads"] * shape["D"] * visible_pairs(shape)


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    """Query read, output written, each key and value that any query sees read once, and the tables."""
    window, both = shape["window"], sequences(shape)
    keys = [min(context, window + new - 1) if window else context for new, context in both]
    of_head = shape["D"] * dtype.itemsize
    if shape.get("fp8") or shape.get("int8"):
        of_head = shape["D"] + 4 * shape.get("int8", 0)
    tables = sum(-(-n // shape["page"]) for n in keys) + 2 * len(both) + 1
    return (
        2 * sum(new for new, _ in both) * shape["heads"] * shape["D"] * dtype.itemsize
        + 2 * sum(keys) * shape["kv_heads"] * of_head
        + 4 * tables
    )
