"""What the benchmarks of int4 and int8 weights share: shapes, the exact product, and providers.

A quantised weight is drawn, not computed: every provider packs the same `q` and `scale`, in its own layout, before the
clock starts. `w[n, k] = (q[n, k] − zero) · scale[k // group, n]`.
"""

from collections.abc import Callable

import torch

from octavo.bench.harness import Inputs, LeftOut, Shape
from octavo.bench.providers import PIECE, drawn, full_fp32, pack_words, wide_dtype
from octavo.bench.shapes import LLAMA_3_8B, gemm_shapes, linear_shapes

GROUP = 128


def shapes() -> list[Shape]:
    return [shape | {"group": GROUP} for shape in gemm_shapes()]


def draw(
    shape: Shape, q: torch.Tensor, zero: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    """An input set around the quantised values `q` `[N, K]`, scaled so that outputs are near 1."""
    fresh = drawn(dtype, device, generator)
    spread = q[:64].float().std().item()  # some rows tell
    scale = (torch.rand(shape["K"] // shape["group"], shape["N"], **fresh) + 0.5) / (spread * shape["K"] ** 0.5)
    x = torch.randn(shape["M"], shape["K"], **fresh)
    return {"x": x, "q": q, "zero": zero, "scale": scale, "group": shape["group"]}


def exact(inputs: Inputs) -> torch.Tensor:
    """In fp64 on a CPU, in fp32 on a GPU; some outputs at a time, so that the wide weights stay small."""
    x = inputs["x"].to(wide_dtype(inputs["x"].device))
    outputs, k = inputs["q"].shape
    out = x.new_empty(x.shape[0], outputs)
    rows = max(1, PIECE // k)
    with full_fp32():
        for start in range(0, outputs, rows):
            part = slice(start, start + rows)
            out[:, part] = x @ dequantised(inputs, part, x.dtype).t()
    return out


def dequantised(inputs: Inputs, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """Rows of w `[N, K]`, computed in `dtype`."""
    scale = inputs["scale"][:, rows].t().to(dtype).repeat_interleave(inputs["group"], 1)
    return (inputs["q"][rows].to(dtype) - inputs["zero"]) * scale


def flops(shape: Shape) -> int:
    return 2 * shape["M"] * shape["N"] * shape["K"]


def bytes_moved(shape: Shape, dtype: torch.dtype, bits: int) -> int:
    """x, the weights at their packed size, their scales, and the output."""
    m, n, k = shape["M"], shape["N"], shape["K"]
    return n * k * bits // 8 + (m * k + k // shape["group"] * n + m * n) * dtype.itemsize


def bf16_weights(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """cuBLAS with the weights dequantised beforehand, in x's dtype: what quantised weights have to beat."""
    x, q = inputs["x"], inputs["q"]
    rows = max(1, PIECE // q.shape[1])
    pieces = [dequantised(inputs, slice(start, start + rows), torch.float32) for start in range(0, q.shape[0], rows)]
    weight = torch.cat([piece.to(x.dtype) for piece in pieces])
    out = x.new_empty(x.shape[0], q.shape[0])
    return lambda: torch.mm(x, weight.t(), out=out)


def unsigned(inputs: Inputs, bits: int) -> torch.Tensor:
    """The weights as vLLM's `uint4b8` and `uint8b128` store them: from 0, with the middle for zero."""
    return (inputs["q"].to(torch.int16) - inputs["zero"] + (1 << (bits - 1))).to(torch.uint8)


def marlin(inputs: Inputs, bits: int) -> Callable[[], torch.Tensor]:
    """vLLM's Marlin, from GPTQ's layout, with the arguments that vLLM's own layer passes."""
    import vllm._custom_ops as ops
    from vllm.model_executor.layers.quantization.utils.marlin_utils import (
        marlin_make_workspace_new,
        marlin_permute_scales,
    )
    from vllm.scalar_type import scalar_types

    x, group = inputs["x"], inputs["group"]
    n, k = inputs["q"].shape
    kind = scalar_types.uint4b8 if bits == 4 else scalar_types.uint8b128
    none = torch.empty(0, dtype=torch.int32, device=x.device)
    weight = ops.gptq_marlin_repack(pack_words(unsigned(inputs, bits), bits).t().contiguous(), none, k, n, bits)
    scale = marlin_permute_scales(inputs["scale"], k, n, group)
    workspace = marlin_make_workspace_new(x.device)
    m = x.shape[0]
    return lambda: ops.marlin_gemm(
        *(x, None, weight, None, scale, None, None, None, none, none, workspace, kind, m, n, k),
        is_k_full=True,
        use_atomic_add=False,
        use_fp32_reduce=True,
    )


def conch(inputs: Inputs, bits: int) -> Callable[[], torch.Tensor]:
    """conch's mixed-precision GEMM, its output allocated beforehand."""
    from conch.kernels.quantization.gemm import mixed_precision_gemm_launcher
    from conch.ops.quantization.gemm import create_mixed_precision_metadata

    x, scale = inputs["x"], inputs["scale"]
    weight = pack_words(unsigned(inputs, bits), bits).t().contiguous()
    metadata = create_mixed_precision_metadata(
        x, weight, scale, None, weight_size_bits=bits, weight_bias=1 << (bits - 1), group_size=inputs["group"]
    )
    out = x.new_empty(x.shape[0], weight.shape[1])
    # An empty tensor for no zero points, as the launcher would allocate with each call.
    none = torch.empty(1, 0, dtype=torch.int32, device=x.device)

    def call() -> torch.Tensor:
        mixed_precision_gemm_launcher(out, x, weight, scale, none, metadata)
        return out

    return call


def machete(inputs: Inputs, bits: int) -> Callable[[], torch.Tensor]:
    """vLLM's Machete, for Hopper alone."""
    import vllm._custom_ops as ops
    from vllm.scalar_type import scalar_types

    x, scale, group = inputs["x"], inputs["scale"], inputs["group"]
    kind = scalar_types.uint4b8 if bits == 4 else scalar_types.uint8b128
    # [K / (32 / bits), N] with K contiguous, which it asks for.
    words = pack_words(unsigned(inputs, bits), bits).t()
    weight = ops.machete_prepack_B(words, x.dtype, kind, x.dtype)
    size = -1 if group == x.shape[1] else group
    return lambda: ops.machete_mm(x, weight, kind, out_type=x.dtype, b_group_scales=scale, b_group_size=size)


def gemlite(inputs: Inputs, bits: int) -> Callable[[], torch.Tensor]:
    """gemlite's layer, where it comes with tiles tuned on an H100: others it would tune first.

    Those are an 8B model's layers, with 4 bits in groups, with 8 with one scale an output.
    """
    from gemlite.helper import A16W4_HQQ_INT, A16W8_INT8

    x, q, scale = inputs["x"], inputs["q"], inputs["scale"]
    layers = {(layer["N"], layer["K"]) for layer in linear_shapes((LLAMA_3_8B,))}
    if tuple(q.shape) not in layers or (bits == 8 and len(scale) > 1):
        raise LeftOut("measured at the layers that it comes tuned for")
    scale = scale.t().reshape(-1, 1).contiguous()
    if bits == 8:
        linear = A16W8_INT8(device=x.device, dtype=x.dtype).from_weights(q, scales=scale)
    else:
        zero = torch.full_like(scale, inputs["zero"])
        linear = A16W4_HQQ_INT(device=x.device, dtype=x.dtype).from_weights(q, scale, zero)
    return lambda: linear(x)
