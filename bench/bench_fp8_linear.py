"""Linear layer with e4m3 activations and weights: a scale a token and an output, or a scale a block of 128.

Bound by the weights' bytes at few tokens, by the tensor cores at many.
"""

from collections.abc import Callable

import torch

import octavo
from octavo.bench import w8a8
from octavo.bench.harness import Inputs, Provider, Shape, Unsupported

OP = "fp8_linear"
DTYPES = (torch.float8_e4m3fn,)

exact = w8a8.exact
flops = w8a8.flops
bytes_moved = w8a8.bytes_moved


def shapes() -> list[Shape]:
    return [shape | {"block": block} for block in (0, w8a8.BLOCK) for shape in w8a8.shapes()]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    return w8a8.draw(shape, torch.float8_e4m3fn, dtype, device, generator)


def _octavo(inputs: Inputs, fast_accum: bool = True) -> Callable[[], torch.Tensor]:
    args = {name: inputs[name] for name in ("x", "weight", "x_scale", "weight_scale", "out_dtype")}
    return lambda: octavo.fp8_linear(**args, fast_accum=fast_accum)


def _octavo_precise(inputs: Inputs) -> Callable[[], torch.Tensor]:
    if inputs["block"]:
        raise Unsupported("sums in blocks are always precise")
    return _octavo(inputs, fast_accum=False)


def _torch(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """cuBLAS."""
    x, weight, scale, out_dtype = inputs["x"], inputs["weight"].t(), inputs["x_scale"], inputs["out_dtype"]
    if x.device.type == "cpu":
        return w8a8.plain(inputs)
    if inputs["block"]:
        raise Unsupported("measured with a scale a token and an output")
    weight_scale = inputs["weight_scale"][None]
    return lambda: torch._scaled_mm(x, weight, scale, weight_scale, out_dtype=out_dtype, use_fast_accum=True)


def _vllm_triton(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """vLLM's Triton kernel for scales by blocks, with what tile choices it brings for this GPU."""
    from vllm.model_executor.layers.quantization.utils.fp8_utils import w8a8_triton_block_scaled_mm

    if not inputs["block"]:
        raise Unsupported("for scales by blocks alone")
    args = [inputs[name] for name in ("x", "weight", "x_scale", "weight_scale")]
    return lambda: w8a8_triton_block_scaled_mm(*args, [w8a8.BLOCK, w8a8.BLOCK], inputs["out_dtype"])


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch": Provider(_torch, devices=("cpu", "cuda"), package="torch"),
    "octavo, fast_accum=False": Provider(_octavo_precise, package="octavo"),
    "cutlass": Provider(w8a8.cutlass, "vllm", package="vllm"),
    "vllm triton": Provider(_vllm_triton, "vllm", package="vllm"),
}
