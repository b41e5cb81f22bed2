"""GeGLU's activation by tanh, quantised in the same pass: bound by memory as SwiGLU's is, and measured as that is.

No peer has it in one: vLLM's is two calls.
"""

from typing import Any

import torch
import torch.nn.functional as F

import octavo
from octavo.bench import bench_silu_and_mul_quantize as silu
from octavo.bench.bench_rms_norm_quantize import how, octavo_quantize
from octavo.bench.bench_silu_and_mul_quantize import Call
from octavo.bench.harness import Inputs, Provider, Shape, Unsupported
from octavo.bench.providers import by_rows, compiled, gated_out
from octavo.bench.quantized import FEW_TOKENS, as_tuple, exact_quantized, plain_quantize

OP = "gelu_and_mul_quantize"
DTYPES = (torch.bfloat16,)

inputs, bytes_moved = silu.inputs, silu.bytes_moved


def shapes() -> list[Shape]:
    return [shape for shape in silu.shapes() if shape["T"] in FEW_TOKENS]


def exact(inputs: Inputs) -> Any:
    return exact_quantized(by_rows(_activated, inputs["x"]), inputs)


def flops(shape: Shape) -> int:
    """As `gelu_and_mul` by tanh; a maximum and a product."""
    return 12 * shape["T"] * shape["intermediate"]


def _activated(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def _plain(x: torch.Tensor, *how: Any) -> tuple[torch.Tensor, ...]:
    return plain_quantize(_activated(x.float()), *how)


def _octavo(inputs: Inputs) -> Call:
    x, dtype, options = inputs["x"], inputs["dtype"], how(inputs)
    return lambda: as_tuple(octavo.gelu_and_mul_quantize(x, dtype, "tanh", **options))


def _separate(inputs: Inputs) -> Call:
    x = inputs["x"]
    return lambda: octavo_quantize(octavo.gelu_and_mul(x, "tanh"), inputs)


def _torch(inputs: Inputs) -> Call:
    x, dtype, options = inputs["x"], inputs["dtype"], how(inputs)
    return lambda: plain_quantize(_activated(x), dtype, **options)


def _compiled(inputs: Inputs) -> Call:
    return compiled(_plain, inputs["x"], inputs["dtype"], inputs["scale"], inputs["group_size"])


def _vllm_separate(inputs: Inputs) -> Call:
    import vllm._custom_ops as ops

    x, dtype = inputs["x"], inputs["dtype"]
    if inputs["group_size"]:
        raise Unsupported("scales by token and a given one only")
    y, scale = gated_out(x), inputs["scale"]

    def call() -> tuple[torch.Tensor, ...]:
        torch.ops._C.gelu_tanh_and_mul(y, x)
        if dtype == torch.int8:
            return ops.scaled_int8_quant(y)[:2]
        q, scales = ops.scaled_fp8_quant(y, scale, use_per_token_if_dynamic=True)
        return (q, scales) if scale is None else (q,)

    return call


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch": Provider(_torch, devices=("cpu", "cuda"), package="torch"),
    "torch.compile": Provider(_compiled, package="torch"),
    "octavo, separate": Provider(
        _separate, devices=("cpu", "cuda"), package="octavo", note="gelu_and_mul, then quantised"
    ),
    "vllm, separate": Provider(_vllm_separate, "vllm", package="vllm", note="gelu_tanh_and_mul, then quantised"),
}
