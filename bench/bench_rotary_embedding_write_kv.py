"""Norm and rotation of a step's heads and the cache write in one launch: bound by memory, everything moved once.

Heads are views of one qkv projection. Table and slots are those of the two ops alone (`bench_rotary_embedding`,
`bench_write_kv`). `norm` 1 has the RMSNorm of query and key heads, `fp8` 1 a float8_e4m3fn cache with a scale a tensor,
which is read back as fp8 numbers. Calls repeat on the same buffers: octavo only reads the key, and what turns a query
or key in place changes its length by at most one part in 500 a call, so values stay finite.

FlashInfer's `rope_quantize_fp8_append_paged_kv_cache` is left out: it rounds the query to fp8 as well.
"""

from collections.abc import Callable
from typing import Any

import torch

import octavo
from octavo.bench import bench_rotary_embedding, bench_write_kv
from octavo.bench.harness import Inputs, Provider, Shape, Unsupported
from octavo.bench.providers import compiled, drawn
from octavo.bench.shapes import LLAMA_3_8B, TOKENS, head_layouts

OP = "rotary_embedding_write_kv"
DTYPES = (torch.bfloat16,)
EPS = 1e-6
FP8 = torch.float8_e4m3fn

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def shapes() -> list[Shape]:
    """All layouts plain; with norms, and with norms and an fp8 cache, Llama-3-8B's, which is Qwen3-8B's as well."""
    own = {"heads": LLAMA_3_8B.heads, "kv_heads": LLAMA_3_8B.kv_heads, "D": LLAMA_3_8B.head_dim}
    options = [(layout, 0, 0) for layout in head_layouts()] + [(own, 0, 1), (own, 1, 0), (own, 1, 1)]
    page = {"page": bench_write_kv.PAGE_SIZE}
    return [
        {"T": tokens} | layout | page | {"norm": norm, "fp8": fp8} for layout, norm, fp8 in options for tokens in TOKENS
    ]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    fresh = drawn(dtype, device, generator)
    rotary = bench_rotary_embedding.inputs(shape, dtype, device, generator)
    cache = bench_write_kv.inputs(shape, dtype, device, generator)
    made = {
        "qkv": torch.randn(shape["T"], shape["heads"] + 2 * shape["kv_heads"], shape["D"], **fresh),
        "kv_heads": shape["kv_heads"],
        "positions": rotary["positions"],
        "cos_sin_cache": rotary["cos_sin_cache"],
        "key_cache": cache["key_cache"],
        "value_cache": cache["value_cache"],
        "slots": cache["slots"],
    }
    if shape["norm"]:
        made |= {name: torch.randn(shape["D"], **fresh) for name in ("q_norm_weight", "k_norm_weight")}
    if shape["fp8"]:
        scale = drawn(torch.float32, device, generator)
        made |= {name: torch.rand(1, **scale) / 64 + 1 / 64 for name in ("k_scale", "v_scale")}
        made |= {name: made[name].to(FP8) for name in ("key_cache", "value_cache")}
    return made


def exact(inputs: Inputs) -> Triple:
    query, key, value = (x.double() for x in _heads(inputs))
    key_cache, value_cache = (cache.double() for cache in _caches(inputs))
    options = {name: x.double() for name, x in _options(inputs).items()}
    rotary, rows = (inputs["positions"], inputs["cos_sin_cache"].double()), (_rows(key_cache), _rows(value_cache))
    turned = _plain(query, key, value, *rotary, *rows, inputs["slots"], **options)
    return turned, key_cache, value_cache


def flops(shape: Shape) -> int:
    """Six operations a pair that is turned, four an element that is normalised, one an element that is quantised."""
    turned = shape["T"] * (shape["heads"] + shape["kv_heads"]) * shape["D"]
    return (3 + 4 * shape["norm"]) * turned + 2 * shape["fp8"] * shape["T"] * shape["kv_heads"] * shape["D"]


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    """Query read and written, key and value read, caches written; position, slot and row of the table; weights once."""
    size, kv = dtype.itemsize, 2 * shape["kv_heads"] * shape["D"]
    token = 2 * shape["heads"] * shape["D"] * size + kv * size + kv * (1 if shape["fp8"] else size)
    once = 2 * shape["norm"] * shape["D"] * size + 8 * shape["fp8"]
    return shape["T"] * (token + 16 + 4 * shape["D"]) + once


def _heads(inputs: Inputs) -> list[torch.Tensor]:
    qkv, kv_heads = inputs["qkv"], inputs["kv_heads"]
    return list(qkv.split([qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1))


def _caches(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    return inputs["key_cache"], inputs["value_cache"]


def _options(inputs: Inputs) -> dict[str, Any]:
    return {n: inputs[n] for n in ("q_norm_weight", "k_norm_weight", "k_scale", "v_scale") if n in inputs}


def _rows(cache: torch.Tensor) -> torch.Tensor:
    return cache.view(-1, *cache.shape[2:])


def _normed(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    if weight is None:
        return x
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight).to(x.dtype)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _scaled(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    if scale is None:
        return x
    most = torch.finfo(FP8).max
    return (x / scale).clamp(-most, most)


def _plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    key_rows: torch.Tensor,
    value_rows: torch.Tensor,
    slots: torch.Tensor,
    q_norm_weight: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """As a torch model has it: writes the caches, which come as rows, and returns the query, not in place."""
    cos, sin = cos_sin_cache[positions][:, None].to(query.dtype).chunk(2, -1)
    key = _scaled(_turned(_normed(key, k_norm_weight), cos, sin), k_scale)
    key_rows[slots] = key.to(key_rows.dtype)
    value_rows[slots] = _scaled(value, v_scale).to(value_rows.dtype)
    return _turned(_normed(query, q_norm_weight), cos, sin)


def _octavo(inputs: Inputs) -> Callable[[], Triple]:
    query, key, value = _heads(inputs)
    positions, table, caches, slots = inputs["positions"], inputs["cos_sin_cache"], _caches(inputs), inputs["slots"]
    options = _options(inputs)

    def call() -> Triple:
        octavo.rotary_embedding_write_kv(query, key, value, positions, table, *caches, slots, eps=EPS, **options)
        return query, *caches

    return call


def _separate(inputs: Inputs) -> Callable[[], Triple]:
    """Octavo's ops one by one, three or five launches."""
    query, key, value = _heads(inputs)
    positions, table, caches, slots = inputs["positions"], inputs["cos_sin_cache"], _caches(inputs), inputs["slots"]
    weights = inputs.get("q_norm_weight"), inputs.get("k_norm_weight")
    scales = {name: inputs[name] for name in ("k_scale", "v_scale") if name in inputs}

    def call() -> Triple:
        q, k = (x if w is None else octavo.rms_norm(x, w, EPS) for x, w in zip((query, key), weights, strict=True))
        octavo.rotary_embedding(q, k, positions, table)
        octavo.write_kv(k, value, *caches, slots, **scales)
        return q, *caches

    return call


def _on_rows(inputs: Inputs) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, torch.Tensor]]:
    """The arguments of `_plain`, and the caches whose rows are among them."""
    caches = _caches(inputs)
    absent = [inputs.get(n) for n in ("q_norm_weight", "k_norm_weight", "k_scale", "v_scale")]
    rotary = inputs["positions"], inputs["cos_sin_cache"]
    return (*_heads(inputs), *rotary, *map(_rows, caches), inputs["slots"], *absent), caches


def _torch(inputs: Inputs) -> Callable[[], Triple]:
    arguments, caches = _on_rows(inputs)
    return lambda: (_plain(*arguments), *caches)


def _compiled(inputs: Inputs) -> Callable[[], Triple]:
    arguments, caches = _on_rows(inputs)
    call = compiled(_plain, *arguments)
    return lambda: (call(), *caches)


def _flashinfer(inputs: Inputs) -> Callable[[], Triple]:
    """Norms, if any, rotation and append one by one; one sequence owns every page in order, as in `bench_write_kv`."""
    from flashinfer import append_paged_kv_cache, apply_rope_with_cos_sin_cache_inplace, rmsnorm

    if "k_scale" in inputs:
        raise Unsupported("append_paged_kv_cache does not quantise")
    query, key, value = _heads(inputs)
    caches, size = _caches(inputs), query.shape[-1]
    pages, page_size = caches[0].shape[:2]
    ints: dict[str, Any] = {"dtype": torch.int32, "device": key.device}
    sequence, slots = torch.zeros(key.shape[0], **ints), inputs["slots"].to(torch.int32)
    indices, starts = torch.arange(pages, **ints), torch.tensor([0, pages], **ints)
    last_page = torch.tensor([page_size], **ints)
    rows = [x.flatten(1) for x in (query, key)]
    rotary = inputs["positions"], *rows, size, inputs["cos_sin_cache"]

    def call() -> Triple:
        if "q_norm_weight" in inputs:
            rmsnorm(query, inputs["q_norm_weight"], EPS, out=query)
            rmsnorm(key, inputs["k_norm_weight"], EPS, out=key)
        apply_rope_with_cos_sin_cache_inplace(*rotary, is_neox=True)
        append_paged_kv_cache(key, value, sequence, slots, caches, indices, starts, last_page)
        return query, *caches

    return call


def _vllm(inputs: Inputs) -> Callable[[], Triple]:
    """Rotation (with norms: norm and rotation in one kernel), then the cache write."""
    import vllm._custom_ops as ops

    query, key, value = _heads(inputs)
    qkv, positions, caches, size = inputs["qkv"], inputs["positions"], _caches(inputs), query.shape[-1]
    table, rows = inputs["cos_sin_cache"].to(query.dtype), [x.flatten(1) for x in (query, key)]
    heads = query.shape[1], key.shape[1], key.shape[1]
    norm = size, EPS, inputs.get("q_norm_weight"), inputs.get("k_norm_weight"), table, True, positions
    one = torch.ones(1, dtype=torch.float32, device=qkv.device)
    scales = inputs.get("k_scale", one), inputs.get("v_scale", one)
    fp8 = "k_scale" in inputs
    stored = [cache.view(torch.uint8) if fp8 else cache for cache in caches]
    write = key, value, *stored, inputs["slots"], "fp8" if fp8 else "auto", *scales

    def call() -> Triple:
        if "q_norm_weight" in inputs:
            ops.fused_qk_norm_rope(qkv.flatten(1), *heads, *norm)
        else:
            ops.rotary_embedding(positions, *rows, size, table, True)
        ops.reshape_and_cache_flash(*write)
        return query, *caches

    return call


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch": Provider(_torch, devices=("cpu", "cuda"), package="torch"),
    "torch.compile": Provider(_compiled, package="torch"),
    "octavo, separate": Provider(_separate, devices=("cpu", "cuda"), package="octavo"),
    "flashinfer": Provider(_flashinfer, "flashinfer", package="flashinfer-python"),
    "vllm": Provider(_vllm, "vllm", package="vllm"),
}
