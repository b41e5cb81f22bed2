"""What the benchmarks of linear layers with 8-bit activations and weights share: shapes, the exact product, a peer.

Operands are drawn quantised, and activations are not quantised inside the timing. The dtype that rows are kept under is
the operands'; outputs are bf16. A shape's `block` is 128 where each 1×128 activations and 128×128 weights have a scale,
0 where each token and each output has one.
"""

from collections.abc import Callable

import torch

from octavo.bench.harness import Inputs, Shape, Unsupported
from octavo.bench.providers import PIECE, full_fp32, wide_dtype
from octavo.bench.shapes import LLAMA_2_70B, gemm_shapes, linears

BLOCK = 128


def shapes() -> list[Shape]:
    """Every layer at every number of tokens, and a cube, where tensor cores alone count."""
    n, k = linears(LLAMA_2_70B)["o"]
    return [*gemm_shapes(), {"M": n, "N": n, "K": k}]


def draw(
    shape: Shape, operand: torch.dtype, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    """An input set, scaled so that outputs are near 1; fp32 outputs where `dtype` asks for them."""
    m, n, k = shape["M"], shape["N"], shape["K"]
    block = shape.get("block", 0)

    def operands(rows: int) -> torch.Tensor:
        if operand == torch.int8:
            return torch.randint(-127, 128, (rows, k), generator=generator, device=device, dtype=operand)
        out = torch.empty(rows, k, device=device, dtype=operand)
        for piece in out.split(max(1, PIECE // k)):
            piece.copy_((torch.randn(piece.shape, generator=generator, device=device) * 100).clamp_(-448, 448))
        return out

    def scales(*size: int) -> torch.Tensor:
        spread = 73 if operand == torch.int8 else 100
        return (torch.rand(size, generator=generator, device=device) + 0.5) / (spread * k**0.25)

    return {
        "x": operands(m),
        "weight": operands(n),
        "x_scale": scales(m, k // block if block else 1),
        "weight_scale": scales(-(-n // block), k // block) if block else scales(n),
        "block": block,
        "out_dtype": dtype if dtype == torch.float32 else torch.bfloat16,
    }


def dequantised(inputs: Inputs, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """Rows of w `[N, K]`, computed in `dtype`."""
    weight, scale, block = inputs["weight"][rows].to(dtype), inputs["weight_scale"].to(dtype), inputs["block"]
    if not block:
        return weight * scale[rows, None]
    of_rows = torch.arange(rows.start, rows.start + weight.shape[0], device=weight.device) // block
    return weight * scale[of_rows].repeat_interleave(block, 1)


def exact(inputs: Inputs) -> torch.Tensor:
    """In fp64 on a CPU, in fp32 on a GPU; some outputs at a time, so that the wide weights stay small."""
    dtype = wide_dtype(inputs["x"].device)
    x = inputs["x"].to(dtype) * inputs["x_scale"].to(dtype).repeat_interleave(
        inputs["block"] or inputs["x"].shape[1], 1
    )
    outputs, k = inputs["weight"].shape
    out = x.new_empty(x.shape[0], outputs)
    step = max(1, PIECE // k)
    with full_fp32():
        for start in range(0, outputs, step):
            part = slice(start, start + step)
            out[:, part] = x @ dequantised(inputs, part, dtype).t()
    return out


def plain(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """The formula in fp32, for a CPU."""
    return lambda: exact(inputs).to(inputs["out_dtype"])


def flops(shape: Shape) -> int:
    return 2 * shape["M"] * shape["N"] * shape["K"]


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    """A byte an operand's element, two an output's, and the scales."""
    m, n, k, block = shape["M"], shape["N"], shape["K"], shape.get("block", 0)
    scales = (m + -(-n // block)) * (k // block) if block else m + n
    return n * k + m * k + 4 * scales + 2 * m * n


def cutlass(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """vLLM's CUTLASS kernels, as its layers call them."""
    import vllm._custom_ops as ops

    if inputs["block"] and inputs["x"].shape[0] % 4:
        raise Unsupported("CUTLASS wants a multiple of 4 tokens beside scales by blocks, for which vLLM copies x")
    x, weight, scale = inputs["x"], inputs["weight"].t(), inputs["x_scale"]
    weight_scale = inputs["weight_scale"].t() if inputs["block"] else inputs["weight_scale"][:, None]
    if inputs["block"]:
        scale = scale.t().contiguous().t()  # as its quantising op writes them
    return lambda: ops.cutlass_scaled_mm(x, weight, scale, weight_scale, inputs["out_dtype"])
