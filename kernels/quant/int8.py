"""Linear layer with int8 weights, one scale for each group of consecutive inputs or for a whole output row.

    y = x · wᵀ + bias,    w[n, k] = q[n, k] · scale[k // group_size, n]

GGUF's Q8_0 has groups of 32, per-channel checkpoints one group of all K inputs (Dettmers et al., LLM.int8(), 2022,
https://arxiv.org/abs/2208.07339, section 2). The integers are exact in every float dtype and go into the product as
they are; the scale is applied to the fp32 sums, so no weight is rounded to half precision. As in
`octavo.kernels.quant.int4`, the weights are the first operand of `tl.dot`. fp16 and bf16 on Hopper have a kernel of
their own (`int8_hopper.py`), which does the same with one scale an output, and for few tokens with groups of a multiple
of 128; else it rounds weights once.
"""

import torch
import triton
import triton.language as tl

from octavo.kernels.checks import check_contiguous, check_device, check_dtype, check_shape
from octavo.kernels.launch import empty, launch
from octavo.kernels.quant import cpu, int4_hopper, int8_hopper
from octavo.kernels.quant.weight_only import check_linear, choose_tiles, store_outputs, token_offsets
from octavo.kernels.registry import register
from octavo.kernels.replay import replayed
from octavo.kernels.tiles import cdiv, chains, device_properties, let_next_start, row_strides, wait_for_previous
from octavo.reference import quant as reference


@triton.jit(do_not_specialize=["M", "x_inner"])
def _int8_linear_kernel(
    # Few tokens: bound by reading the weights, a byte each. Many: by the tensor cores. One program computes BLOCK_N
    # outputs of BLOCK_M tokens and walks all of K; a step of BLOCK_K inputs lies in one group.
    out_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    M,
    N,
    K,
    group_size,
    x_inner,
    stride_x_outer,
    stride_x_inner,
    stride_scale_group,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHAINED: tl.constexpr,
):
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    first_n = tl.program_id(1).to(tl.int64) * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    rows = tl.minimum(n, N - 1)  # outputs past the last repeat it, and are never stored
    c = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + token_offsets(m, M, x_inner, stride_x_outer, stride_x_inner)[None, :] + c[:, None]
    weight_ptrs = weight_ptr + rows[:, None] * K + c[None, :]

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in range(0, K, BLOCK_K):
        w = tl.load(weight_ptrs + k)  # [BLOCK_N, BLOCK_K]
        x = tl.load(x_ptrs + k)  # [BLOCK_K, BLOCK_M]
        group = tl.cast(k // group_size, tl.int64)
        scale = tl.load(scale_ptr + group * stride_scale_group + rows).to(tl.float32)
        acc += tl.dot(w.to(x.dtype), x, input_precision="ieee") * scale[:, None]
    store_outputs(out_ptr, bias_ptr, None, acc, first_n, m, N, M, False)


def _int8_linear_cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    prefetch_weight: bool = False,
) -> torch.Tensor:
    n, k = weight.shape
    out = empty((*x.shape[:-1], n), x.dtype, x.device)
    m = x.numel() // k
    properties = device_properties(x.device)
    if int4_hopper.takes(x, weight, properties):
        int8_hopper.linear(out, x, weight, scale, bias, group_size, prefetch_weight)
        return out
    tiles = choose_tiles(m, x.dtype, 8, properties)
    launch(
        _int8_linear_kernel,
        (cdiv(m, tiles.block_m), cdiv(n, tiles.block_n)),
        out,
        x,
        weight,
        scale,
        bias,
        m,
        n,
        k,
        group_size,
        *row_strides("x", x),
        scale.stride(0),
        device=x.device,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        BLOCK_N=tiles.block_n,
        BLOCK_M=tiles.block_m,
        BLOCK_K=max(size for size in (32, 64, 128) if group_size % size == 0),
        CHAINED=chains(x.device),
    )
    return out


def _int8_linear_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    prefetch_weight: bool = False,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_int8_linear = register(
    "int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int group_size, "
    "bool prefetch_weight=False) -> Tensor",
    reference=reference.int8_linear,
    launcher=_int8_linear_cuda,
    fake=_int8_linear_fake,
    cpu=cpu.int8_linear,
)


@replayed
def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    group_size: int,
    prefetch_weight: bool = False,
) -> torch.Tensor:
    """Linear layer with int8 weights in groups, or with one scale an output; x stays in floating point.

    `y = x · wᵀ + bias`, `w[n, k] = weight[n, k] · scale[k // group_size, n]`.

    Args:
        x: `[..., K]`, fp16, bf16 or fp32; last dimension contiguous, the others of any two strides.
        weight: `[N, K]`, int8, contiguous; all 256 values are accepted.
        scale: `[K / group_size, N]`, fp16, bf16 or fp32, its dtype free of x's; last dimension contiguous.
        bias: None, or `[N]`, fp16, bf16 or fp32.
        group_size: consecutive inputs that share a scale: a multiple of 32 that divides K; K for a scale an output.
        prefetch_weight: whether weights and scales may be read before the kernels ahead of this one have ended, as a
            model's may be, which are there for good. Never for what ops of octavo, as `quantize_int8`, have just
            computed.

    Returns:
        `[..., N]`, contiguous, in x's dtype. Products and sums are fp32, rounded once. Weights are not rounded, but in
        Hopper's kernel, where they and their scales are rounded to x's dtype if groups are smaller than K and there are
        more than 64 tokens, or groups are no multiple of 128.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a group size, shape, stride or device that does not fit.

    Safe in a CUDA graph. Deterministic; a row's bits may depend on how many other rows and outputs there are. Fastest
    on Hopper, where x has one stride from row to row and that is a multiple of 16 bytes.
    On a CPU, weights are kept dequantised: see `octavo.kernels.quant.cpu`. https://arxiv.org/abs/2208.07339
    """
    check_linear(x, {"scale": scale}, bias, group_size)
    check_dtype("weight", weight, (torch.int8,))
    check_shape("weight", weight, (scale.shape[1], x.shape[-1]), "[outputs, inputs]")
    check_contiguous("weight", weight)
    check_device("weight", weight, "x", x)
    return _int8_linear(x, weight, scale, bias, group_size, prefetch_weight)
