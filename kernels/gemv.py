"""The product of a matrix and a vector: a linear layer for the one token that a single request decodes.

    y[n] = weight[n] · x + bias[n],    or with an activation    y[n] = silu(gate[n]) · up[n]

`linear_one.py` has the kernel. `linear` is for any number of tokens.
"""

import torch

from octavo.kernels.checks import check_linear
from octavo.kernels.launch import empty
from octavo.kernels.linear_one import linear_one
from octavo.kernels.registry import register
from octavo.kernels.replay import replayed
from octavo.reference import linear as reference


def _gemv_cuda(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> torch.Tensor:
    gated = activation is not None
    n = weight.shape[0] // 2 if gated else weight.shape[0]
    out = empty((*x.shape[:-1], n), x.dtype, x.device)
    linear_one(out, x, weight, bias, gated)
    return out


def _gemv_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> torch.Tensor:
    n = weight.shape[0] if activation is None else weight.shape[0] // 2
    return x.new_empty((*x.shape[:-1], n))


_gemv = register(
    "gemv(Tensor x, Tensor weight, Tensor? bias, str? activation) -> Tensor",
    reference=reference.linear,
    launcher=_gemv_cuda,
    fake=_gemv_fake,
)


@replayed
def gemv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, activation: str | None = None
) -> torch.Tensor:
    """Linear layer, one token at a time: for decoding a single request, whose time is that of reading the weights.

    `y[n] = Σₖ weight[n, k] · x[k] + bias[n]`; with an activation `silu(y[:N / 2]) · y[N / 2:]`

    Args:
        x: `[..., K]`, fp16, bf16 or fp32; last dimension contiguous, the others of any two strides. Each row is a
            token, for which weights are read again: from two tokens on, `linear` is faster.
        weight: `[N, K]`, x's dtype, contiguous.
        bias: None, or `[N]`, fp16, bf16 or fp32, contiguous.
        activation: None, or "silu_and_mul": the first half of the outputs are gate, the others up, as `silu_and_mul`
            takes them. N: even.

    Returns:
        `[..., N]`, or `[..., N / 2]` with an activation, contiguous, in x's dtype. Sums and what follows them are fp32
        and rounded once.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, stride or device that does not fit, or another activation.

    Safe in a CUDA graph. Deterministic; a row's bits do not depend on the other rows.
    """
    check_linear(x, weight, bias, activation)
    return _gemv(x, weight, bias, activation)
