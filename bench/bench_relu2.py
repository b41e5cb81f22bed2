"""The squared rectifier: bound by memory, one read and one write an element. At the width of every model's MLP."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

import octavo
from octavo.bench.harness import Inputs, Provider, Shape
from octavo.bench.providers import by_rows, compiled, drawn
from octavo.bench.shapes import TOKENS, intermediate_sizes

OP = "relu2"
DTYPES = (torch.bfloat16,)


def shapes() -> list[Shape]:
    return [{"T": tokens, "intermediate": width} for width in intermediate_sizes() for tokens in TOKENS]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    return {"x": torch.randn(shape["T"], shape["intermediate"], **drawn(dtype, device, generator))}


def exact(inputs: Inputs) -> torch.Tensor:
    return by_rows(lambda x: torch.where(x > 0, x * x, 0.0), inputs["x"])


def flops(shape: Shape) -> int:
    """A maximum and a product an element."""
    return 2 * shape["T"] * shape["intermediate"]


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    return 2 * shape["T"] * shape["intermediate"] * dtype.itemsize


def _plain(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


def _octavo(inputs: Inputs) -> Callable[[], torch.Tensor]:
    x = inputs["x"]
    return lambda: octavo.relu2(x)


def _torch(inputs: Inputs) -> Callable[[], torch.Tensor]:
    x = inputs["x"]
    return lambda: _plain(x)


def _vllm(inputs: Inputs) -> Callable[[], torch.Tensor]:
    import vllm._custom_ops  # noqa: F401  (loads what torch.ops._C holds)

    x, out = inputs["x"], torch.empty_like(inputs["x"])

    def call() -> torch.Tensor:
        torch.ops._C.relu_squared(out, x)
        return out

    return call


def _liger(inputs: Inputs) -> Callable[[], torch.Tensor]:
    from liger_kernel.ops.relu_squared import LigerReLUSquaredFunction

    x = inputs["x"]
    return lambda: LigerReLUSquaredFunction.apply(x)


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch": Provider(_torch, devices=("cpu", "cuda"), package="torch"),
    "torch.compile": Provider(lambda i: compiled(_plain, i["x"]), package="torch"),
    "vllm": Provider(_vllm, "vllm", package="vllm"),
    "liger": Provider(_liger, "triton-peers", package="liger-kernel"),
}
