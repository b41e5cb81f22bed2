"""Writing new keys and values into a paged cache: bound by memory, nothing is computed.

Slots are distinct and scattered over the whole cache, one contiguous row of heads each.
"""

from collections.abc import Callable
from typing import Any

import torch

import octavo
from octavo.bench.harness import Inputs, Provider, Shape
from octavo.bench.providers import compiled, drawn
from octavo.bench.shapes import TOKENS, kv_layouts

OP = "write_kv"
DTYPES = (torch.bfloat16,)
PAGE_SIZE = 16
MIN_PAGES = 256

Pair = tuple[torch.Tensor, torch.Tensor]


def shapes() -> list[Shape]:
    return [{"T": tokens} | layout | {"page": PAGE_SIZE} for layout in kv_layouts() for tokens in TOKENS]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    tokens, heads, size, page_size = shape["T"], shape["kv_heads"], shape["D"], shape["page"]
    pages = max(MIN_PAGES, -(-2 * tokens // page_size))
    fresh = drawn(dtype, device, generator)
    return {
        "key": torch.randn(tokens, heads, size, **fresh),
        "value": torch.randn(tokens, heads, size, **fresh),
        "key_cache": torch.randn(pages, page_size, heads, size, **fresh),
        "value_cache": torch.randn(pages, page_size, heads, size, **fresh),
        "slots": torch.randperm(pages * page_size, generator=generator, device=device)[:tokens].contiguous(),
    }


def exact(inputs: Inputs) -> Pair:
    """Both caches whole, in their own dtype: values are copied, and no other slot may change."""
    caches = inputs["key_cache"].clone(), inputs["value_cache"].clone()
    _plain(inputs["key"], inputs["value"], *caches, inputs["slots"])
    return caches


def flops(shape: Shape) -> int:
    """Nothing is computed."""
    return 0


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    """Key and value read and written, and an int64 slot a token."""
    return shape["T"] * (4 * shape["kv_heads"] * shape["D"] * dtype.itemsize + 8)


def _plain(
    key: torch.Tensor, value: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    _put(key, value, _rows(key_cache), _rows(value_cache), slots)


def _rows(cache: torch.Tensor) -> torch.Tensor:
    """A view of a cache with one row of heads a slot."""
    return cache.view(-1, *cache.shape[2:])


def _put(
    key: torch.Tensor, value: torch.Tensor, key_rows: torch.Tensor, value_rows: torch.Tensor, slots: torch.Tensor
) -> None:
    key_rows[slots] = key
    value_rows[slots] = value


def _in_place(inputs: Inputs, function: Callable[..., object], *rest: object) -> Callable[[], Pair]:
    """A call of `function(key, value, key_cache, value_cache, slots, *rest)`."""
    key, value, *caches = (inputs[name] for name in ("key", "value", "key_cache", "value_cache"))
    slots = inputs["slots"]

    def call() -> Pair:
        function(key, value, *caches, slots, *rest)
        return caches[0], caches[1]

    return call


def _compiled(inputs: Inputs) -> Callable[[], Pair]:
    """One kernel that writes both caches.

    They go in as rows: torch 2.11's compiler copies a whole cache where it sees a write through a view of an argument.
    """
    key, value, *caches = (inputs[name] for name in ("key", "value", "key_cache", "value_cache"))
    write = compiled(_put, key, value, *map(_rows, caches), inputs["slots"])

    def call() -> Pair:
        write()
        return caches[0], caches[1]

    return call


def _vllm(inputs: Inputs) -> Callable[[], Pair]:
    import vllm._custom_ops as ops

    one = torch.ones(1, dtype=torch.float32, device=inputs["key"].device)
    return _in_place(inputs, ops.reshape_and_cache_flash, "auto", one, one)


def _flashinfer(inputs: Inputs) -> Callable[[], Pair]:
    """One sequence that owns every page in order: a token's position is then its slot."""
    from flashinfer import append_paged_kv_cache

    key, value = inputs["key"], inputs["value"]
    caches = inputs["key_cache"], inputs["value_cache"]
    pages, page_size = caches[0].shape[:2]
    ints: dict[str, Any] = {"dtype": torch.int32, "device": key.device}
    sequence, positions = torch.zeros(key.shape[0], **ints), inputs["slots"].to(torch.int32)
    indices, starts = torch.arange(pages, **ints), torch.tensor([0, pages], **ints)
    last_page = torch.tensor([page_size], **ints)

    def call() -> Pair:
        append_paged_kv_cache(key, value, sequence, positions, caches, indices, starts, last_page)
        return caches

    return call


def _conch(inputs: Inputs) -> Callable[[], Pair]:
    from conch.ops.vllm.reshape_and_cache import reshape_and_cache

    return _in_place(inputs, reshape_and_cache)


PROVIDERS = {
    "octavo": Provider(lambda i: _in_place(i, octavo.write_kv), devices=("cpu", "cuda"), package="octavo"),
    "torch": Provider(lambda i: _in_place(i, _plain), devices=("cpu", "cuda"), package="torch"),
    "torch.compile": Provider(_compiled, package="torch"),
    "flashinfer": Provider(_flashinfer, "flashinfer", package="flashinfer-python"),
    "vllm": Provider(_vllm, "vllm", package="vllm"),
    "conch": Provider(_conch, "triton-peers", package="conch-triton-kernels"),
}
