"""RMSNorm of the residual sum, quantised in the same pass, the sum written back: bound by memory.

As in `bench_add_rms_norm`, the call repeats on the same buffers.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import octavo
from octavo.bench import bench_add_rms_norm
from octavo.bench.bench_rms_norm import EPS
from octavo.bench.bench_rms_norm_quantize import how, octavo_quantize
from octavo.bench.harness import Inputs, Provider, Shape, Unsupported
from octavo.bench.providers import compiled
from octavo.bench.quantized import (
    GROUP,
    as_tuple,
    exact_quantized,
    fused_shapes,
    options,
    output_bytes,
    plain_quantize,
)
from octavo.bench.shapes import hidden_sizes

OP = "add_rms_norm_quantize"
DTYPES = (torch.bfloat16,)

Call = Callable[[], tuple[torch.Tensor, ...]]


def shapes() -> list[Shape]:
    return fused_shapes("hidden", hidden_sizes())


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    tensors = bench_add_rms_norm.inputs(shape, dtype, device, generator)
    return tensors | options(shape, shape["hidden"], device, 6.0)


def exact(inputs: Inputs) -> Any:
    values, residual = bench_add_rms_norm.exact(inputs)
    return exact_quantized(values, inputs), residual


def flops(shape: Shape) -> int:
    """The sum, RMSNorm's four an element, a maximum and a product."""
    return 7 * shape["T"] * shape["hidden"]


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    return (3 * shape["T"] + 1) * shape["hidden"] * dtype.itemsize + output_bytes(shape, shape["hidden"])


def _plain(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *how: Any) -> tuple[torch.Tensor, ...]:
    """Not in place: as a torch model has it, and one read and write of each tensor all the same."""
    total = x + residual
    wide = total.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight.float()
    return *plain_quantize(y, *how), total


def _octavo(inputs: Inputs) -> Call:
    x, residual, weight, dtype, options = *_tensors(inputs), inputs["dtype"], how(inputs)
    return lambda: (*as_tuple(octavo.add_rms_norm_quantize(x, residual, weight, dtype, EPS, **options)), residual)


def _tensors(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return inputs["x"], inputs["residual"], inputs["weight"]


def _separate(inputs: Inputs) -> Call:
    x, residual, weight = _tensors(inputs)
    return lambda: (*octavo_quantize(octavo.add_rms_norm(x, residual, weight, EPS), inputs), residual)


def _torch(inputs: Inputs) -> Call:
    x, residual, weight, dtype, options = *_tensors(inputs), inputs["dtype"], how(inputs)

    def call() -> tuple[torch.Tensor, ...]:
        total = x + residual
        return *plain_quantize(F.rms_norm(total, weight.shape, weight, EPS), dtype, **options), total

    return call


def _compiled(inputs: Inputs) -> Call:
    return compiled(_plain, *_tensors(inputs), inputs["dtype"], inputs["scale"], inputs["group_size"])


def _flashinfer(inputs: Inputs) -> Call:
    from flashinfer.norm import fused_add_rmsnorm_quant

    x, residual, weight, scale = *_tensors(inputs), inputs["scale"]
    if scale is None:
        raise Unsupported("a given scale only")
    out = torch.empty_like(x, dtype=inputs["dtype"])

    def call() -> tuple[torch.Tensor, ...]:
        fused_add_rmsnorm_quant(out, x, residual, weight, scale, EPS)
        return out, residual

    return call


def _vllm(inputs: Inputs) -> Call:
    import vllm._custom_ops as ops

    x, residual, weight, dtype, scale = *_tensors(inputs), inputs["dtype"], inputs["scale"]
    if inputs["group_size"]:
        return lambda: (*ops.rms_norm_per_block_quant(x, weight, EPS, dtype, [1, GROUP], None, residual), residual)
    if scale is None:
        return lambda: (*ops.rms_norm_dynamic_per_token_quant(x, weight, EPS, dtype, None, residual), residual)
    out = torch.empty_like(x, dtype=dtype)

    def call() -> tuple[torch.Tensor, ...]:
        torch.ops._C.fused_add_rms_norm_static_fp8_quant(out, x, residual, weight, scale, EPS)
        return out, residual

    return call


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch": Provider(_torch, devices=("cpu", "cuda"), package="torch"),
    "torch.compile": Provider(_compiled, package="torch"),
    "octavo, separate": Provider(
        _separate, devices=("cpu", "cuda"), package="octavo", note="add_rms_norm, then quantised"
    ),
    "flashinfer": Provider(_flashinfer, "flashinfer", package="flashinfer-python"),
    "vllm": Provider(_vllm, "vllm", package="vllm"),
}
