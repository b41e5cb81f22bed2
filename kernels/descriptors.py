"""What the copy engine reads (TMA), in the form that a kernel takes it: 128 bytes, then the shape and the strides.

Triton encodes each descriptor at each start, in a Python function around the C function that starts the kernel, which
with three of them took 10 of a call's 25 µs on an H100's host. What comes of it depends on nothing but the tensor's
address, shape, strides and dtype and on the box to be copied, so a call that is repeated keeps it by address.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

DESCRIPTORS = (TensorDescriptor, GluonDescriptor)
"""What a launcher gives a kernel for a tensor that it reads by TMA."""
_MAX_ADDRESSES = 256
"""Of one argument of one plan: a cache has an address a layer, and what torch allocates comes back to a few places."""


class At:
    """Stands for a tensor of which the address alone counts."""

    def __init__(self, address: int) -> None:
        self.data_ptr = lambda: address


def descriptors_of(compiled: Any, args: Sequence[Any]) -> tuple[Any, ...]:
    """Of each descriptor among a compiled kernel's arguments, what encoding it takes; None where it needs none."""
    count = sum(isinstance(a, DESCRIPTORS) for a in args)
    return tuple(getattr(compiled.metadata, "tensordesc_meta", None) or [None] * count)


def behind_encoding(start: Callable[..., None]) -> Callable[..., None] | None:
    """The C function that Triton's function with the encoding calls; None where this version has it elsewhere."""
    return inspect.getclosurevars(start).nonlocals.get("launcher")


def encoded(described: Any, meta: Any) -> tuple[Any, ...]:
    """What the C function takes for a descriptor."""
    from triton.backends.nvidia.driver import make_tensordesc_arg  # a machine without NVIDIA's backend comes this far

    return tuple(make_tensordesc_arg(described, meta))


class Encodings(dict[int, tuple[Any, int]]):
    """A descriptor encoded for other tensors of the same shape, strides and alignment, by their address.

    Encoded is Triton's object, with the address of the 128 bytes that the copy engine reads.
    """

    def __init__(self, described: Any, meta: Any) -> None:
        # Without the tensor, which would stay alive; its shape and strides are not looked at again.
        self._described, self._meta = object.__new__(type(described)), meta
        self._described.__dict__.update(described.__dict__)
        self._described.base = None

    def __missing__(self, address: int) -> tuple[Any, int]:
        if len(self) >= _MAX_ADDRESSES:
            self.clear()
        described = object.__new__(type(self._described))  # of this thread alone
        described.__dict__.update(self._described.__dict__)
        described.base = At(address)
        # The tensor map lies at the end of Triton's object, which is kept here and where it is in use.
        (kept, *_) = encoded(described, self._meta)
        self[address] = values = kept, id(kept) + type(kept).__basicsize__ - 128
        return values
