"""Layer norm with a bias: bound by memory, x read once and the output written once.

Of the models in `shapes` Falcon has it; it is measured at every hidden size, to stand beside RMSNorm.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

import octavo
from octavo.bench.bench_rms_norm import EPS
from octavo.bench.harness import Inputs, Provider, Shape
from octavo.bench.providers import by_rows, compiled, drawn
from octavo.bench.shapes import TOKENS, hidden_sizes

OP = "layer_norm"
DTYPES = (torch.bfloat16,)


def shapes() -> list[Shape]:
    return [{"T": tokens, "hidden": hidden} for hidden in hidden_sizes() for tokens in TOKENS]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    fresh = drawn(dtype, device, generator)
    return {
        "x": torch.randn(shape["T"], shape["hidden"], **fresh),
        "weight": torch.rand(shape["hidden"], **fresh) + 0.5,
        "bias": torch.randn(shape["hidden"], **fresh),
    }


def exact(inputs: Inputs) -> torch.Tensor:
    weight, bias = inputs["weight"].double(), inputs["bias"].double()

    def normalized(x: torch.Tensor) -> torch.Tensor:
        deviation = x - x.mean(-1, keepdim=True)
        return deviation / (deviation.square().mean(-1, keepdim=True) + EPS).sqrt() * weight + bias

    return by_rows(normalized, inputs["x"])


def flops(shape: Shape) -> int:
    """Two sums, a deviation, its square, two products and the bias an element."""
    return 7 * shape["T"] * shape["hidden"]


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    return 2 * (shape["T"] + 1) * shape["hidden"] * dtype.itemsize


def _plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def _octavo(inputs: Inputs) -> Callable[[], torch.Tensor]:
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    return lambda: octavo.layer_norm(x, weight, bias, EPS)


def _torch(inputs: Inputs) -> Callable[[], torch.Tensor]:
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    return lambda: _plain(x, weight, bias)


def _compiled(inputs: Inputs) -> Callable[[], torch.Tensor]:
    return compiled(_plain, inputs["x"], inputs["weight"], inputs["bias"])


def _flashinfer(inputs: Inputs) -> Callable[[], torch.Tensor]:
    from flashinfer.norm import layernorm

    # It takes weight and bias in fp32 alone.
    x, weight, bias = inputs["x"], inputs["weight"].float(), inputs["bias"].float()
    return lambda: layernorm(x, weight, bias, EPS)


def _liger(inputs: Inputs) -> Callable[[], torch.Tensor]:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    return lambda: LigerLayerNormFunction.apply(x, weight, bias, EPS)


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch": Provider(_torch, devices=("cpu", "cuda"), package="torch"),
    "torch.compile": Provider(_compiled, package="torch"),
    "flashinfer": Provider(_flashinfer, "flashinfer", package="flashinfer-python", note="fp32 weight and bias"),
    "liger": Provider(_liger, "triton-peers", package="liger-kernel"),
}
