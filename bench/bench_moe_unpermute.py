"""What experts made of tokens, added up by weight: bound by memory, each row read once, a token's sum written."""

from collections.abc import Callable

import torch

import octavo
from octavo.bench import experts
from octavo.bench.harness import Inputs, Provider, Shape
from octavo.bench.providers import compiled, drawn
from octavo.bench.shapes import TOKENS

OP = "moe_unpermute"
DTYPES = (torch.bfloat16,)


def shapes() -> list[Shape]:
    return experts.rows_of(experts.LAYERS, TOKENS)


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    count, pairs = shape["E"], shape["T"] * shape["top_k"]
    routing = experts.draw_routing(shape, count, dtype, device, generator)
    order, _ = experts.by_expert(routing["topk_ids"], count)
    positions = torch.empty(pairs, dtype=torch.int32, device=device)
    positions[order] = torch.arange(pairs, dtype=torch.int32, device=device)
    y = torch.randn(pairs, shape["hidden"], **drawn(dtype, device, generator))
    return {"y": y, "positions": positions.view(shape["T"], -1), "topk_weights": routing["topk_weights"]}


def exact(inputs: Inputs) -> torch.Tensor:
    y, weights = inputs["y"], inputs["topk_weights"].double()
    out = y.new_zeros(weights.shape[0], y.shape[1], dtype=torch.float64)
    for at, weight in zip(inputs["positions"].unbind(1), weights.unbind(1), strict=True):
        out += y[at].double() * weight[:, None]
    return out


def flops(shape: Shape) -> int:
    return 2 * shape["T"] * shape["top_k"] * shape["hidden"]


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    """Rows in, tokens out; a position and a weight a row."""
    tokens, top_k = shape["T"], shape["top_k"]
    return tokens * (1 + top_k) * shape["hidden"] * dtype.itemsize + 8 * tokens * top_k


def _plain(y: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (y[positions].float() * weights[..., None]).sum(1).to(y.dtype)


def _octavo(inputs: Inputs) -> Callable[[], torch.Tensor]:
    y, positions, weights = inputs["y"], inputs["positions"], inputs["topk_weights"]
    return lambda: octavo.moe_unpermute(y, positions, weights)


def _torch(inputs: Inputs) -> Callable[[], torch.Tensor]:
    y, positions, weights = inputs["y"], inputs["positions"], inputs["topk_weights"]
    return lambda: _plain(y, positions, weights)


def _compiled(inputs: Inputs) -> Callable[[], torch.Tensor]:
    y, positions, weights = inputs["y"], inputs["positions"], inputs["topk_weights"]
    return compiled(lambda p, y, w: _plain(y, p, w), positions, y, weights)  # counts the rows of the first


def _vllm(inputs: Inputs) -> Callable[[], torch.Tensor]:
    from vllm.model_executor.layers.fused_moe.moe_permute_unpermute import moe_unpermute

    y, positions, weights = inputs["y"], inputs["positions"], inputs["topk_weights"]
    out = y.new_empty(weights.shape[0], y.shape[1])

    def call() -> torch.Tensor:
        moe_unpermute(out, y, weights, positions)
        return out

    return call


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch": Provider(_torch, devices=("cpu", "cuda"), package="torch"),
    "torch.compile": Provider(_compiled, package="torch"),
    "vllm": Provider(_vllm, "vllm", package="vllm"),
}
