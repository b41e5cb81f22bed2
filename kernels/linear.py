"""A dense linear layer for any number of tokens, alone or with SiLU × gate.

    y = x · weightᵀ + bias,    or with an activation    silu(y[:N / 2]) · y[N / 2:]

torch's own product is hard to beat for many tokens, and is what computes them here. For few the time is that of reading
the weights, and of the seams between kernels: `linear_few.py` is for up to 64 tokens and large layers on Hopper,
`linear_one.py` for one token on any GPU. Which it is depends on device, shapes, strides and dtype, not on values.
"""

import torch
import torch.nn.functional as F

from octavo.kernels.checks import check_linear
from octavo.kernels.launch import DEVICES, current_recorder, empty
from octavo.kernels.linear_few import MOST_TOKENS, choose_tiles, fits, linear_few, pays, takes
from octavo.kernels.linear_one import linear_one
from octavo.kernels.registry import register
from octavo.kernels.replay import replayed
from octavo.kernels.tiles import device_properties
from octavo.reference import linear as reference


@torch.compiler.assume_constant_result
def _most_tokens(device: torch.device) -> int:
    """Up to how many tokens octavo's kernels are faster there than torch's."""
    recorder = current_recorder()
    if device.type not in DEVICES and (recorder is None or recorder.properties is None):
        return 0
    hopper = torch.version.hip is None and device_properties(device).capability[0] == 9
    return MOST_TOKENS if hopper else 1


def _linear_cuda(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None, prefetch_weight: bool
) -> torch.Tensor:
    gated, properties = activation is not None, device_properties(x.device)
    (n, k), tokens = weight.shape, x.numel() // weight.shape[1]
    out = empty((*x.shape[:-1], n // 2 if gated else n), x.dtype, x.device)
    # One token's weights that may not be read ahead come faster through the cache.
    if (tokens > 1 or (tokens == 1 and prefetch_weight and pays(weight))) and takes(x, weight, gated, properties):
        tiles = choose_tiles(tokens, n, k, properties, gated=gated)
        linear_few(out, x, weight, bias, gated, prefetch_weight, tiles)
    else:
        linear_one(out, x, weight, bias, gated)
    return out


def _linear_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None, prefetch_weight: bool
) -> torch.Tensor:
    n = weight.shape[0] if activation is None else weight.shape[0] // 2
    return x.new_empty((*x.shape[:-1], n))


_linear = register(
    "linear(Tensor x, Tensor weight, Tensor? bias, str? activation, bool prefetch_weight) -> Tensor",
    reference=reference.linear,
    launcher=_linear_cuda,
    fake=_linear_fake,
)


@replayed
def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    prefetch_weight: bool = False,
) -> torch.Tensor:
    """Linear layer for any number of tokens, with SiLU × gate in the same kernel where tokens are few.

    `y[..., n] = Σₖ weight[n, k] · x[..., k] + bias[n]`; with an activation `silu(y[..., :N / 2]) · y[..., N / 2:]`

    Args:
        x: `[..., K]`, fp16, bf16 or fp32; last dimension contiguous. Each row is a token. Octavo's kernels compute one
            token on any GPU; and on Hopper up to 64 in fp16 or bf16, by at least 2²⁴ weights and 4096 outputs, where K
            and the distance of tokens are multiples of 8 (and N one of 16, with an activation). torch's product
            computes the others.
        weight: `[N, K]`, x's dtype, contiguous.
        bias: None, or `[N]`, fp16, bf16 or fp32, contiguous.
        activation: None, or "silu_and_mul": the first half of the outputs are gate, the others up, as `silu_and_mul`
            takes them. N: even.
        prefetch_weight: whether weights may be read before the kernels ahead of this one have ended, as a model's may
            be, which are there for good; it takes 1 to 6 % off a decode step's layers. Never for weights that ops of
            octavo have just computed: without it, the cache (L2) alone is told of them.

    Returns:
        `[..., N]`, or `[..., N / 2]` with an activation, contiguous, in x's dtype. Sums are fp32, and rounded once by
        octavo's kernels; behind torch's product, before the activation as well.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, stride or device that does not fit, or another activation.

    Safe in a CUDA graph. Octavo's kernels are deterministic; a row's bits depend on how many rows there are.
    """
    check_linear(x, weight, bias, activation)
    tokens, most = x.numel() // x.shape[-1], _most_tokens(x.device)
    few = tokens <= most and pays(weight) and fits(x, weight, activation is not None)
    if few or (most and tokens <= 1):
        return _linear(x, weight, bias, activation, prefetch_weight)
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return y if activation is None else torch.ops.octavo.silu_and_mul.default(y)
