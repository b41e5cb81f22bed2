"""Linear layer with int8 activations and int4 weights (W4A8), the weights in groups of consecutive inputs.

    y[t, n] = x_scale[t] · Σₖ x[t, k] · w[n, k] + bias[n],    w[n, k] = q[n, k] · scale[g, n] + minimum[g, n]

or w = (q - 8) · scale without a minimum, with g = k // group_size. Activations as in LLM.int8() (Dettmers et al., 2022,
https://arxiv.org/abs/2208.07339), weights as in GPTQ (Frantar et al., 2022, https://arxiv.org/abs/2210.17323), both
together as in QServe (Lin et al., 2024, https://arxiv.org/abs/2405.04532). The packed layout is described in
`octavo.kernels.quant.packing`; `octavo.kernels.quant.w4a8` computes it.
"""

import torch

from octavo.kernels.checks import FLOATS, check_contiguous, check_device, check_dtype, check_of_tokens, check_shape
from octavo.kernels.quant.packing import packed_shape
from octavo.kernels.quant.w4a8 import w4a8
from octavo.kernels.quant.weight_only import check_linear
from octavo.kernels.registry import register
from octavo.kernels.replay import replayed
from octavo.reference import w8a8 as reference


def _int4_int8_linear_cuda(
    x: torch.Tensor,
    packed: torch.Tensor,
    x_scale: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return w4a8(x, packed, x_scale, scale, minimum, bias, group_size, out_dtype)


def _int4_int8_linear_fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    x_scale: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], scale.shape[1]), dtype=out_dtype)


_int4_int8_linear = register(
    "int4_int8_linear(Tensor x, Tensor packed, Tensor x_scale, Tensor scale, Tensor? minimum, Tensor? bias, "
    "int group_size, ScalarType out_dtype) -> Tensor",
    reference=reference.int4_int8_linear,
    launcher=_int4_int8_linear_cuda,
    fake=_int4_int8_linear_fake,
)


@replayed
def int4_int8_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    x_scale: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    group_size: int,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Linear layer with int8 activations and int4 weights in groups (W4A8).

    `y[t, n] = x_scale[t] · Σₖ x[t, k] · w[n, k] + bias[n]`, where weights are `int4_linear`'s:
    `w[n, k] = q[n, k] · scale[k // group_size, n] + minimum[k // group_size, n]`, and `w = (q - 8) · scale` where
    minimum is None. `octavo.quantize_int8` makes the activations.

    Args:
        x: `[..., K]`, int8; last dimension contiguous, the others of any two strides. K: a multiple of 32.
        packed: `[ceil(N/64), ceil(K/128), 64, 32]`, int16, contiguous: `int4_pack(q)` of q `[N, K]`.
        x_scale: `[..., 1]` (or `[...]`), a scale a token; or one element, the scale of all; fp32, contiguous.
        scale: `[K / group_size, N]`, fp16, bf16 or fp32; last dimension contiguous.
        minimum: None, or the value of q = 0, as scale; -zero · scale for a zero point. Its dtype is free too.
        bias: None, or `[N]`, fp16, bf16 or fp32.
        group_size: consecutive inputs that share a scale: a multiple of 32 that divides K, K itself included.
        out_dtype: torch.bfloat16, torch.float16 or torch.float32.

    Returns:
        `[..., N]`, contiguous, in out_dtype. Sums of up to 128 inputs of a group are exact, and those of all K inputs
        (up to 65536) where they are one group without a minimum; they are scaled and added in fp32 and rounded once.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a group size, shape, stride or device that does not fit.

    Safe in a CUDA graph. Deterministic; a row's bits may depend on how many other rows and outputs there are. A minimum
    takes a kernel more, which sums the activations. https://arxiv.org/abs/2210.17323, https://arxiv.org/abs/2405.04532
    """
    groups = {"scale": scale} if minimum is None else {"scale": scale, "minimum": minimum}
    check_linear(x, groups, bias, group_size, (torch.int8,))
    check_dtype("packed", packed, (torch.int16,))
    shape = packed_shape(scale.shape[1], x.shape[-1])
    check_shape("packed", packed, shape, "[ceil(outputs/64), ceil(inputs/128), 64, 32], from int4_pack")
    check_contiguous("packed", packed)
    check_device("packed", packed, "x", x)
    check_dtype("x_scale", x_scale, (torch.float32,))
    check_contiguous("x_scale", x_scale)
    check_device("x_scale", x_scale, "x", x)
    check_of_tokens("x_scale", x_scale, x)
    if out_dtype not in FLOATS:
        raise TypeError(f"out_dtype: {out_dtype}; expected torch.float16, torch.bfloat16 or torch.float32")
    return _int4_int8_linear(x, packed, x_scale, scale, minimum, bias, group_size, out_dtype)
