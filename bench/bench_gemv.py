"""One token's linear layer in bf16, alone and with SiLU × gate: bound by the weights' bytes.

FlashInfer's is TensorRT-LLM's small GEMM for few tokens, which has no activation.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

import octavo
from octavo.bench.harness import Inputs, Provider, Shape, Unsupported
from octavo.bench.providers import PIECE, compiled, drawn, full_fp32, wide_dtype
from octavo.bench.shapes import LLAMA_2_70B, LLAMA_3_8B, linears

OP = "gemv"
DTYPES = (torch.bfloat16,)


def shapes() -> list[Shape]:
    """Every layer; gate and up also with what follows them."""
    found = []
    for model in (LLAMA_3_8B, LLAMA_2_70B):
        for name, (n, k) in linears(model).items():
            found += [{"M": 1, "N": n, "K": k, "gated": gated} for gated in ((0, 1) if name == "gate_up" else (0,))]
    return found


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    fresh = drawn(dtype, device, generator)
    weight = torch.randn(shape["N"], shape["K"], **fresh).mul_(shape["K"] ** -0.5)
    return {"x": torch.randn(shape["M"], shape["K"], **fresh), "weight": weight, "gated": shape["gated"]}


def activated(y: torch.Tensor, gated: int) -> torch.Tensor:
    if not gated:
        return y
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up


def exact(inputs: Inputs) -> torch.Tensor:
    """In fp64 on a CPU, in fp32 on a GPU; some outputs at a time, so that the wide weights stay small."""
    x = inputs["x"].to(wide_dtype(inputs["x"].device))
    rows = max(1, PIECE // x.shape[1])
    with full_fp32():
        y = torch.cat([x @ part.to(x.dtype).t() for part in inputs["weight"].split(rows)], -1)
    return activated(y, inputs["gated"])


def flops(shape: Shape) -> int:
    return 2 * shape["M"] * shape["N"] * shape["K"]


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    """x, the weights, and the output."""
    m, n, k = shape["M"], shape["N"], shape["K"]
    return (n * k + m * k + m * n // (2 if shape["gated"] else 1)) * dtype.itemsize


def _octavo(inputs: Inputs) -> Callable[[], torch.Tensor]:
    x, weight = inputs["x"], inputs["weight"]
    activation = "silu_and_mul" if inputs["gated"] else None
    return lambda: octavo.gemv(x, weight, activation=activation)


def _plain(x: torch.Tensor, weight: torch.Tensor, gated: int) -> torch.Tensor:
    return activated(F.linear(x, weight), gated)


def _torch(inputs: Inputs) -> Callable[[], torch.Tensor]:
    return lambda: _plain(inputs["x"], inputs["weight"], inputs["gated"])


def flashinfer(inputs: Inputs) -> Callable[[], torch.Tensor]:
    from flashinfer.gemm import tinygemm_bf16

    if inputs["gated"]:
        raise Unsupported("tinygemm_bf16 has no activation")
    x, weight = inputs["x"], inputs["weight"]
    out = x.new_empty(x.shape[0], weight.shape[0])

    def call() -> torch.Tensor:
        tinygemm_bf16(x, weight, out, use_pdl=True)
        return out

    return call


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch": Provider(_torch, devices=("cpu", "cuda"), package="torch"),
    "torch.compile": Provider(lambda i: compiled(_plain, i["x"], i["weight"], i["gated"]), package="torch"),
    "flashinfer": Provider(flashinfer, "flashinfer", package="flashinfer-python"),
}
