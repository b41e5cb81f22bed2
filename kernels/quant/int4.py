"""Linear layer with int4 weights, one scale (and minimum) for each group of consecutive inputs.

    y = x · wᵀ + bias,    w[n, k] = q[n, k] · scale[g, n] + minimum[g, n],    g = k // group_size

or w = (q − 8) · scale without a minimum, as in GGUF's Q4_0 and symmetric GPTQ (Frantar et al., 2022,
https://arxiv.org/abs/2210.17323). A minimum holds the zero points of GPTQ and AWQ (minimum = −zero · scale) and GGUF's
Q4_1 and Q4_K. The packed layout is described in `octavo.kernels.quant.packing`.

The kernel multiplies the integers q − 8, which are exact in every float dtype, and applies scale and minimum to the
fp32 product, a group at a time:

    y = Σ_g scale_g · Σ_{k in g} (q_k − 8) · x_k  +  (minimum_g + 8 · scale_g) · Σ_{k in g} x_k

so no weight is ever rounded to half precision, and q − 8 keeps the two terms from cancelling. The weights are the first
operand of `tl.dot`, and tokens, however few, are the short side. fp16 and bf16 on Hopper have a kernel of their own
(`int4_hopper.py`), which does the same for few tokens and large groups, and else rounds weights once.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from octavo.kernels.checks import check_contiguous, check_device, check_dtype, check_shape
from octavo.kernels.launch import empty, launch
from octavo.kernels.quant import cpu, int4_hopper
from octavo.kernels.quant.epilogue import check_epilogue, outputs_of
from octavo.kernels.quant.packing import packed_shape
from octavo.kernels.quant.weight_only import check_linear, choose_tiles, store_outputs, token_offsets
from octavo.kernels.registry import register
from octavo.kernels.replay import replayed
from octavo.kernels.tiles import cdiv, chains, device_properties, let_next_start, row_strides, wait_for_previous
from octavo.reference import quant as reference


@triton.jit
def _add_group(acc, product, x_sum, group, rows, scale_ptr, minimum_ptr, stride_scale_group, stride_minimum_group):
    """Adds a group to acc: product `[BLOCK_N, BLOCK_M]` of its (q − 8) and x, x_sum `[32, BLOCK_M]` of x alone."""
    group = tl.cast(group, tl.int64)
    scale = tl.load(scale_ptr + group * stride_scale_group + rows).to(tl.float32)  # [BLOCK_N]
    acc += product * scale[:, None]
    if minimum_ptr is not None:
        minimum = tl.load(minimum_ptr + group * stride_minimum_group + rows).to(tl.float32)  # [BLOCK_N]
        acc += (minimum + 8 * scale)[:, None] * tl.sum(x_sum, 0)[None, :]
    return acc


@triton.jit(do_not_specialize=["M", "x_inner"])
def _int4_linear_kernel(
    # Few tokens: bound by reading the weights, half a byte each. Many: by the tensor cores. One program computes
    # BLOCK_N outputs of BLOCK_M tokens and walks all of K, a packed tile of 128 inputs a step.
    out_ptr,
    x_ptr,
    packed_ptr,
    scale_ptr,
    minimum_ptr,
    bias_ptr,
    residual_ptr,
    M,
    N,
    K,
    group_size,
    x_inner,
    stride_x_outer,
    stride_x_inner,
    stride_scale_group,
    stride_minimum_group,
    WHOLE_TILES: tl.constexpr,  # group_size is a multiple of 128, so a tile lies in one group and within K
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ACTIVATED: tl.constexpr,
    CHAINED: tl.constexpr,
):
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    first_n = tl.program_id(1).to(tl.int64) * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    rows = tl.minimum(n, N - 1)  # outputs past the last repeat it, and are never stored
    c = tl.arange(0, 32)
    tiles = tl.cdiv(K, 128)
    x_ptrs = x_ptr + token_offsets(m, M, x_inner, stride_x_outer, stride_x_inner)[None, :] + c[:, None]
    packed_ptrs = packed_ptr + (rows // 64 * tiles * 2048 + rows % 64 * 32)[:, None] + c[None, :]

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for tile in range(tiles):
        words = tl.load(packed_ptrs + tile * 2048)  # [BLOCK_N, 32]
        product = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        x_sum = tl.zeros([32, BLOCK_M], tl.float32)
        for plane in tl.static_range(4):
            k = tile * 128 + plane * 32
            if WHOLE_TILES:
                x = tl.load(x_ptrs + k)  # [32, BLOCK_M]
            else:
                x = tl.load(x_ptrs + k, mask=k < K, other=0.0)
            w = (((words >> (4 * plane)) & 15) - 8).to(x.dtype)  # [BLOCK_N, 32]
            product = tl.dot(w, x, product, input_precision="ieee")
            if minimum_ptr is not None:
                x_sum += x.to(tl.float32)
            if not WHOLE_TILES:
                # K may end before the last tile does: what is left of it adds zeros, with the last group's scale.
                group = tl.minimum(k, K - 32) // group_size
                acc = _add_group(
                    acc, product, x_sum, group, rows, scale_ptr, minimum_ptr, stride_scale_group, stride_minimum_group
                )
                product = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                x_sum = tl.zeros([32, BLOCK_M], tl.float32)
        if WHOLE_TILES:
            group = tile * 128 // group_size
            acc = _add_group(
                acc, product, x_sum, group, rows, scale_ptr, minimum_ptr, stride_scale_group, stride_minimum_group
            )
    store_outputs(out_ptr, bias_ptr, residual_ptr, acc, first_n, m, N, M, ACTIVATED)


def _int4_linear_cuda(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    prefetch_weight: bool = False,
) -> torch.Tensor:
    k, n = x.shape[-1], scale.shape[1]
    out = empty((*x.shape[:-1], outputs_of(n, activation)), x.dtype, x.device)
    m = x.numel() // k
    if int4_hopper.takes(x, packed, device_properties(x.device)):
        int4_hopper.linear(out, x, packed, scale, minimum, bias, group_size, residual, activation, prefetch_weight)
        return out
    properties = device_properties(x.device)
    tiles = choose_tiles(m, x.dtype, 4, properties)
    if residual is not None and group_size % 128 and tiles.block_m == 16 and properties.capability == (8, 0):
        tiles = replace(tiles, num_stages=2)  # with more of them a register is spilled there
    launch(
        _int4_linear_kernel,
        (cdiv(m, tiles.block_m), cdiv(n, tiles.block_n)),
        out,
        x,
        packed,
        scale,
        minimum,
        bias,
        residual,
        m,
        n,
        k,
        group_size,
        *row_strides("x", x),
        scale.stride(0),
        0 if minimum is None else minimum.stride(0),
        device=x.device,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        WHOLE_TILES=group_size % 128 == 0,
        BLOCK_N=tiles.block_n,
        BLOCK_M=tiles.block_m,
        ACTIVATED=activation is not None,
        CHAINED=chains(x.device),
    )
    return out


def _int4_linear_fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    prefetch_weight: bool = False,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], outputs_of(scale.shape[1], activation)))


_int4_linear = register(
    "int4_linear(Tensor x, Tensor packed, Tensor scale, Tensor? minimum, Tensor? bias, int group_size, "
    "Tensor? residual=None, str? activation=None, bool prefetch_weight=False) -> Tensor",
    reference=reference.int4_linear,
    launcher=_int4_linear_cuda,
    fake=_int4_linear_fake,
    cpu=cpu.int4_linear,
)


@replayed
def int4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    group_size: int,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    prefetch_weight: bool = False,
) -> torch.Tensor:
    """Linear layer with int4 weights in groups, as GPTQ, AWQ and GGUF's 4-bit types store them.

    `y = x · wᵀ + bias`, `w[n, k] = q[n, k] · scale[k // group_size, n] + minimum[k // group_size, n]`, and
    `w = (q − 8) · scale` where minimum is None.

    Args:
        x: `[..., K]`, fp16, bf16 or fp32; last dimension contiguous, the others of any two strides.
        packed: `[ceil(N/64), ceil(K/128), 64, 32]`, int16, contiguous: `int4_pack(q)` of q `[N, K]`.
        scale: `[K / group_size, N]`, fp16, bf16 or fp32, its dtype free of x's; last dimension contiguous.
        minimum: None, or the value of q = 0, as scale; −zero · scale for a zero point. Its dtype is free too.
        bias: None, or `[N]`, fp16, bf16 or fp32.
        group_size: consecutive inputs that share a scale: a multiple of 32 that divides K, K itself included.
        residual: None, or what is added to the result: its shape, in x's dtype, contiguous. It is not written.
        activation: None, or "silu_and_mul": of the outputs, gate and up in the order of `interleave_gate_up` (so are
            scale, minimum and bias), the result is `silu(gate) · up`. N: a multiple of 16.
        prefetch_weight: whether weights, scales and minima may be read before the kernels ahead of this one have ended,
            as a model's may be, which are there for good. Never for what ops of octavo have just computed.

    Returns:
        `[..., N]`, or `[..., N / 2]` with an activation, contiguous, in x's dtype. Products, sums and what
        follows them are fp32, rounded once. Weights are not rounded, but in Hopper's kernel: its scales, minima and
        weights are rounded to x's dtype where there are more than 64 tokens, a minimum, or groups that are no multiple
        of 128.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a group size, shape, stride or device that does not fit.

    Safe in a CUDA graph. Deterministic; a row's bits may depend on how many other rows and outputs there are. Fastest
    on Hopper, where x has one stride from row to row and that is a multiple of 16 bytes.
    On a CPU, weights are kept dequantised: see `octavo.kernels.quant.cpu`. https://arxiv.org/abs/2210.17323
    """
    check_linear(x, {"scale": scale} if minimum is None else {"scale": scale, "minimum": minimum}, bias, group_size)
    check_dtype("packed", packed, (torch.int16,))
    shape = packed_shape(scale.shape[1], x.shape[-1])
    check_shape("packed", packed, shape, "[ceil(outputs/64), ceil(inputs/128), 64, 32], from int4_pack")
    check_contiguous("packed", packed)
    check_device("packed", packed, "x", x)
    check_epilogue(x, "scale", scale.shape[1], residual, activation, x.dtype)
    return _int4_linear(x, packed, scale, minimum, bias, group_size, residual, activation, prefetch_weight)
