"""SwiGLU's activation: bound by memory, the gate and what it multiplies read once, half as much written."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

import octavo
from octavo.bench.harness import Inputs, Provider, Shape
from octavo.bench.providers import by_rows, compiled, gated_input, gated_out
from octavo.bench.shapes import TOKENS, gated_sizes

OP = "silu_and_mul"
DTYPES = (torch.bfloat16,)


def shapes() -> list[Shape]:
    return [{"T": tokens, "intermediate": width} for width in gated_sizes() for tokens in TOKENS]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    return {"x": gated_input(shape, dtype, device, generator)}


def exact(inputs: Inputs) -> torch.Tensor:
    return by_rows(_plain, inputs["x"])


def flops(shape: Shape) -> int:
    """Exponential, sum, quotient, two products an output."""
    return 5 * shape["T"] * shape["intermediate"]


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    return 3 * shape["T"] * shape["intermediate"] * dtype.itemsize


def _plain(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


def _eager(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def _octavo(inputs: Inputs) -> Callable[[], torch.Tensor]:
    x = inputs["x"]
    return lambda: octavo.silu_and_mul(x)


def _torch(inputs: Inputs) -> Callable[[], torch.Tensor]:
    x = inputs["x"]
    return lambda: _eager(x)


def _flashinfer(inputs: Inputs) -> Callable[[], torch.Tensor]:
    from flashinfer import silu_and_mul

    x, out = inputs["x"], gated_out(inputs["x"])
    return lambda: silu_and_mul(x, out=out)


def _vllm(inputs: Inputs) -> Callable[[], torch.Tensor]:
    import vllm._custom_ops  # noqa: F401  (loads what torch.ops._C holds)

    x, out = inputs["x"], gated_out(inputs["x"])

    def call() -> torch.Tensor:
        torch.ops._C.silu_and_mul(out, x)
        return out

    return call


def _liger(inputs: Inputs) -> Callable[[], torch.Tensor]:
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    x = inputs["x"]
    return lambda: LigerFusedGateUpSiLUMulFunction.apply(x)


def _conch(inputs: Inputs) -> Callable[[], torch.Tensor]:
    from conch.ops.activation.silu_and_mul import silu_and_mul

    x = inputs["x"]
    return lambda: silu_and_mul(x)


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch": Provider(_torch, devices=("cpu", "cuda"), package="torch"),
    "torch.compile": Provider(lambda i: compiled(_eager, i["x"]), package="torch"),
    "flashinfer": Provider(_flashinfer, "flashinfer", package="flashinfer-python"),
    "vllm": Provider(_vllm, "vllm", package="vllm"),
    "liger": Provider(_liger, "triton-peers", package="liger-kernel"),
    "conch": Provider(_conch, "triton-peers", package="conch-triton-kernels"),
}
