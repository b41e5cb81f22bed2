"""What `fused_moe` accepts of weights: in each format the shapes of both, and of what belongs to them."""

import torch

from octavo.kernels.checks import FLOATS, check_contiguous, check_device, check_dtype, check_ndim, check_shape
from octavo.kernels.moe.grouped_linear import check_given, check_groups, check_weight
from octavo.kernels.quant.packing import packed_shape
from octavo.reference.w8a8 import BLOCK

BYTES = (torch.int8, torch.float8_e4m3fn)
"""Weights that are multiplied with activations quantised to the same dtype, but int8 alone."""
Maybe = torch.Tensor | None


def check_weights(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    w1_scale: Maybe,
    w2_scale: Maybe,
    w1_minimum: Maybe,
    w2_minimum: Maybe,
    weights_only: bool,
) -> None:
    """Raises TypeError or ValueError unless they fit together; x and w1's dtype and device are known to."""
    packed = w1.dtype == torch.int16
    if weights_only and not packed and w1.dtype != torch.int8:
        dtype = str(w1.dtype).removeprefix("torch.")
        raise ValueError(f"weights_only: True beside w1 of dtype {dtype}; it is for int8 weights: leave it out")
    for name, minimum in (("w1_minimum", w1_minimum), ("w2_minimum", w2_minimum)):
        if minimum is not None and not packed:
            raise ValueError(f"{name}: given beside weights that are not int4; expected None")
    if packed:
        _check_int4(x, w1, w2, w1_scale, w2_scale, w1_minimum, w2_minimum)
        return
    hidden = x.shape[1]
    check_weight("w2", w2, w1, "[experts, hidden, intermediate]", "w1")
    experts, _, intermediate = w2.shape
    check_shape("w2", w2, (experts, hidden, intermediate), "[experts, hidden, intermediate], hidden as in x")
    if intermediate == 0:
        raise ValueError(f"w2: shape {tuple(w2.shape)}; expected at least one intermediate element")
    check_weight("w1", w1, w1, "[experts, gate and up, hidden]", "w1")
    check_shape("w1", w1, (experts, 2 * intermediate, hidden), "[experts, gate and up, hidden], as w2")
    if weights_only:
        check_groups("w1_scale", w1_scale, x, experts, 2 * intermediate, hidden)
        check_groups("w2_scale", w2_scale, x, experts, hidden, intermediate)
    else:
        _check_scales(x, w1, w2, w1_scale, w2_scale)


def _check_scales(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, w1_scale: Maybe, w2_scale: Maybe) -> None:
    """Checks the scales of weights of 8 bits that activations are quantised for, and that others have none."""
    experts, hidden, intermediate = w2.shape
    for name, scale, outputs in (("w1_scale", w1_scale, 2 * intermediate), ("w2_scale", w2_scale, hidden)):
        if w1.dtype in BYTES:
            check_given(name, scale, (torch.float32,), x)
        if scale is not None and w1.dtype not in BYTES:
            raise ValueError(f"{name}: given beside weights of x's dtype; expected None")
        if scale is None:
            continue
        inputs = hidden if name == "w1_scale" else intermediate
        blocks = experts, -(-outputs // BLOCK), inputs // BLOCK
        shapes: tuple[tuple[int, ...], ...] = ((experts,), (experts, outputs))
        if inputs % BLOCK == 0 and w1.dtype == torch.float8_e4m3fn:
            shapes = (*shapes, blocks)
        if scale.shape not in shapes:
            raise ValueError(f"{name}: shape {tuple(scale.shape)}; expected one of {', '.join(map(str, shapes))}")
    if w1_scale is not None and w2_scale is not None and (w1_scale.dim() == 3) != (w2_scale.dim() == 3):
        raise ValueError(
            f"w2_scale: shape {tuple(w2_scale.shape)} beside w1_scale of shape {tuple(w1_scale.shape)}; expected "
            f"scales by blocks of {BLOCK} of both or of none"
        )


def _check_int4(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    w1_scale: Maybe,
    w2_scale: Maybe,
    w1_minimum: Maybe,
    w2_minimum: Maybe,
) -> None:
    layout = "[experts, ceil(outputs/64), ceil(inputs/128), 64, 32]: what int4_pack makes of each expert's"
    check_dtype("w2", w2, (torch.int16,))
    experts, hidden = w1.shape[0] if w1.dim() else 0, x.shape[1]
    check_ndim("w1_scale", check_given("w1_scale", w1_scale, FLOATS, x), 3, "[experts, inputs / group size, outputs]")
    intermediate = w1_scale.shape[2] // 2  # type: ignore[union-attr]
    for name, w, scale, minimum, n, k in (
        ("w1", w1, w1_scale, w1_minimum, 2 * intermediate, hidden),
        ("w2", w2, w2_scale, w2_minimum, hidden, intermediate),
    ):
        check_groups(f"{name}_scale", scale, x, experts, n, k)
        if minimum is not None:
            check_groups(f"{name}_minimum", minimum, x, experts, n, k)
            check_shape(f"{name}_minimum", minimum, scale.shape, f"that of {name}_scale")  # type: ignore[union-attr]
        check_shape(name, w, (experts, *packed_shape(n, k)), layout)
        check_contiguous(name, w)
        check_device(name, w, "x", x)
