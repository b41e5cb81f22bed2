"""Tokens sorted by expert: bound by memory, each row read once and written for each of its experts."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

import octavo
from octavo.bench import experts
from octavo.bench.harness import Inputs, Provider, Shape
from octavo.bench.providers import compiled, drawn
from octavo.bench.shapes import TOKENS

OP = "moe_permute"
DTYPES = (torch.bfloat16,)


def shapes() -> list[Shape]:
    return experts.rows_of(experts.LAYERS, TOKENS)


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    count = shape["E"]
    routing = experts.draw_routing(shape, count, dtype, device, generator)
    x = torch.randn(shape["T"], shape["hidden"], **drawn(dtype, device, generator))
    return {"x": x, "topk_ids": routing["topk_ids"], "E": count}


def _sorted(x: torch.Tensor, ids: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    order, ends = experts.by_expert(ids, count)
    positions = torch.empty_like(ids).flatten()
    positions[order] = torch.arange(len(order), dtype=ids.dtype, device=ids.device)
    return x[order // ids.shape[1]], F.pad(ends, (1, 0)), positions.view(ids.shape)


def exact(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, offsets and positions, all to the bit."""
    return _sorted(inputs["x"], inputs["topk_ids"], inputs["E"])


def observe(
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor], inputs: Inputs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """vLLM's offsets are int64."""
    rows, offsets, positions = result
    return rows, offsets.int(), positions


def flops(shape: Shape) -> int:
    """None to speak of: a comparison a pair."""
    return shape["T"] * shape["top_k"]


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    """Tokens in, rows out; ids in, positions and offsets out."""
    tokens, top_k = shape["T"], shape["top_k"]
    return tokens * (1 + top_k) * shape["hidden"] * dtype.itemsize + 4 * (2 * tokens * top_k + shape["E"] + 1)


def _octavo(inputs: Inputs) -> Callable[[], tuple[torch.Tensor, ...]]:
    x, ids, count = inputs["x"], inputs["topk_ids"], inputs["E"]
    return lambda: octavo.moe_permute(x, ids, count)


def _torch(inputs: Inputs) -> Callable[[], tuple[torch.Tensor, ...]]:
    x, ids, count = inputs["x"], inputs["topk_ids"], inputs["E"]
    return lambda: _sorted(x, ids, count)


def _vllm(inputs: Inputs) -> Callable[[], tuple[torch.Tensor, ...]]:
    from vllm.model_executor.layers.fused_moe.moe_permute_unpermute import moe_permute

    x, ids, count = inputs["x"], inputs["topk_ids"], inputs["E"]
    rows = x.new_empty(ids.numel(), x.shape[1])

    def call() -> tuple[torch.Tensor, ...]:
        permuted, _, offsets, positions, _ = moe_permute(x, None, ids, count, permuted_hidden_states=rows)
        return permuted, offsets, positions.view(ids.shape)

    return call


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch": Provider(_torch, devices=("cpu", "cuda"), package="torch"),
    "torch.compile": Provider(lambda i: compiled(_sorted, i["x"], i["topk_ids"], i["E"]), package="torch"),
    "vllm": Provider(_vllm, "vllm", package="vllm"),
}
