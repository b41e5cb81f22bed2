"""A linear layer of several experts, for rows that are sorted by expert.

    y[s] = weight[e] · x[s] + bias[e]    for offsets[e] <= s < offsets[e + 1]

Weights may be int8 in groups, as those of `octavo.kernels.quant.int8`. `octavo.kernels.moe.grouped` computes it.
https://arxiv.org/abs/2211.15841 (MegaBlocks)
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
from octavo.kernels.debug import assert_offsets
from octavo.kernels.launch import empty
from octavo.kernels.moe.combine import add_parts
from octavo.kernels.moe.grouped import grouped, may_copy
from octavo.kernels.moe.grouped_tiles import Scales, Tiles, choose_int8, choose_tiles, rows_of, rows_of_plain
from octavo.kernels.moe.schedule import plan_and_clear
from octavo.kernels.quant.int8_tiles import scales_of_step
from octavo.kernels.registry import register
from octavo.kernels.replay import replayed
from octavo.kernels.tiles import device_properties, next_power_of_2
from octavo.reference import moe as reference


def most_rows(copied: bool, *groups: tuple[int, int]) -> int:
    """Rows of a tile of int8 weights alone; `groups`: inputs and group size. Several scales a step take registers."""
    return 64 if copied and all(scales_of_step(*sizes) <= 2 for sizes in groups) else 32


def _choose(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, rows: int) -> Tiles:
    """Tiles for that many rows."""
    (experts, n, k), properties = weight.shape, device_properties(x.device)
    copied = may_copy(properties, x, weight)
    if scale is not None:
        group_size = k // scale.shape[1]
        tile = rows_of(rows, experts, copied=copied, most=most_rows(copied, (k, group_size)))
        sizes = rows, experts, n, k, tile, properties
        itemsize = x.element_size()
        return choose_int8(*sizes, gated=False, copied=copied, itemsize=itemsize, group_size=group_size)
    tile = rows_of_plain(rows, experts, copied=copied)
    sizes = rows, experts, n, k, tile, properties
    return choose_tiles(*sizes, gated=False, copied=copied, itemsize=x.element_size())


def _grouped_linear_cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    s, n = x.shape[0], weight.shape[1]
    out = empty((s, n), x.dtype, x.device)
    tiles = _choose(x, weight, scale, next_power_of_2(s))  # they change at powers of two, so that a warm-up meets all
    plan = plan_and_clear(out, offsets, tiles.rows, tiles.tail)
    if s == 0 or n == 0:
        return out
    if tiles.parts == 1:
        grouped(out, x, weight, bias, plan, tiles, gated=False, scales=Scales(weight=scale))
        return out
    parts = empty((tiles.parts, s, n), torch.float32, x.device)
    grouped(parts, x, weight, bias, plan, tiles, gated=False, scales=Scales(weight=scale))
    add_parts(out, parts, offsets)
    return out


def _grouped_linear_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]))


_grouped_linear = register(
    "grouped_linear(Tensor x, Tensor weight, Tensor offsets, Tensor? bias, Tensor? scale=None) -> Tensor",
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


def check_given(
    name: str, scale: torch.Tensor | None, dtypes: tuple[torch.dtype, ...], x: torch.Tensor
) -> torch.Tensor:
    """Raises TypeError or ValueError unless quantised weights have scales of these dtypes; returns them."""
    if scale is None:
        raise ValueError(f"{name}: None beside quantised weights; expected their scales")
    check_dtype(name, scale, dtypes)
    check_contiguous(name, scale)
    check_device(name, scale, "x", x)
    return scale


def check_groups(name: str, scale: torch.Tensor | None, x: torch.Tensor, experts: int, n: int, k: int) -> None:
    """Checks the scales, or minima, of weights alone."""
    scale = check_given(name, scale, FLOATS, x)
    check_ndim(name, scale, 3, "[experts, inputs / group size, outputs]")
    groups = scale.shape[1]
    if groups == 0 or k % groups or k // groups % 32:
        raise ValueError(f"{name}: {groups} groups of {k} inputs; expected a group size, a multiple of 32")
    check_shape(name, scale, (experts, groups, n), "[experts, groups, outputs]")


@replayed
def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Linear layer of several experts (grouped GEMM): each row of x is multiplied by the weights of its expert.

    `y[s] = weight[e] · x[s] + bias[e]` for `offsets[e] <= s < offsets[e + 1]`; rows of no expert are 0.

    Args:
        x: `[S, K]`, fp16, bf16 or fp32, rows sorted by expert (`octavo.moe_permute`); last dimension contiguous.
        weight: `[E, N, K]`, x's dtype or int8, contiguous. E: 1 to 512.
        offsets: `[E + 1]`, int32, contiguous, rising: where the rows of each expert begin, and where the last end.
            Rows that x has not are left out; values are looked at under `OCTAVO_DEBUG=1` alone
            (`octavo.kernels.debug`).
        bias: None, or `[E, N]`, fp16, bf16 or fp32, contiguous.
        scale: None, or beside int8 weights `[E, K / group size, N]`, fp16, bf16 or fp32, contiguous, with groups of a
            multiple of 32 inputs, up to all: `w[e, n, k] = weight[e, n, k] · scale[e, k // group_size, n]`, as in
            `octavo.int8_linear`.

    Returns:
        `[S, N]`, contiguous, in x's dtype. Sums are fp32 and rounded once; int8 weights as in `octavo.int8_linear`.

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
    check_dtype("weight", weight, (x.dtype, torch.int8))
    check_device("weight", weight, "x", x)
    check_weight("weight", weight, weight, "[experts, outputs, inputs]", "x")
    experts, n, _ = weight.shape
    check_shape("weight", weight, (experts, n, x.shape[1]), "[experts, outputs, inputs], as many inputs as x has")
    if experts > 512:
        raise ValueError(f"weight: {experts} experts; expected at most 512")
    check_dtype("offsets", offsets, (torch.int32,))
    check_shape("offsets", offsets, (experts + 1,), "[experts + 1]: where each expert's rows begin, and the last end")
    check_contiguous("offsets", offsets)
    check_device("offsets", offsets, "x", x)
    assert_offsets("offsets", offsets, x.shape[0])
    if bias is not None:
        check_dtype("bias", bias, FLOATS)
        check_shape("bias", bias, (experts, n), "[experts, outputs]")
        check_contiguous("bias", bias)
        check_device("bias", bias, "x", x)
    if weight.dtype == torch.int8:
        check_groups("scale", scale, x, experts, n, x.shape[1])
    elif scale is not None:
        raise ValueError("scale: given beside weights of x's dtype; expected None")
    return _grouped_linear(x, weight, offsets, bias, scale)
