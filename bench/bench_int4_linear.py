"""Linear layer with int4 weights in groups of 128.

Bound by the weights' bytes at few tokens, by the tensor cores at many.
"""

from collections.abc import Callable

import torch

import octavo
from octavo.bench import weight_only
from octavo.bench.harness import Inputs, Provider, Shape
from octavo.bench.providers import pack_words

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
    return lambda: octavo.int4_linear(x, packed, scale, group_size=group)


def _machete(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """vLLM's Machete, for Hopper alone."""
    import vllm._custom_ops as ops
    from vllm.scalar_type import scalar_types

    x, scale, group, kind = inputs["x"], inputs["scale"], inputs["group"], scalar_types.uint4b8
    # [K/8, N] with K contiguous, which it asks for.
    words = pack_words(weight_only.unsigned(inputs, 4), 4).t()
    weight = ops.machete_prepack_B(words, x.dtype, kind, x.dtype)
    return lambda: ops.machete_mm(x, weight, kind, out_type=x.dtype, b_group_scales=scale, b_group_size=group)


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch (bf16 weights)": Provider(weight_only.bf16_weights, devices=("cpu", "cuda"), package="torch"),
    "marlin": Provider(lambda i: weight_only.marlin(i, bits=4), "vllm", package="vllm"),
    "machete": Provider(_machete, "vllm", package="vllm"),
    "conch": Provider(lambda i: weight_only.conch(i, bits=4), "triton-peers", package="conch-triton-kernels"),
    "gemlite": Provider(weight_only.gemlite, "triton-peers", package="gemlite"),
}
