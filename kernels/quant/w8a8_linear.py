"""Linear layers whose activations and weights are both quantised, a byte each: int8, and fp8 (e4m3).

    y = (x · x_scale) · (weight · weight_scale)ᵀ + bias

What may follow a layer is done as its results are written: SiLU × gate, of the two projections of a feed-forward layer
in one, and adding the residual.

One scale a token and one an output, or one for all: Dettmers et al., LLM.int8() (2022),
https://arxiv.org/abs/2208.07339, section 2; Micikevicius et al., "FP8 Formats for Deep Learning" (2022),
https://arxiv.org/abs/2209.05433. One for 1×128 activations and for 128×128 weights: DeepSeek-V3 (2024),
https://arxiv.org/abs/2412.19437, section 3.3. `octavo.kernels.quant.w8a8` computes them.
"""

import torch

from octavo.kernels.checks import (
    FLOATS,
    check_contiguous,
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    check_of_tokens,
    check_shape,
)
from octavo.kernels.quant.epilogue import check_epilogue, outputs_of
from octavo.kernels.quant.w8a8 import w8a8
from octavo.kernels.registry import register
from octavo.kernels.replay import replayed
from octavo.reference import w8a8 as reference
from octavo.reference.w8a8 import BLOCK, in_blocks

MAX_INPUTS = 65536
"""So many products of int8 numbers less a zero point, 255 · 128 at most, are below 2³¹ in sum."""


def _int8_int8_linear_cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_zero: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    out_dtype: torch.dtype,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    scales = x_scale, weight_scale
    return w8a8(x, weight, *scales, bias, x_zero, weight_sum, residual, activation, out_dtype, True)


def _fp8_linear_cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    fast_accum: bool,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    return w8a8(x, weight, x_scale, weight_scale, bias, None, None, residual, activation, out_dtype, fast_accum)


def _int8_int8_linear_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_zero: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    out_dtype: torch.dtype,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], outputs_of(weight.shape[0], activation)), dtype=out_dtype)


def _fp8_linear_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    fast_accum: bool,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], outputs_of(weight.shape[0], activation)), dtype=out_dtype)


_int8_int8_linear = register(
    "int8_int8_linear(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor? bias, Tensor? x_zero, "
    "Tensor? weight_sum, ScalarType out_dtype, Tensor? residual=None, str? activation=None) -> Tensor",
    reference=reference.int8_int8_linear,
    launcher=_int8_int8_linear_cuda,
    fake=_int8_int8_linear_fake,
)
_fp8_linear = register(
    "fp8_linear(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor? bias, ScalarType out_dtype, "
    "bool fast_accum, Tensor? residual=None, str? activation=None) -> Tensor",
    reference=reference.fp8_linear,
    launcher=_fp8_linear_cuda,
    fake=_fp8_linear_fake,
)


def _check_beside_x(name: str, values: torch.Tensor, dtypes: tuple[torch.dtype, ...], x: torch.Tensor) -> None:
    check_dtype(name, values, dtypes)
    check_contiguous(name, values)
    check_device(name, values, "x", x)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> None:
    """Checks what both layers have in common, except which scales they take."""
    check_dtype("x", x, (dtype,))
    check_last_dim_contiguous("x", x)
    k = x.shape[-1] if x.dim() else 0
    if k == 0 or k % 16:
        raise ValueError(
            f"x: shape {tuple(x.shape)}; expected a last dimension that is a multiple of 16: pad it with 0"
        )
    check_dtype("weight", weight, (dtype,))
    check_ndim("weight", weight, 2, "[outputs, inputs]")
    n = weight.shape[0]
    check_shape("weight", weight, (n, k), "[outputs, inputs]")
    check_contiguous("weight", weight)
    check_device("weight", weight, "x", x)
    _check_beside_x("x_scale", x_scale, (torch.float32,), x)
    _check_beside_x("weight_scale", weight_scale, (torch.float32,), x)
    if bias is not None:
        _check_beside_x("bias", bias, FLOATS, x)
        check_shape("bias", bias, (n,), "[outputs]")
    if out_dtype not in FLOATS:
        raise TypeError(f"out_dtype: {out_dtype}; expected torch.float16, torch.bfloat16 or torch.float32")
    check_epilogue(x, "weight", n, residual, activation, out_dtype)


def _check_scales(x: torch.Tensor, x_scale: torch.Tensor, weight_scale: torch.Tensor, n: int, blocks: str) -> None:
    """One number for all weights or one an output, and one for all tokens or one a token."""
    if weight_scale.numel() != 1 and weight_scale.shape not in ((n,), (n, 1)):
        raise ValueError(
            f"weight_scale: shape {tuple(weight_scale.shape)}; expected one element, or {(n,)}: one for each "
            f"output{blocks}"
        )
    check_of_tokens("x_scale", x_scale, x)


@replayed
def int8_int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    x_zero: torch.Tensor | None = None,
    weight_sum: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """Linear layer with int8 activations and int8 weights (W8A8); `octavo.quantize_int8` makes the activations.

    `y[t, n] = (Σₖ (x[t, k] - x_zero[t]) · weight[n, k]) · x_scale[t] · weight_scale[n] + bias[n]`.

    Args:
        x: `[..., K]`, int8; last dimension contiguous, the others of any two strides. K: a multiple of 16, to 65536.
        weight: `[N, K]`, int8, contiguous.
        x_scale: `[..., 1]` (or `[...]`), a scale a token; or one element, the scale of all; fp32, contiguous.
        weight_scale: `[N]` or `[N, 1]`, a scale an output; or one element; fp32, contiguous.
        bias: None, or `[N]`, fp16, bf16 or fp32, contiguous.
        x_zero: None, or what stands for 0 in x (asymmetric quantisation): `[..., 1]` (or `[...]`) or one element,
            int32, from -128 to 127.
        weight_sum: beside x_zero, and only there: `[N]`, int32, `weight.sum(1, dtype=torch.int32)`, computed once.
        out_dtype: torch.bfloat16, torch.float16 or torch.float32.
        residual: None, or what is added to the result: its shape, in out_dtype, contiguous. It is not written.
        activation: None, or "silu_and_mul": of the outputs, gate and up in the order of `interleave_gate_up` (so are
            weight_scale, weight_sum and bias), the result is `silu(gate) · up`. N: a multiple of 16.

    Returns:
        `[..., N]`, or `[..., N / 2]` with an activation, contiguous, in out_dtype. The sums are exact; all that follows
        them is fp32 and rounded once.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, stride or device that does not fit, or one of x_zero and weight_sum without the other.

    Safe in a CUDA graph. Deterministic; a row's bits do not depend on the other rows. https://arxiv.org/abs/2208.07339
    """
    _check(x, weight, x_scale, weight_scale, bias, residual, activation, torch.int8, out_dtype)
    n, k = weight.shape
    if k > MAX_INPUTS:
        raise ValueError(f"x: {k} inputs; expected at most {MAX_INPUTS}, whose products fit int32 in sum")
    _check_scales(x, x_scale, weight_scale, n, "")
    if (x_zero is None) != (weight_sum is None):
        given, missing = ("x_zero", "weight_sum") if weight_sum is None else ("weight_sum", "x_zero")
        raise ValueError(f"{missing}: None beside {given}; expected both (weight.sum(1, dtype=torch.int32)) or neither")
    if x_zero is not None and weight_sum is not None:
        _check_beside_x("x_zero", x_zero, (torch.int32,), x)
        check_of_tokens("x_zero", x_zero, x)
        _check_beside_x("weight_sum", weight_sum, (torch.int32,), x)
        check_shape("weight_sum", weight_sum, (n,), "[outputs]")
    zeros = x_zero, weight_sum
    return _int8_int8_linear(x, weight, x_scale, weight_scale, bias, *zeros, out_dtype, residual, activation)


@replayed
def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    fast_accum: bool = True,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """Linear layer with activations and weights in fp8, e4m3 (W8A8); `octavo.quantize_fp8` makes the activations.

    `y[t, n] = (Σₖ x[t, k] · weight[n, k]) · x_scale[t] · weight_scale[n] + bias[n]`, or with scales by blocks
    `y[t, n] = Σₖ x[t, k] · x_scale[t, k // 128] · weight[n, k] · weight_scale[n // 128, k // 128] + bias[n]`.

    Args:
        x: `[..., K]`, float8_e4m3fn; last dimension contiguous, the others of any two strides. K: a multiple of 16.
        weight: `[N, K]`, float8_e4m3fn, contiguous.
        x_scale: `[..., 1]` (or `[...]`), a scale a token; or one element, the scale of all; beside weights in blocks,
            `[..., K / 128]`, from `quantize_fp8(x, granularity="group")`. fp32, contiguous.
        weight_scale: `[N]` or `[N, 1]`, a scale an output; or one element; or `[ceil(N / 128), K / 128]`, one for
            128 × 128 weights. fp32, contiguous.
        bias: None, or `[N]`, fp16, bf16 or fp32, contiguous.
        out_dtype: torch.bfloat16, torch.float16 or torch.float32.
        fast_accum: whether the tensor cores may keep sums over all of K, as in `torch._scaled_mm`. Hopper's keep 14
            bits of an fp8 product's sum; without, and always with few tokens or scales by blocks, they are taken out
            and added up in fp32 every 128 inputs. Looked at by no other GPU.
        residual: None, or what is added to the result: its shape, in out_dtype, contiguous. It is not written.
        activation: None, or "silu_and_mul": of the outputs, gate and up in the order of `interleave_gate_up` (so are
            weight_scale and bias), the result is `silu(gate) · up`. N: a multiple of 16; not beside scales by blocks.

    Returns:
        `[..., N]`, or `[..., N / 2]` with an activation, contiguous, in out_dtype. All that follows the sums is fp32
        and rounded once.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, stride or device that does not fit, and a GPU before sm_89, which has no e4m3.

    Safe in a CUDA graph. Deterministic; a row's bits may depend on how many other rows there are.
    https://arxiv.org/abs/2209.05433, https://arxiv.org/abs/2412.19437
    """
    _check(x, weight, x_scale, weight_scale, bias, residual, activation, torch.float8_e4m3fn, out_dtype)
    n, k = weight.shape
    if in_blocks(weight, weight_scale):
        if k % BLOCK:
            raise ValueError(f"x: {k} inputs; expected a multiple of {BLOCK} beside weight_scale by blocks")
        check_shape("x_scale", x_scale, (*x.shape[:-1], k // BLOCK), "[..., inputs / 128], as weight_scale's blocks")
        if activation is not None:
            raise ValueError(
                f"activation: {activation!r} beside weight_scale by blocks, whose outputs can't be interleaved; "
                "expected None: call silu_and_mul on the result"
            )
    else:
        blocks = f", or {(-(-n // BLOCK), -(-k // BLOCK))}: one for {BLOCK} by {BLOCK} weights"
        _check_scales(x, x_scale, weight_scale, n, blocks)
    return _fp8_linear(x, weight, x_scale, weight_scale, bias, out_dtype, fast_accum, residual, activation)
