"""GeGLU's activation, exact and by tanh: bound by memory as SwiGLU's is, and measured at the same widths.

None of the models in `shapes` has it (Gemma does): what it costs beside SiLU is the arithmetic.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

import octavo
from octavo.bench.harness import Inputs, Provider, Shape, Unsupported
from octavo.bench.providers import by_rows, compiled, gated_input, gated_out
from octavo.bench.shapes import TOKENS, gated_sizes

OP = "gelu_and_mul"
DTYPES = (torch.bfloat16,)
EXACT_TOKENS = (1, 1024, 8192)


def shapes() -> list[Shape]:
    """`tanh` is 1 for the approximation, 0 for the exact function, which is as fast where memory is the limit."""
    return [
        {"T": tokens, "intermediate": width, "tanh": tanh}
        for tanh, counts in ((1, TOKENS), (0, EXACT_TOKENS))
        for width in gated_sizes()
        for tokens in counts
    ]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    return {
        "x": gated_input(shape, dtype, device, generator),
        "approximate": "tanh" if shape["tanh"] else "none",
    }


def exact(inputs: Inputs) -> torch.Tensor:
    return by_rows(lambda x: _plain(x, inputs["approximate"]), inputs["x"])


def flops(shape: Shape) -> int:
    """Exact: erf, a sum, four products an output; tanh: three products and a sum more, for the cubic."""
    return (10 if shape["tanh"] else 6) * shape["T"] * shape["intermediate"]


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    return 3 * shape["T"] * shape["intermediate"] * dtype.itemsize


def _plain(x: torch.Tensor, approximate: str) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.gelu(gate, approximate=approximate) * up


def _octavo(inputs: Inputs) -> Callable[[], torch.Tensor]:
    x, approximate = inputs["x"], inputs["approximate"]
    return lambda: octavo.gelu_and_mul(x, approximate)


def _torch(inputs: Inputs) -> Callable[[], torch.Tensor]:
    x, approximate = inputs["x"], inputs["approximate"]
    return lambda: _plain(x, approximate)


def _flashinfer(inputs: Inputs) -> Callable[[], torch.Tensor]:
    import flashinfer

    x, out = inputs["x"], gated_out(inputs["x"])
    function = flashinfer.gelu_tanh_and_mul if inputs["approximate"] == "tanh" else flashinfer.gelu_and_mul
    return lambda: function(x, out=out)


def _vllm(inputs: Inputs) -> Callable[[], torch.Tensor]:
    import vllm._custom_ops  # noqa: F401  (loads what torch.ops._C holds)

    x, out = inputs["x"], gated_out(inputs["x"])
    function = torch.ops._C.gelu_tanh_and_mul if inputs["approximate"] == "tanh" else torch.ops._C.gelu_and_mul

    def call() -> torch.Tensor:
        function(out, x)
        return out

    return call


def _liger(inputs: Inputs) -> Callable[[], torch.Tensor]:
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    if inputs["approximate"] != "tanh":
        raise Unsupported("tanh only")
    # It takes gate and up as tensors of their own; splitting them is set-up.
    gate, up = (half.contiguous() for half in inputs["x"].chunk(2, -1))
    return lambda: LigerGELUMulFunction.apply(gate, up)


def _conch(inputs: Inputs) -> Callable[[], torch.Tensor]:
    from conch.ops.activation.gelu_tanh_and_mul import gelu_tanh_and_mul

    if inputs["approximate"] != "tanh":
        raise Unsupported("tanh only")
    x = inputs["x"]
    return lambda: gelu_tanh_and_mul(x)


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch": Provider(_torch, devices=("cpu", "cuda"), package="torch"),
    "torch.compile": Provider(lambda i: compiled(_plain, i["x"], i["approximate"]), package="torch"),
    "flashinfer": Provider(_flashinfer, "flashinfer", package="flashinfer-python"),
    "vllm": Provider(_vllm, "vllm", package="vllm"),
    "liger": Provider(_liger, "triton-peers", package="liger-kernel", note="gate and up split before"),
    "conch": Provider(_conch, "triton-peers", package="conch-triton-kernels"),
}
