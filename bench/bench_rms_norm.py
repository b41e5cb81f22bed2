"""RMSNorm: bound by memory, x read once and the output written once."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

import octavo
from octavo.bench.harness import Inputs, Provider, Shape
from octavo.bench.providers import by_rows, compiled, drawn
from octavo.bench.shapes import TOKENS, hidden_sizes

OP = "rms_norm"
DTYPES = (torch.bfloat16,)
EPS = 1e-5


def shapes() -> list[Shape]:
    return [{"T": tokens, "hidden": hidden} for hidden in hidden_sizes() for tokens in TOKENS]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    fresh = drawn(dtype, device, generator)
    return {
        "x": torch.randn(shape["T"], shape["hidden"], **fresh),
        "weight": torch.rand(shape["hidden"], **fresh) + 0.5,
    }


def exact(inputs: Inputs) -> torch.Tensor:
    weight = inputs["weight"].double()
    return by_rows(lambda x: x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight, inputs["x"])


def flops(shape: Shape) -> int:
    """Square, sum, two products an element."""
    return 4 * shape["T"] * shape["hidden"]


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    return (2 * shape["T"] + 1) * shape["hidden"] * dtype.itemsize


def _plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight.float()).to(x.dtype)


def _octavo(inputs: Inputs) -> Callable[[], torch.Tensor]:
    x, weight = inputs["x"], inputs["weight"]
    return lambda: octavo.rms_norm(x, weight, EPS)


def _torch(inputs: Inputs) -> Callable[[], torch.Tensor]:
    x, weight = inputs["x"], inputs["weight"]
    return lambda: F.rms_norm(x, weight.shape, weight, EPS)


def _flashinfer(inputs: Inputs) -> Callable[[], torch.Tensor]:
    from flashinfer import rmsnorm

    x, weight, out = inputs["x"], inputs["weight"], torch.empty_like(inputs["x"])
    return lambda: rmsnorm(x, weight, EPS, out=out)


def _vllm(inputs: Inputs) -> Callable[[], torch.Tensor]:
    import vllm._custom_ops as ops

    x, weight, out = inputs["x"], inputs["weight"], torch.empty_like(inputs["x"])

    def call() -> torch.Tensor:
        ops.rms_norm(out, x, weight, EPS)
        return out

    return call


def _liger(inputs: Inputs) -> Callable[[], torch.Tensor]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    x, weight = inputs["x"], inputs["weight"]
    return lambda: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)


def _conch(inputs: Inputs) -> Callable[[], torch.Tensor]:
    from conch.ops.normalization.rms_norm import rms_norm

    x, weight = inputs["x"], inputs["weight"]
    return lambda: rms_norm(x, weight, EPS)


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch": Provider(_torch, devices=("cpu", "cuda"), package="torch"),
    "torch.compile": Provider(lambda i: compiled(_plain, i["x"], i["weight"]), package="torch"),
    "flashinfer": Provider(_flashinfer, "flashinfer", package="flashinfer-python"),
    "vllm": Provider(_vllm, "vllm", package="vllm"),
    "liger": Provider(_liger, "triton-peers", package="liger-kernel"),
    "conch": Provider(_conch, "triton-peers", package="conch-triton-kernels"),
}
