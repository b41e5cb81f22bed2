"""A dense linear layer in bf16 for few tokens and for many, alone and with SiLU × gate.

Bound by the weights' bytes up to some 200 tokens. vLLM's is torch's product, and behind it a kernel of its own for the
activation; FlashInfer's is TensorRT-LLM's small GEMM for few tokens, which has no activation.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

import octavo
from octavo.bench import bench_gemv
from octavo.bench.harness import Inputs, Provider, Shape, Unsupported
from octavo.bench.providers import compiled, gated_out
from octavo.bench.shapes import LLAMA_2_70B, LLAMA_3_8B, linears

OP = "linear"
DTYPES = (torch.bfloat16,)
TOKENS = (1, 2, 8, 16, 32, 64, 128)

inputs = bench_gemv.inputs
exact = bench_gemv.exact
flops = bench_gemv.flops
bytes_moved = bench_gemv.bytes_moved


def shapes() -> list[Shape]:
    """Every layer, gate and up with what follows them."""
    return [
        {"M": m, "N": n, "K": k, "gated": int(name == "gate_up")}
        for model in (LLAMA_3_8B, LLAMA_2_70B)
        for name, (n, k) in linears(model).items()
        for m in TOKENS
    ]


def _octavo(inputs: Inputs) -> Callable[[], torch.Tensor]:
    x, weight = inputs["x"], inputs["weight"]
    activation = "silu_and_mul" if inputs["gated"] else None
    return lambda: octavo.linear(x, weight, activation=activation, prefetch_weight=True)


def _plain(x: torch.Tensor, weight: torch.Tensor, gated: int) -> torch.Tensor:
    return bench_gemv.activated(F.linear(x, weight), gated)


def _torch(inputs: Inputs) -> Callable[[], torch.Tensor]:
    return lambda: _plain(inputs["x"], inputs["weight"], inputs["gated"])


def _vllm(inputs: Inputs) -> Callable[[], torch.Tensor]:
    import vllm._custom_ops  # noqa: F401  (loads what torch.ops._C holds)

    x, weight = inputs["x"], inputs["weight"]
    if not inputs["gated"]:
        return lambda: F.linear(x, weight)
    out = gated_out(F.linear(x, weight))

    def call() -> torch.Tensor:
        torch.ops._C.silu_and_mul(out, F.linear(x, weight))
        return out

    return call


def _flashinfer(inputs: Inputs) -> Callable[[], torch.Tensor]:
    if inputs["x"].shape[0] > 64:
        raise Unsupported("tinygemm_bf16 is for few tokens")
    return bench_gemv.flashinfer(inputs)


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch": Provider(_torch, devices=("cpu", "cuda"), package="torch"),
    "torch.compile": Provider(lambda i: compiled(_plain, i["x"], i["weight"], i["gated"]), package="torch"),
    "vllm": Provider(_vllm, "vllm", package="vllm"),
    "flashinfer": Provider(_flashinfer, "flashinfer", package="flashinfer-python"),
}
