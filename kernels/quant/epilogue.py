"""What may follow a linear layer before its results are rounded: bias, SiLU × gate, residual.

    silu_and_mul: y = silu(gate) · up;  residual: y + residual

Outputs of gate and of up take turns, `PAIRED` at a time (`interleave_gate_up`), so that a tile has both of an output,
and with the tensor cores' layout of sums also each thread: of 8 rows, or columns, and the next 8 it holds the same
ones.
"""

import torch
import triton
import triton.language as tl

from octavo.kernels.checks import check_contiguous, check_device, check_dtype, check_shape
from octavo.reference import epilogue as reference
from octavo.reference.epilogue import PAIRED as _PAIRED

PAIRED = tl.constexpr(_PAIRED)


@triton.jit
def silu_times(gate, up):
    return gate / (1.0 + tl.exp2(-1.4426950408889634 * gate)) * up


@triton.jit
def silu_and_mul(y, TURNED: tl.constexpr):
    """Of the outputs, which are rows of y if TURNED, else columns; half as many are left."""
    ROWS: tl.constexpr = y.shape[0]
    COLS: tl.constexpr = y.shape[1]
    if TURNED:
        gate, up = y.reshape([ROWS // (2 * PAIRED), 2, PAIRED, COLS]).permute([0, 2, 3, 1]).split()
        gate, up = gate.reshape([ROWS // 2, COLS]), up.reshape([ROWS // 2, COLS])
    else:
        gate, up = y.reshape([ROWS, COLS // (2 * PAIRED), 2, PAIRED]).permute([0, 1, 3, 2]).split()
        gate, up = gate.reshape([ROWS, COLS // 2]), up.reshape([ROWS, COLS // 2])
    return silu_times(gate, up)


@triton.jit
def halves(acc):
    """The left and the right half of the columns."""
    return acc.reshape([acc.shape[0], 2, acc.shape[1] // 2]).permute([0, 2, 1]).split()


def outputs_of(n: int, activation: str | None) -> int:
    """How many numbers a token has afterwards, of n outputs."""
    return n if activation is None else n // 2


def check_epilogue(
    x: torch.Tensor,
    name: str,
    n: int,
    residual: torch.Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
) -> None:
    """Checks a linear layer's residual and activation; `name` is the argument that has its n outputs."""
    if activation is not None:
        if activation != "silu_and_mul":
            raise ValueError(f'activation: {activation!r}; expected None or "silu_and_mul"')
        if n % (2 * _PAIRED):
            raise ValueError(
                f"{name}: {n} outputs; expected a multiple of {2 * _PAIRED} beside activation, gate and up interleaved "
                "by interleave_gate_up"
            )
    if residual is not None:
        check_dtype("residual", residual, (out_dtype,))
        check_contiguous("residual", residual)
        check_device("residual", residual, "x", x)
        check_shape("residual", residual, (*x.shape[:-1], outputs_of(n, activation)), "that of the result")


def interleave_gate_up(weight: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Puts the weights of a gated feed-forward layer in the order that `activation="silu_and_mul"` takes them in.

    Eight outputs of gate are followed by the same eight of up. Meant for loading: the weights, and what belongs to each
    output beside them, are put in order once. For `int8_int8_linear` and `fp8_linear` those are weight and
    `weight_scale`, `weight_sum`, `bias`; for `int4_linear` they are q before `int4_pack` takes it, `bias`, and with
    `dim=1` scale and minimum, whose outputs are columns.

    Args:
        weight: any dtype and strides; of its dimension `dim`, 2 · F long, the first half belongs to the outputs of
            gate, the second to those of up, as merged projections have it. F: a multiple of 8.
        dim: which dimension that is.

    Returns:
        The same shape and dtype, contiguous.

    Raises:
        ValueError: weight has no dimension `dim`, or that is no multiple of 16.

    Safe in a CUDA graph.
    """
    dims = weight.dim()
    if not -dims <= dim < dims or weight.shape[dim] % (2 * _PAIRED):
        outputs = "[gate and up, ...]" if dim == 0 else f"gate and up along dimension {dim}"
        raise ValueError(
            f"weight: shape {tuple(weight.shape)}; expected {outputs}, a multiple of {2 * _PAIRED}: pad each of them "
            "with 0"
        )
    return reference.interleave_gate_up(weight, dim)
