"""SwiGLU's activation quantised in the same pass: bound by memory, x read once and a byte an output written."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import octavo
from octavo.bench.bench_rms_norm_quantize import how, octavo_quantize
from octavo.bench.harness import Inputs, Provider, Shape, Unsupported
from octavo.bench.providers import by_rows, compiled, gated_input, gated_out
from octavo.bench.quantized import (
    GROUP,
    as_tuple,
    exact_quantized,
    fused_shapes,
    options,
    output_bytes,
    plain_quantize,
)
from octavo.bench.shapes import gated_sizes

OP = "silu_and_mul_quantize"
DTYPES = (torch.bfloat16,)

Call = Callable[[], tuple[torch.Tensor, ...]]


def shapes() -> list[Shape]:
    return fused_shapes("intermediate", gated_sizes())


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    return {"x": gated_input(shape, dtype, device, generator)} | options(shape, shape["intermediate"], device, 12.0)


def exact(inputs: Inputs) -> Any:
    return exact_quantized(by_rows(_activated, inputs["x"]), inputs)


def flops(shape: Shape) -> int:
    """Exponential, sum, quotient, two products an output; a maximum and a product."""
    return 7 * shape["T"] * shape["intermediate"]


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    return 2 * shape["T"] * shape["intermediate"] * dtype.itemsize + output_bytes(shape, shape["intermediate"])


def _activated(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def _plain(x: torch.Tensor, *how: Any) -> tuple[torch.Tensor, ...]:
    return plain_quantize(_activated(x.float()), *how)


def _octavo(inputs: Inputs) -> Call:
    x, dtype, options = inputs["x"], inputs["dtype"], how(inputs)
    return lambda: as_tuple(octavo.silu_and_mul_quantize(x, dtype, **options))


def _separate(inputs: Inputs) -> Call:
    x = inputs["x"]
    return lambda: octavo_quantize(octavo.silu_and_mul(x), inputs)


def _torch(inputs: Inputs) -> Call:
    x, dtype, options = inputs["x"], inputs["dtype"], how(inputs)
    return lambda: plain_quantize(_activated(x), dtype, **options)


def _compiled(inputs: Inputs) -> Call:
    return compiled(_plain, inputs["x"], inputs["dtype"], inputs["scale"], inputs["group_size"])


def _vllm(inputs: Inputs) -> Call:
    import vllm._custom_ops as ops

    x, dtype, scale = inputs["x"], inputs["dtype"], inputs["scale"]
    if inputs["group_size"]:
        return lambda: ops.silu_and_mul_per_block_quant(x, GROUP, dtype)
    if scale is None:
        raise Unsupported("scales by group and a given one only")
    out = gated_out(x).to(dtype)

    def call() -> tuple[torch.Tensor, ...]:
        torch.ops._C.silu_and_mul_quant(out, x, scale)
        return (out,)

    return call


def _vllm_separate(inputs: Inputs) -> Call:
    import vllm._custom_ops as ops

    x, dtype = inputs["x"], inputs["dtype"]
    if inputs["group_size"] or inputs["scale"] is not None:
        raise Unsupported("scales by token only, for which it has no op in one")
    y = gated_out(x)

    def call() -> tuple[torch.Tensor, ...]:
        torch.ops._C.silu_and_mul(y, x)
        if dtype == torch.int8:
            return ops.scaled_int8_quant(y)[:2]
        return ops.scaled_fp8_quant(y, use_per_token_if_dynamic=True)

    return call


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch": Provider(_torch, devices=("cpu", "cuda"), package="torch"),
    "torch.compile": Provider(_compiled, package="torch"),
    "octavo, separate": Provider(
        _separate, devices=("cpu", "cuda"), package="octavo", note="silu_and_mul, then quantised"
    ),
    "vllm": Provider(_vllm, "vllm", package="vllm"),
    "vllm, separate": Provider(_vllm_separate, "vllm", package="vllm", note="silu_and_mul, then quantised"),
}
