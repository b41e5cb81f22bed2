"""Linear layer with int4 weights in groups of 128.

Bound by the weights' bytes at few tokens, by the tensor cores at many.
"""

from collections.abc import Callable

import torch

import octavo
from octavo.bench import weight_only
from octavo.bench.harness import Inputs, Provider, Shape

OP = "int4_linear"
DTYPES = (torch.bfloat16,)

shapes = weight_only.shapes
exact = weight_only.exact
flops = weight_only.flops


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    size = shape["N"], shape["K"]
    q = torch.randint(0, 16, size, generator=generator, device=device, dtype=torch.uint8)
    return weight_only.draw(shape, q, 8, dtype, device, generator)


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    return weight_only.bytes_moved(shape, dtype, bits=4)


def _octavo(inputs: Inputs) -> Callable[[], torch.Tensor]:
    x, scale, group = inputs["x"], inputs["scale"], inputs["group"]
    packed = octavo.int4_pack(inputs["q"])
    return lambda: octavo.int4_linear(x, packed, scale, group_size=group, prefetch_weight=True)


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch (bf16 weights)": Provider(weight_only.bf16_weights, devices=("cpu", "cuda"), package="torch"),
    "marlin": Provider(lambda i: weight_only.marlin(i, bits=4), "vllm", package="vllm"),
    "machete": Provider(lambda i: weight_only.machete(i, bits=4), "vllm", package="vllm"),
    "conch": Provider(lambda i: weight_only.conch(i, bits=4), "triton-peers", package="conch-triton-kernels"),
    "gemlite": Provider(lambda i: weight_only.gemlite(i, bits=4), "triton-peers", package="gemlite"),
}
