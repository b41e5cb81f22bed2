"""One way to declare an op: its schema, its reference, its Triton launcher and its fake.

Registration goes through `torch.library.Library.define` and `impl`, not `torch.library.custom_op`: behind `custom_op` a
Triton launch costs 44 µs of CPU, behind `define` + `impl` 19 µs, bare 16 µs (H100, torch 2.11). PyTorch's dispatcher is
the only switch between backends:

- the reference serves every device that has nothing better (`CompositeExplicitAutograd`);
- the Triton launcher serves `CUDA`, which is ROCm's key too;
- `cpu`, where an op has one, serves `CPU` faster than its reference does;
- with `TRITON_INTERPRET=1` the launcher serves `CPU`, so that the same tests run the kernels without a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from octavo.kernels.launch import INTERPRET

_library = torch.library.Library("octavo", "DEF")


@dataclass(frozen=True)
class Op:
    """What was registered under one name."""

    name: str
    schema: str
    reference: Callable[..., Any]
    launcher: Callable[..., Any]
    fake: Callable[..., Any]
    cpu: Callable[..., Any] | None

    def backend(self, device: torch.device | str) -> str:
        """The implementation that a call with tensors on `device` reaches: "triton", "cpu" or "reference"."""
        kind = torch.device(device).type
        if kind == "cuda":
            return "triton"
        if kind == "cpu" and INTERPRET and _interpreting:
            return "triton (interpreter)"
        return "cpu" if kind == "cpu" and self.cpu is not None else "reference"


OPS: dict[str, Op] = {}
_interpreting = True


@contextmanager
def without_interpreter() -> Iterator[None]:
    """Inside, CPU tensors reach the CPU backend even under `TRITON_INTERPRET=1` (for tests that need its speed)."""
    global _interpreting
    before, _interpreting = _interpreting, False
    try:
        yield
    finally:
        _interpreting = before


def register(
    schema: str,
    *,
    reference: Callable[..., Any],
    launcher: Callable[..., Any],
    fake: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Registers `octavo::<name>` and returns its `OpOverload`, the thing to call.

    Args:
        schema: PyTorch's function schema, the op's name first; mutated arguments carry `(a!)`.
        reference: plain torch, same arguments; correct on any device.
        launcher: allocates the outputs and launches the Triton kernel.
        fake: returns empty outputs of the right shape, dtype and strides (`None` where the op only mutates).
        cpu: an implementation for CPU tensors that is faster than the reference, where there is one.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, reference, "CompositeExplicitAutograd")
    _library.impl(name, launcher, "CUDA")
    if INTERPRET:
        plain = cpu or reference
        _library.impl(name, lambda *args: (launcher if _interpreting else plain)(*args), "CPU")
    elif cpu is not None:
        _library.impl(name, cpu, "CPU")
    torch.library.register_fake(f"octavo::{name}", fake, lib=_library)
    OPS[name] = Op(name, schema, reference, launcher, fake, cpu)
    return getattr(torch.ops.octavo, name).default


def backends(device: torch.device | str = "cpu") -> dict[str, str]:
    """Which implementation of each op a call with tensors on a device reaches.

    Args:
        device: "cpu", "cuda", "cuda:1", or a `torch.device`; it need not be present.

    Returns:
        The op's name → "triton", "cpu" (faster than the reference), "reference" or "triton (interpreter)".

    Raises:
        RuntimeError: not the name of a device.
    """
    return {name: op.backend(device) for name, op in OPS.items()}
