"""Quantisation to e4m3: bound by memory, x read once and a byte an element written; by tensor x is read twice.

A shape's `group` is how many neighbours share a scale: the whole row, 128, or 0 for one scale of the tensor.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import octavo
from octavo.bench.check import Quantized
from octavo.bench.harness import Inputs, Provider, Shape
from octavo.bench.providers import compiled, drawn
from octavo.bench.quantized import FEW_TOKENS, GROUP, LIMITS, output_bytes, plain_quantize
from octavo.bench.shapes import TOKENS, hidden_sizes

OP = "quantize_fp8"
DTYPES = (torch.bfloat16,)

Call = Callable[[], tuple[torch.Tensor, ...]]


def shapes() -> list[Shape]:
    return [
        {"T": tokens, "hidden": hidden, "group": group}
        for hidden in hidden_sizes()
        for group, counts in ((hidden, TOKENS), (GROUP, FEW_TOKENS), (0, FEW_TOKENS))
        if group == 0 or hidden % group == 0
        for tokens in counts
    ]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    return {"x": torch.randn(shape["T"], shape["hidden"], **drawn(dtype, device, generator)), "group": shape["group"]}


def exact(inputs: Inputs) -> Any:
    return exact_as(torch.float8_e4m3fn, inputs)


def exact_as(dtype: torch.dtype, inputs: Inputs) -> Quantized:
    x, group = inputs["x"].double(), inputs["group"]
    return Quantized(x, dtype, parts=x.shape[-1] // group if group else 0)


def flops(shape: Shape) -> int:
    """A magnitude, a maximum and a product an element."""
    return 3 * shape["T"] * shape["hidden"]


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    return shape["T"] * shape["hidden"] * dtype.itemsize + output_bytes(shape, shape["hidden"])


def granularity(inputs: Inputs) -> Any:
    """octavo's name for what shares a scale."""
    return "tensor" if inputs["group"] == 0 else "group" if inputs["group"] == GROUP else "token"


def plain(dtype: torch.dtype, x: torch.Tensor, group: int) -> tuple[torch.Tensor, ...]:
    """The formula in plain torch."""
    if group:
        return plain_quantize(x, dtype, None, group)
    scale = (x.abs().amax().float() / LIMITS[dtype]).view(1)
    return *plain_quantize(x, dtype, scale, None), scale


def torch_call(dtype: torch.dtype, inputs: Inputs) -> Call:
    x, group = inputs["x"], inputs["group"]
    return lambda: plain(dtype, x, group)


def compiled_call(dtype: torch.dtype, inputs: Inputs) -> Call:
    return compiled(partial(plain, dtype), inputs["x"], inputs["group"])


def _octavo(inputs: Inputs) -> Call:
    x, by = inputs["x"], granularity(inputs)
    return lambda: octavo.quantize_fp8(x, granularity=by)


def _vllm(inputs: Inputs) -> Call:
    import vllm._custom_ops as ops

    x, group = inputs["x"], inputs["group"]
    if group == GROUP:
        from vllm.model_executor.layers.quantization.utils.fp8_utils import per_token_group_quant_fp8

        return lambda: per_token_group_quant_fp8(x, GROUP)
    return lambda: ops.scaled_fp8_quant(x, use_per_token_if_dynamic=bool(group))


E4M3 = torch.float8_e4m3fn
PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch": Provider(partial(torch_call, E4M3), devices=("cpu", "cuda"), package="torch"),
    "torch.compile": Provider(partial(compiled_call, E4M3), package="torch"),
    "vllm": Provider(_vllm, "vllm", package="vllm"),
}
