"""What the benchmarks of quantising ops share: which dtypes and scales are measured, and the plain formula.

A shape's `int8` is 1 for int8 and 0 for e4m3; its `group` is how many neighbours share a scale: the whole row, 128, or
0 for one scale of the whole tensor, which the fused ops are given.
"""

from collections.abc import Iterable

import torch

from octavo.bench.check import Quantized
from octavo.bench.harness import Inputs, Shape
from octavo.bench.shapes import TOKENS

GROUP = 128
FEW_TOKENS = (1, 1024, 8192)
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def fused_shapes(dimension: str, sizes: Iterable[int]) -> list[Shape]:
    """e4m3 by token at every number of tokens; by group, by a given scale, and int8 at a few."""
    return [
        {"T": tokens, dimension: size, "int8": int8, "group": group}
        for size in sizes
        for int8, group, counts in (
            (0, size, TOKENS),
            (1, size, FEW_TOKENS),
            (0, GROUP, FEW_TOKENS),
            (0, 0, FEW_TOKENS),
        )
        if group == 0 or size % group == 0
        for tokens in counts
    ]


def options(shape: Shape, width: int, device: torch.device, largest: float) -> Inputs:
    """The arguments of a fused op beside its tensors; a given scale is that of `largest`."""
    dtype = torch.int8 if shape["int8"] else torch.float8_e4m3fn
    return {
        "dtype": dtype,
        "scale": None if shape["group"] else torch.full((1,), largest / LIMITS[dtype], device=device),
        "group_size": GROUP if shape["group"] == GROUP else None,
    }


def output_bytes(shape: Shape, width: int) -> int:
    """The quantised numbers and their scales, written; a given scale, read."""
    return shape["T"] * width + 4 * (shape["T"] * width // shape["group"] if shape["group"] else 1)


def exact_quantized(values: torch.Tensor, inputs: Inputs) -> Quantized:
    """What a fused op rounds, as `inputs` say that it does."""
    parts = values.shape[-1] // inputs["group_size"] if inputs["group_size"] else 1
    return Quantized(values, inputs["dtype"], inputs["scale"], parts)


def plain_quantize(
    y: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None, group_size: int | None
) -> tuple[torch.Tensor, ...]:
    """The formula in plain torch: q, and the scales where none is given."""
    limit = LIMITS[dtype]
    groups = y.float() if scale is not None else y.float().unflatten(-1, (-1, group_size or y.shape[-1]))
    s = scale if scale is not None else groups.abs().amax(-1, keepdim=True).clamp(min=2.0**-126) / limit
    q = (groups / s).clamp(-limit, limit)
    q = (q.round() if dtype == torch.int8 else q).to(dtype)
    return (q,) if scale is not None else (q.flatten(-2), s.squeeze(-1))


def as_tuple(result: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """q alone, or q and its scales."""
    return result if isinstance(result, tuple) else (result,)
