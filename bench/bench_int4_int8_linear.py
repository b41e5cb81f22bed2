"""Linear layer with int8 activations and int4 weights in groups of 128 (W4A8), a scale a token.

Bound by the weights' bytes at few tokens, by the tensor cores at many. The dtype that rows are kept under is the
activations'; scales and outputs are bf16. Activations are not quantised inside the timing.
"""

from collections.abc import Callable

import torch

import octavo
from octavo.bench import weight_only
from octavo.bench.harness import Inputs, Provider, Shape
from octavo.bench.providers import pack_words

OP = "int4_int8_linear"
DTYPES = (torch.int8,)

shapes = weight_only.shapes
flops = weight_only.flops


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    """Scaled so that outputs are near 1; fp32 outputs where `dtype` asks for them."""
    m, n, k = shape["M"], shape["N"], shape["K"]
    q = torch.randint(0, 16, (n, k), generator=generator, device=device, dtype=torch.uint8)
    out_dtype = dtype if dtype == torch.float32 else torch.bfloat16
    return weight_only.draw(shape, q, 8, out_dtype, device, generator) | {
        "x": torch.randint(-127, 128, (m, k), generator=generator, device=device, dtype=torch.int8),
        "x_scale": (torch.rand(m, 1, generator=generator, device=device) + 0.5) / 73,
        "out_dtype": out_dtype,
    }


def exact(inputs: Inputs) -> torch.Tensor:
    return weight_only.exact(inputs) * inputs["x_scale"]


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    """A nibble a weight, a byte an activation, four its scale; two a weight's scale and an output."""
    m, n, k = shape["M"], shape["N"], shape["K"]
    return n * k // 2 + m * k + 4 * m + 2 * (k // shape["group"] * n + m * n)


def _octavo(inputs: Inputs) -> Callable[[], torch.Tensor]:
    args = {name: inputs[name] for name in ("x", "x_scale", "scale", "out_dtype")}
    packed, group = octavo.int4_pack(inputs["q"]), inputs["group"]
    return lambda: octavo.int4_int8_linear(packed=packed, group_size=group, **args)


def _plain_x(inputs: Inputs) -> Inputs:
    """With activations as a layer that does not quantise them has them."""
    return inputs | {"x": (inputs["x"] * inputs["x_scale"]).to(inputs["out_dtype"])}


def _int4_linear(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """octavo's own W4A16: what quantising the activations has to beat."""
    x, scale, group = _plain_x(inputs)["x"], inputs["scale"], inputs["group"]
    packed = octavo.int4_pack(inputs["q"])
    return lambda: octavo.int4_linear(x, packed, scale, group_size=group)


def _marlin(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """vLLM's Marlin with int8 activations, from GPTQ's layout: scales are integers of 16 bits beside one factor."""
    import vllm._custom_ops as ops
    from vllm.model_executor.layers.quantization.utils.marlin_utils import (
        marlin_act_int8_process_scales,
        marlin_make_workspace_new,
        marlin_permute_scales,
    )
    from vllm.scalar_type import scalar_types

    x, group = inputs["x"], inputs["group"]
    (n, k), m = inputs["q"].shape, x.shape[0]
    none = torch.empty(0, dtype=torch.int32, device=x.device)
    words = pack_words(weight_only.unsigned(inputs, 4), 4).t().contiguous()
    weight = ops.gptq_marlin_repack(words, none, k, n, 4, is_a_8bit=True)
    scale = marlin_permute_scales(inputs["scale"], k, n, group, is_a_8bit=True)
    scale, factor = marlin_act_int8_process_scales(scale)
    x_scale = inputs["x_scale"] * factor
    workspace = marlin_make_workspace_new(x.device)
    return lambda: ops.marlin_gemm(
        *(x, None, weight, None, scale, x_scale, None, None, none, none, workspace, scalar_types.uint4b8, m, n, k),
        is_k_full=True,
        use_atomic_add=False,
        use_fp32_reduce=True,
    )


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch (bf16 weights)": Provider(
        lambda i: weight_only.bf16_weights(_plain_x(i)), devices=("cpu", "cuda"), package="torch"
    ),
    "octavo int4_linear": Provider(_int4_linear, package="octavo"),
    "marlin (int8 activations)": Provider(_marlin, "vllm", package="vllm"),
}
