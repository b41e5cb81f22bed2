"""RMSNorm of the residual sum, the sum written back: bound by memory.

The call repeats on the same buffers. The residual grows until a half-precision sum absorbs what is added, so it stays
finite however often the call is replayed.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

import octavo
from octavo.bench.bench_rms_norm import EPS
from octavo.bench.harness import Inputs, Provider, Shape
from octavo.bench.providers import by_rows, compiled, drawn
from octavo.bench.shapes import TOKENS, hidden_sizes

OP = "add_rms_norm"
DTYPES = (torch.bfloat16,)

Pair = tuple[torch.Tensor, torch.Tensor]


def shapes() -> list[Shape]:
    return [{"T": tokens, "hidden": hidden} for hidden in hidden_sizes() for tokens in TOKENS]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    fresh = drawn(dtype, device, generator)
    return {
        "x": torch.randn(shape["T"], shape["hidden"], **fresh),
        "residual": torch.randn(shape["T"], shape["hidden"], **fresh),
        "weight": torch.rand(shape["hidden"], **fresh) + 0.5,
    }


def exact(inputs: Inputs) -> Pair:
    """The norm is that of the sum as the residual holds it, rounded to its dtype."""
    weight, residual = inputs["weight"].double(), inputs["residual"] + inputs["x"]
    return by_rows(lambda x: x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight, residual), residual.double()


def flops(shape: Shape) -> int:
    """A sum, and RMSNorm's square, sum and two products an element."""
    return 5 * shape["T"] * shape["hidden"]


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    return (4 * shape["T"] + 1) * shape["hidden"] * dtype.itemsize


def _plain(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Pair:
    """Not in place: as a torch model has it, and one read and write of each tensor all the same."""
    total = x + residual
    wide = total.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight.float()).to(x.dtype), total


def _octavo(inputs: Inputs) -> Callable[[], Pair]:
    x, residual, weight = inputs["x"], inputs["residual"], inputs["weight"]
    return lambda: (octavo.add_rms_norm(x, residual, weight, EPS), residual)


def _torch(inputs: Inputs) -> Callable[[], Pair]:
    x, residual, weight = inputs["x"], inputs["residual"], inputs["weight"]

    def call() -> Pair:
        total = x + residual
        return F.rms_norm(total, weight.shape, weight, EPS), total

    return call


def _compiled(inputs: Inputs) -> Callable[[], Pair]:
    return compiled(_plain, inputs["x"], inputs["residual"], inputs["weight"])


def _in_place(function: Callable[..., object], inputs: Inputs) -> Callable[[], Pair]:
    """A peer that writes the norm over x and the sum over residual."""
    x, residual, weight = inputs["x"], inputs["residual"], inputs["weight"]

    def call() -> Pair:
        function(x, residual, weight, EPS)
        return x, residual

    return call


def _flashinfer(inputs: Inputs) -> Callable[[], Pair]:
    from flashinfer import fused_add_rmsnorm

    return _in_place(fused_add_rmsnorm, inputs)


def _vllm(inputs: Inputs) -> Callable[[], Pair]:
    import vllm._custom_ops as ops

    return _in_place(ops.fused_add_rms_norm, inputs)


def _liger(inputs: Inputs) -> Callable[[], Pair]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    x, residual, weight = inputs["x"], inputs["residual"], inputs["weight"]
    return lambda: LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "llama", False)


def _conch(inputs: Inputs) -> Callable[[], Pair]:
    from conch.ops.normalization.rms_norm import fused_add_rms_norm

    return _in_place(fused_add_rms_norm, inputs)


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch": Provider(_torch, devices=("cpu", "cuda"), package="torch"),
    "torch.compile": Provider(_compiled, package="torch"),
    "flashinfer": Provider(_flashinfer, "flashinfer", package="flashinfer-python"),
    "vllm": Provider(_vllm, "vllm", package="vllm"),
    "liger": Provider(_liger, "triton-peers", package="liger-kernel"),
    "conch": Provider(_conch, "triton-peers", package="conch-triton-kernels"),
}
