"""Two partial attentions made one: bound by memory, both read once and the result written once.

All providers compute the log-sum-exp as well; what is compared is the output, since FlashInfer's logarithms are of
base 2 and vLLM's lie with heads first.
"""

from collections.abc import Callable

import torch

import octavo
from octavo.bench.harness import Inputs, Provider, Shape
from octavo.bench.providers import PIECE, compiled, drawn
from octavo.bench.shapes import TOKENS, attention_heads

OP = "merge_attention_states"
DTYPES = (torch.bfloat16,)
LOG2_E = 1.4426950408889634

Pair = tuple[torch.Tensor, torch.Tensor]


def shapes() -> list[Shape]:
    return [{"T": tokens} | heads for heads in attention_heads() for tokens in TOKENS]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    rows = shape["T"], shape["heads"]
    fresh, fp32 = drawn(dtype, device, generator), drawn(torch.float32, device, generator)
    made = {name: torch.randn(*rows, shape["D"], **fresh) for name in ("out_a", "out_b")}
    return made | {name: 5 + torch.randn(rows, **fp32) for name in ("lse_a", "lse_b")}


def exact(inputs: Inputs) -> torch.Tensor:
    tensors = _tensors(inputs)
    tokens = max(1, PIECE // tensors[0][0].numel())
    pieces = zip(*(x.split(tokens) for x in tensors), strict=True)
    return torch.cat([_plain(*(x.double() for x in piece))[0] for piece in pieces])


def flops(shape: Shape) -> int:
    """Two products and a sum an element."""
    return 3 * shape["T"] * shape["heads"] * shape["D"]


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    """Three outputs, and three fp32 logarithms a row."""
    return 3 * shape["T"] * shape["heads"] * (shape["D"] * dtype.itemsize + 4)


def _tensors(inputs: Inputs) -> list[torch.Tensor]:
    return [inputs[name] for name in ("out_a", "lse_a", "out_b", "lse_b")]


def _plain(out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor) -> Pair:
    lse = torch.logaddexp(lse_a, lse_b)
    out = out_a * (lse_a - lse).exp()[..., None] + out_b * (lse_b - lse).exp()[..., None]
    return out.to(out_a.dtype), lse


def _octavo(inputs: Inputs) -> Callable[[], torch.Tensor]:
    tensors = _tensors(inputs)
    return lambda: octavo.merge_attention_states(*tensors)[0]


def _torch(inputs: Inputs) -> Callable[[], torch.Tensor]:
    tensors = _tensors(inputs)
    return lambda: _plain(*tensors)[0]


def _compiled(inputs: Inputs) -> Callable[[], torch.Tensor]:
    call = compiled(_plain, *_tensors(inputs))
    return lambda: call()[0]


def _flashinfer(inputs: Inputs) -> Callable[[], torch.Tensor]:
    from flashinfer import merge_state

    out_a, lse_a, out_b, lse_b = _tensors(inputs)
    tensors = out_a, lse_a * LOG2_E, out_b, lse_b * LOG2_E
    return lambda: merge_state(*tensors)[0]


def _vllm(inputs: Inputs) -> Callable[[], torch.Tensor]:
    import vllm._custom_ops as ops

    out_a, lse_a, out_b, lse_b = _tensors(inputs)
    out, heads_first = torch.empty_like(out_a), [x.t().contiguous() for x in (lse_a, lse_b)]
    lse = torch.empty_like(heads_first[0])

    def call() -> torch.Tensor:
        ops.merge_attn_states(out, out_a, heads_first[0], out_b, heads_first[1], lse)
        return out

    return call


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch": Provider(_torch, devices=("cpu", "cuda"), package="torch"),
    "torch.compile": Provider(_compiled, package="torch"),
    "flashinfer": Provider(_flashinfer, "flashinfer", package="flashinfer-python"),
    "vllm": Provider(_vllm, "vllm", package="vllm"),
}
