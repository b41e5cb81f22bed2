"""The one layout of int4 weights in octavo, made once when a model is loaded.

Weights q `[N, K]` of 0..15 become int16 words `[ceil(N/64), ceil(K/128), 64, 32]`: tiles of 64 output rows × 128
inputs, each 4 KiB in one piece. The word at (row, c) of a tile holds in its nibble j the weight of that row and of the
tile's input c + 32·j:

    bits       15…12     11…8      7…4       3…0
    input      c + 96    c + 64    c + 32    c

So each of a tile's four nibble planes is 32 consecutive inputs: the K side of a matrix product that needs no shuffle,
and a whole group at group size 32, the smallest in use. Rows beyond N and inputs beyond K are 0.
"""

import torch

from octavo.kernels.checks import check_dtype, check_ndim, check_shape
from octavo.kernels.tiles import cdiv
from octavo.reference import quant as reference

TILE_N = 64
TILE_K = 128
PLANE = 32
"""Consecutive inputs in one nibble plane of a tile; K and every group size are multiples of it."""


def packed_shape(n: int, k: int) -> tuple[int, int, int, int]:
    """The shape of `[n, k]` int4 weights once packed."""
    return cdiv(n, TILE_N), cdiv(k, TILE_K), TILE_N, PLANE


def _check_inputs(k: int) -> None:
    if k <= 0 or k % PLANE:
        raise ValueError(f"k: {k} inputs; expected a positive multiple of {PLANE}")


def int4_pack(q: torch.Tensor) -> torch.Tensor:
    """Packs int4 weights into the tiles that `int4_linear` reads.

    Args:
        q: `[N, K]`, uint8 of 0 to 15, any strides; K a positive multiple of 32, N any.

    Returns:
        `[ceil(N/64), ceil(K/128), 64, 32]`, int16, on q's device. The layout is in this module's docstring.

    Raises:
        TypeError: q is not uint8.
        ValueError: q has other than two dimensions, a K that is no multiple of 32, or a value above 15.

    Meant for loading: it reads the largest value back from the device, so it can't be captured in a CUDA graph.
    """
    check_dtype("q", q, (torch.uint8,))
    check_ndim("q", q, 2, "[outputs, inputs]")
    n, k = q.shape
    _check_inputs(k)
    if n and not q.is_meta and q.amax() > 15:
        raise ValueError(f"q: the largest value is {int(q.amax())}; expected 0 to 15")
    rows, tiles = packed_shape(n, k)[:2]
    padded = torch.nn.functional.pad(q, (0, tiles * TILE_K - k, 0, rows * TILE_N - n))
    planes = padded.view(rows, TILE_N, tiles, 4, PLANE).transpose(1, 2).to(torch.int16)
    words = planes[..., 0, :] | planes[..., 1, :] << 4 | planes[..., 2, :] << 8 | planes[..., 3, :] << 12
    return words.contiguous()


def int4_unpack(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """The exact inverse of `int4_pack`.

    Args:
        packed: `[ceil(n/64), ceil(k/128), 64, 32]`, int16.
        n, k: outputs and inputs of the weights.

    Returns:
        `[n, k]`, uint8 of 0 to 15, contiguous, on packed's device.

    Raises:
        TypeError: packed is not int16.
        ValueError: k is no positive multiple of 32, or packed's shape does not fit n and k.

    Safe in a CUDA graph.
    """
    check_dtype("packed", packed, (torch.int16,))
    _check_inputs(k)
    check_shape("packed", packed, packed_shape(n, k), "[ceil(n/64), ceil(k/128), 64, 32], from int4_pack")
    return reference.int4_unpack(packed, n, k)
