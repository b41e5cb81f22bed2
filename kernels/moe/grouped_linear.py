"""A linear layer of several experts, for rows that are sorted by expert.

    y[s] = weight[e] · x[s] + bias[e]    for offsets[e] <= s < offsets[e + 1]

`octavo.kernels.moe.grouped` computes it. https://arxiv.org/abs/2211.15841 (MegaBlocks)
"""

import torch

from octavo.kernels.checks import (
    FLOATS,
    check_contiguous,
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    check_same_dtype,
    check_shape,
)
from octavo.kernels.launch import empty
from octavo.kernels.moe.combine import add_parts
from octavo.kernels.moe.grouped import grouped, may_copy
from octavo.kernels.moe.grouped_tiles import choose_tiles, rows_of
from octavo.kernels.moe.schedule import plan_and_clear
from octavo.kernels.registry import register
from octavo.kernels.replay import replayed
from octavo.kernels.tiles import device_properties, next_power_of_2
from octavo.reference import moe as reference


def _grouped_linear_cuda(
    x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    (s, k), (experts, n, _) = x.shape, weight.shape
    out = empty((s, n), x.dtype, x.device)
    properties = device_properties(x.device)
    copied = may_copy(properties, x, weight)
    likely = next_power_of_2(s)  # choices change at powers of two, so that a warm-up meets all
    tile = rows_of(likely, experts, copied=copied)
    sizes = likely, experts, n, k, tile, properties
    tiles = choose_tiles(*sizes, gated=False, copied=copied, itemsize=x.element_size())
    plan = plan_and_clear(out, offsets, tile, tiles.tail)
    if s == 0 or n == 0:
        return out
    if tiles.parts == 1:
        grouped(out, x, weight, bias, plan, tiles, gated=False)
        return out
    parts = empty((tiles.parts, s, n), torch.float32, x.device)
    grouped(parts, x, weight, bias, plan, tiles, gated=False)
    add_parts(out, parts, offsets)
    return out


def _grouped_linear_fake(
    x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]))


_grouped_linear = register(
    "grouped_linear(Tensor x, Tensor weight, Tensor offsets, Tensor? bias) -> Tensor",
    reference=reference.grouped_linear,
    launcher=_grouped_linear_cuda,
    fake=_grouped_linear_fake,
)


def check_weight(name: str, weight: torch.Tensor, x: torch.Tensor, layout: str, x_name: str = "x") -> None:
    """Raises TypeError or ValueError unless `weight` has three dimensions, lies whole and goes with x."""
    check_same_dtype(name, weight, x_name, x)
    check_ndim(name, weight, 3, layout)
    check_contiguous(name, weight)
    check_device(name, weight, x_name, x)
    if weight.shape[0] == 0:
        raise ValueError(f"{name}: shape {tuple(weight.shape)}; expected at least one expert: {layout}")


@replayed
def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, *, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Linear layer of several experts (grouped GEMM): each row of x is multiplied by the weights of its expert.

    `y[s] = weight[e] · x[s] + bias[e]` for `offsets[e] <= s < offsets[e + 1]`; rows of no expert are 0.

    Args:
        x: `[S, K]`, fp16, bf16 or fp32, rows sorted by expert (`octavo.moe_permute`); last dimension contiguous.
        weight: `[E, N, K]`, x's dtype, contiguous. E: 1 to 512.
        offsets: `[E + 1]`, int32, contiguous, rising: where the rows of each expert begin, and where the last end.
            Values are not looked at here; rows past x's last are left out on a GPU.
        bias: None, or `[E, N]`, fp16, bf16 or fp32, contiguous.

    Returns:
        `[S, N]`, contiguous, in x's dtype. Sums are fp32 and rounded once.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, stride or device that does not fit.

    Safe in a CUDA graph, whatever the offsets are when it is replayed. Deterministic; a row's bits may depend on how
    many other rows there are. https://arxiv.org/abs/2211.15841
    """
    check_dtype("x", x, FLOATS)
    check_ndim("x", x, 2, "[rows, inputs]")
    check_last_dim_contiguous("x", x)
    if x.shape[1] == 0:
        raise ValueError(f"x: shape {tuple(x.shape)}; expected at least one input")
    check_weight("weight", weight, x, "[experts, outputs, inputs]")
    experts, n, _ = weight.shape
    check_shape("weight", weight, (experts, n, x.shape[1]), "[experts, outputs, inputs], as many inputs as x has")
    if experts > 512:
        raise ValueError(f"weight: {experts} experts; expected at most 512")
    check_dtype("offsets", offsets, (torch.int32,))
    check_shape("offsets", offsets, (experts + 1,), "[experts + 1]: where each expert's rows begin, and the last end")
    check_contiguous("offsets", offsets)
    check_device("offsets", offsets, "x", x)
    if bias is not None:
        check_dtype("bias", bias, FLOATS)
        check_shape("bias", bias, (experts, n), "[experts, outputs]")
        check_contiguous("bias", bias)
        check_device("bias", bias, "x", x)
    return _grouped_linear(x, weight, offsets, bias)
