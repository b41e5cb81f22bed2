"""Quantised linear layers on a CPU: float32 working copies, so that decoding runs at the speed of memory.

Decoding on a CPU is bound by reading the weights, and nothing in torch reads quantised ones fast there: on AVX2 its own
int4 product takes three times as long as a float32 `F.linear`, and dequantising on every call two to three times. So
each weight is dequantised at its first use, and the copy serves until

- the packed weight dies (it is held by a weak reference alone);
- it, its scale or its minimum is changed in place, replaced, or given new memory;
- another scale or minimum *tensor object* comes with it: pass the same objects in every call, not fresh views of them.

Tensors made under `torch.inference_mode()` count no changes, so changing those in place is not seen.

The copies together stay within `OCTAVO_CPU_WEIGHT_CACHE` gigabytes (10⁹ bytes; 0 for no copies; a quarter of the
physical memory where it is not set). Weights that come once it is full are dequantised on every call: a model walks its
weights in a circle, and evicting the oldest would miss each time.

One token is a product of a matrix and a vector, and `F.linear` runs that on one core. In as many parts as `bmm` has
threads to give, it takes 0.55 of the time on two (SmolLM2's layers: 18 ms against 33).
"""

import math
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch

from octavo.reference import quant as reference
from octavo.reference.epilogue import finished


@dataclass(frozen=True)
class _Copy:
    weight: torch.Tensor
    packed: weakref.ref[torch.Tensor]
    scale: torch.Tensor
    minimum: torch.Tensor | None
    stamp: list[int]


_copies: dict[int, _Copy] = {}
"""By `id` of the packed weight: its weak reference takes the entry out before the id can be anyone else's."""


def _budget() -> float:
    gigabytes = os.environ.get("OCTAVO_CPU_WEIGHT_CACHE")
    if gigabytes is not None:
        return float(gigabytes) * 1e9
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4


def _stamp(group_size: int, packed: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None) -> list[int]:
    """Differs once a tensor has been changed in place (its version) or given other memory (`Tensor.data = …`)."""
    stamp = [group_size]
    for x in (packed, scale, minimum):
        if x is not None:
            stamp += x.data_ptr(), 0 if x.is_inference() else x._version
    return stamp


def _working_copy(
    dequantize: Callable[[], torch.Tensor],
    group_size: int,
    packed: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor | None,
) -> torch.Tensor:
    """The fp32 weights, kept where the budget allows."""
    key, stamp = id(packed), _stamp(group_size, packed, scale, minimum)
    copy = _copies.get(key)
    if copy is not None and copy.scale is scale and copy.minimum is minimum and copy.stamp == stamp:
        return copy.weight
    _copies.pop(key, None)  # before the new one is made, so that the two are never held at once
    del copy
    weight = dequantize()
    # Threads that miss together may pass the budget by a weight each; nothing else here can go wrong under the GIL.
    if sum(c.weight.nbytes for c in list(_copies.values())) + weight.nbytes <= _budget():
        reference_to_packed = weakref.ref(packed, lambda _: _copies.pop(key, None))
        _copies[key] = _Copy(weight, reference_to_packed, scale, minimum, stamp)
    return weight


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    n, k = weight.shape
    threads = torch.get_num_threads()
    parts = math.gcd(n, 4 * threads)
    if x.numel() != k or threads == 1 or parts == 1:
        return reference.linear(x, weight, bias)
    y = torch.bmm(x.float().view(1, 1, k).expand(parts, 1, k), weight.view(parts, -1, k).transpose(1, 2))
    return (y.view(*x.shape[:-1], n) if bias is None else y.view(*x.shape[:-1], n) + bias.float()).to(x.dtype)


def int4_linear(
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
    def dequantize() -> torch.Tensor:
        return reference.dequantize_int4(packed, scale, minimum, group_size)

    y = _linear(x.float(), _working_copy(dequantize, group_size, packed, scale, minimum), bias)
    return finished(y, None, residual, activation, x.dtype)


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    prefetch_weight: bool = False,
) -> torch.Tensor:
    def dequantize() -> torch.Tensor:
        return reference.dequantize_int8(weight, scale, group_size)

    return _linear(x, _working_copy(dequantize, group_size, weight, scale, None), bias)
