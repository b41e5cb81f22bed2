"""Linear layer with int8 activations and weights, a scale a token and an output.

Bound by the weights' bytes at few tokens, by the tensor cores at many.
"""

from collections.abc import Callable

import torch

import octavo
from octavo.bench import w8a8
from octavo.bench.harness import Inputs, Provider, Shape, Unsupported

OP = "int8_int8_linear"
DTYPES = (torch.int8,)

shapes = w8a8.shapes
exact = w8a8.exact
flops = w8a8.flops
bytes_moved = w8a8.bytes_moved


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    return w8a8.draw(shape, torch.int8, dtype, device, generator)


def _octavo(inputs: Inputs) -> Callable[[], torch.Tensor]:
    args = {name: inputs[name] for name in ("x", "weight", "x_scale", "weight_scale", "out_dtype")}
    return lambda: octavo.int8_int8_linear(**args)


def _torch(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """cuBLAS, which leaves the sums to be scaled."""
    x, weight, x_scale, weight_scale = (inputs[name] for name in ("x", "weight", "x_scale", "weight_scale"))
    if x.device.type == "cpu":
        return w8a8.plain(inputs)
    if x.shape[0] <= 16:
        raise Unsupported("torch._int_mm wants more than 16 tokens")
    return lambda: (torch._int_mm(x, weight.t()) * x_scale * weight_scale).to(inputs["out_dtype"])


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch": Provider(_torch, devices=("cpu", "cuda"), package="torch"),
    "cutlass": Provider(w8a8.cutlass, "vllm", package="vllm"),
}
