"""RMSNorm quantised in the same pass: bound by memory, x read once and a byte an element written."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import octavo
from octavo.bench import bench_rms_norm
from octavo.bench.bench_rms_norm import EPS
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

OP = "rms_norm_quantize"
DTYPES = (torch.bfloat16,)

Call = Callable[[], tuple[torch.Tensor, ...]]


def shapes() -> list[Shape]:
    return fused_shapes("hidden", hidden_sizes())


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    tensors = bench_rms_norm.inputs(shape, dtype, device, generator)
    return tensors | options(shape, shape["hidden"], device, 6.0)


def exact(inputs: Inputs) -> Any:
    return exact_quantized(bench_rms_norm.exact(inputs), inputs)


def flops(shape: Shape) -> int:
    """RMSNorm's four an element, a maximum and a product."""
    return 6 * shape["T"] * shape["hidden"]


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    return (shape["T"] + 1) * shape["hidden"] * dtype.itemsize + output_bytes(shape, shape["hidden"])


def how(inputs: Inputs) -> dict[str, Any]:
    """The keyword arguments that say how to quantise."""
    return {"scale": inputs["scale"], "group_size": inputs["group_size"]}


def octavo_quantize(y: torch.Tensor, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """octavo's own quantisation, as an op of its own."""
    options: dict[str, Any] = {"granularity": "group"} if inputs["group_size"] else {}
    if inputs["dtype"] == torch.int8:
        return as_tuple(octavo.quantize_int8(y, inputs["scale"], **options))
    return as_tuple(octavo.quantize_fp8(y, inputs["scale"], **options))


def _plain(x: torch.Tensor, weight: torch.Tensor, *how: Any) -> tuple[torch.Tensor, ...]:
    wide = x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight.float()
    return plain_quantize(y, *how)


def _octavo(inputs: Inputs) -> Call:
    x, weight, dtype, options = inputs["x"], inputs["weight"], inputs["dtype"], how(inputs)
    return lambda: as_tuple(octavo.rms_norm_quantize(x, weight, dtype, EPS, **options))


def _separate(inputs: Inputs) -> Call:
    x, weight = inputs["x"], inputs["weight"]
    return lambda: octavo_quantize(octavo.rms_norm(x, weight, EPS), inputs)


def _torch(inputs: Inputs) -> Call:
    x, weight, dtype, options = inputs["x"], inputs["weight"], inputs["dtype"], how(inputs)
    return lambda: plain_quantize(F.rms_norm(x, weight.shape, weight, EPS), dtype, **options)


def _compiled(inputs: Inputs) -> Call:
    return compiled(_plain, inputs["x"], inputs["weight"], inputs["dtype"], inputs["scale"], inputs["group_size"])


def _flashinfer(inputs: Inputs) -> Call:
    from flashinfer.norm import rmsnorm_quant

    x, weight, scale = inputs["x"], inputs["weight"], inputs["scale"]
    if scale is None:
        raise Unsupported("a given scale only")
    out = torch.empty_like(x, dtype=inputs["dtype"])

    def call() -> tuple[torch.Tensor, ...]:
        rmsnorm_quant(out, x, weight, scale, EPS)
        return (out,)

    return call


def _vllm(inputs: Inputs) -> Call:
    import vllm._custom_ops as ops

    x, weight, dtype, scale = inputs["x"], inputs["weight"], inputs["dtype"], inputs["scale"]
    if inputs["group_size"]:
        return lambda: ops.rms_norm_per_block_quant(x, weight, EPS, dtype, [1, GROUP])
    if scale is None:
        return lambda: ops.rms_norm_dynamic_per_token_quant(x, weight, EPS, dtype)
    out = torch.empty_like(x, dtype=dtype)

    def call() -> tuple[torch.Tensor, ...]:
        torch.ops._C.rms_norm_static_fp8_quant(out, x, weight, scale, EPS)
        return (out,)

    return call


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch": Provider(_torch, devices=("cpu", "cuda"), package="torch"),
    "torch.compile": Provider(_compiled, package="torch"),
    "octavo, separate": Provider(_separate, devices=("cpu", "cuda"), package="octavo", note="rms_norm, then quantised"),
    "flashinfer": Provider(_flashinfer, "flashinfer", package="flashinfer-python"),
    "vllm": Provider(_vllm, "vllm", package="vllm"),
}
