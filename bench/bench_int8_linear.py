"""Linear layer with int8 weights and activations in floating point, in groups of 128 or with one scale an output.

Bound by the weights' bytes at few tokens, by the tensor cores at many.
"""

from collections.abc import Callable

import torch

import octavo
from octavo.bench import weight_only
from octavo.bench.harness import Inputs, Provider, Shape
from octavo.bench.shapes import GEMM_TOKENS, LLAMA_2_70B, LLAMA_3_8B, linears

OP = "int8_linear"
DTYPES = (torch.bfloat16,)

exact = weight_only.exact
flops = weight_only.flops


def shapes() -> list[Shape]:
    """In groups, every layer; with one scale an output (the group is K), the 8B model's and the 70B's square one."""
    layers = [*linears(LLAMA_3_8B).values(), linears(LLAMA_2_70B)["o"]]
    return weight_only.shapes() + [
        {"M": tokens, "N": n, "K": k, "group": k} for n, k in layers for tokens in GEMM_TOKENS
    ]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    size = shape["N"], shape["K"]
    q = torch.randint(-127, 128, size, generator=generator, device=device, dtype=torch.int8)
    return weight_only.draw(shape, q, 0, dtype, device, generator)


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    return weight_only.bytes_moved(shape, dtype, bits=8)


def _octavo(inputs: Inputs) -> Callable[[], torch.Tensor]:
    x, weight, scale, group = inputs["x"], inputs["q"], inputs["scale"], inputs["group"]
    return lambda: octavo.int8_linear(x, weight, scale, group_size=group, prefetch_weight=True)


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch (bf16 weights)": Provider(weight_only.bf16_weights, devices=("cpu", "cuda"), package="torch"),
    "marlin": Provider(lambda i: weight_only.marlin(i, bits=8), "vllm", package="vllm"),
    "machete": Provider(lambda i: weight_only.machete(i, bits=8), "vllm", package="vllm"),
    "conch": Provider(lambda i: weight_only.conch(i, bits=8), "triton-peers", package="conch-triton-kernels"),
    "gemlite": Provider(lambda i: weight_only.gemlite(i, bits=8), "triton-peers", package="gemlite"),
}
