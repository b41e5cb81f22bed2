"""Rotary position embedding of query and key in place: bound by memory, heads read and written once.

The table's values are those that the inputs' dtype holds, kept in fp32: vLLM wants the table in the model's dtype and
FlashInfer in fp32, and so all compute with the same numbers. The call repeats on the same buffers; rounded cosines and
sines change a vector's length by at most one part in 500 a call, so values stay finite over tens of thousands of them.
"""

from collections.abc import Callable

import torch

import octavo
from octavo.bench.harness import Inputs, Provider, Shape
from octavo.bench.providers import compiled, drawn
from octavo.bench.shapes import TOKENS, head_layouts

OP = "rotary_embedding"
DTYPES = (torch.bfloat16,)
MAX_POSITION = 8192
THETA = 500000.0

Pair = tuple[torch.Tensor, torch.Tensor]


def shapes() -> list[Shape]:
    return [{"T": tokens} | layout for layout in head_layouts() for tokens in TOKENS]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    """Positions are drawn without repetition: each token reads its own row of the table."""
    tokens, size = shape["T"], shape["D"]
    rows = max(MAX_POSITION, tokens)
    # octavo.rotary_cos_sin_cache would do; the inputs owe nothing to what is measured.
    frequencies = THETA ** (-torch.arange(0, size, 2, dtype=torch.float64, device=device) / size)
    angles = torch.arange(rows, dtype=torch.float64, device=device)[:, None] * frequencies
    fresh = drawn(dtype, device, generator)
    return {
        "query": torch.randn(tokens, shape["heads"], size, **fresh),
        "key": torch.randn(tokens, shape["kv_heads"], size, **fresh),
        "positions": torch.randperm(rows, generator=generator, device=device)[:tokens].contiguous(),
        "cos_sin_cache": torch.cat((angles.cos(), angles.sin()), 1).to(dtype).float(),
    }


def exact(inputs: Inputs) -> Pair:
    query, key = inputs["query"].double(), inputs["key"].double()
    return _plain(query, key, inputs["positions"], inputs["cos_sin_cache"].double())


def flops(shape: Shape) -> int:
    """Four products and two sums a pair of elements."""
    return 3 * shape["T"] * (shape["heads"] + shape["kv_heads"]) * shape["D"]


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    """Heads read and written, a position and an fp32 row of the table a token."""
    heads = 2 * (shape["heads"] + shape["kv_heads"]) * shape["D"] * dtype.itemsize
    return shape["T"] * (heads + 8 + 4 * shape["D"])


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _plain(query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor) -> Pair:
    """Not in place: as a torch model has it, with cosines and sines in the model's dtype."""
    cos, sin = cos_sin_cache[positions][:, None].to(query.dtype).chunk(2, -1)
    return _turned(query, cos, sin), _turned(key, cos, sin)


def _arguments(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return inputs["query"], inputs["key"], inputs["positions"], inputs["cos_sin_cache"]


def _octavo(inputs: Inputs) -> Callable[[], Pair]:
    query, key, positions, table = _arguments(inputs)

    def call() -> Pair:
        octavo.rotary_embedding(query, key, positions, table)
        return query, key

    return call


def _torch(inputs: Inputs) -> Callable[[], Pair]:
    arguments = _arguments(inputs)
    return lambda: _plain(*arguments)


def _of_rows(function: Callable[..., object], inputs: Inputs, table: torch.Tensor) -> Callable[[], Pair]:
    """A peer with vLLM's signature, for which a token's heads are one row."""
    query, key, positions, _ = _arguments(inputs)
    rows, size = [x.view(x.shape[0], -1) for x in (query, key)], query.shape[-1]

    def call() -> Pair:
        function(positions, *rows, size, table, is_neox=True)
        return query, key

    return call


def _flashinfer(inputs: Inputs) -> Callable[[], Pair]:
    from flashinfer import apply_rope_with_cos_sin_cache_inplace

    return _of_rows(apply_rope_with_cos_sin_cache_inplace, inputs, inputs["cos_sin_cache"])


def _vllm(inputs: Inputs) -> Callable[[], Pair]:
    import vllm._custom_ops as ops

    return _of_rows(ops.rotary_embedding, inputs, inputs["cos_sin_cache"].to(inputs["query"].dtype))


def _liger(inputs: Inputs) -> Callable[[], Pair]:
    """Its cosines and sines are gathered by position once a model pass, for all layers: outside of the timing."""
    from liger_kernel.ops.rope import LigerRopeFunction

    query, key, positions, table = _arguments(inputs)
    cos, sin = (half.contiguous() for half in table[positions].chunk(2, -1))
    heads_first = [x[None].transpose(1, 2) for x in (query, key)]  # its kernel undoes this: no copy

    def call() -> Pair:
        LigerRopeFunction.apply(*heads_first, cos, sin, None, 1, query.shape[-1])
        return query, key

    return call


def _conch(inputs: Inputs) -> Callable[[], Pair]:
    from conch.ops.embedding.rotary_embedding import rotary_embedding

    return _of_rows(rotary_embedding, inputs, inputs["cos_sin_cache"])


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch": Provider(_torch, devices=("cpu", "cuda"), package="torch"),
    "torch.compile": Provider(lambda i: compiled(_plain, *_arguments(i)), package="torch"),
    "flashinfer": Provider(_flashinfer, "flashinfer", package="flashinfer-python"),
    "vllm": Provider(_vllm, "vllm", package="vllm"),
    "liger": Provider(_liger, "triton-peers", package="liger-kernel", note="positions gathered before"),
    "conch": Provider(_conch, "triton-peers", package="conch-triton-kernels"),
}
