"""What `plan.c` is told of a kernel's start: the kernel, its grid, and of each of its parameters what it is."""

import struct
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import triton

from octavo.kernels.descriptors import Encodings
from octavo.kernels.launch import Launch, in_three, tensor_of

_INTEGERS = {f"{sign}{bits}": bits // 8 for sign in "iu" for bits in (8, 16, 32, 64)} | {"i1": 1}
"""Triton's name of an integer type → its bytes."""
_MAP_BYTES = 128


def _module() -> Any:
    """`plan.c`, compiled by the compiler that Triton needs as well, and kept in Triton's cache."""
    from triton.runtime.build import compile_module_from_src

    include = Path(triton.__file__).parent / "backends/nvidia/include"
    source = (Path(__file__).parent / "plan.c").read_text(encoding="utf-8")
    return compile_module_from_src(source, "plan", include_dirs=[str(include)])


@cache
def plan_type() -> Callable[..., Any] | None:
    """`plan.c`'s type; None where there is no driver for it, or, with a warning, where it can't be compiled."""
    try:
        module = _module()
    except Exception as error:
        warnings.warn(f"octavo: calls cost more CPU time, because plan.c was not compiled: {error}", stacklevel=2)
        return None
    return module.Plan if module.has_driver else None


def start_of(launch: Launch, where: dict[int, int]) -> tuple[Any, ...] | None:
    """What `plan.c` takes for a launch that was started directly; None where it has no way to start it.

    Args:
        where: id of a tensor that has elements → its number among the plan's.
    """
    assert launch.ready is not None
    compiled, metas = launch.ready.compiled, iter(launch.ready.descriptors)
    warps, programs_of_cluster, shared = compiled.packed_metadata[:3]
    if programs_of_cluster != 1 or compiled.run.launch_cooperative_grid:
        return None
    parameters: list[tuple[int, int, int, Any]] = []  # bytes, number of the tensor or -1, the number, encodings
    # The constexprs come behind the arguments.
    for kind, value in zip(compiled.src.signature.values(), launch.args, strict=False):
        if kind == "constexpr":
            continue
        if kind.startswith("tensordesc"):
            meta, tensor = next(metas), where.get(id(tensor_of(value)))
            if meta is None or tensor is None:
                return None
            parameters.append((_MAP_BYTES, tensor, 0, Encodings(value, meta)))
            parameters += [(4, -1, size & 0xFFFFFFFF, None) for size in value.shape]
            parameters += [(8, -1, stride & 0xFFFFFFFFFFFFFFFF, None) for stride in value.strides]
        elif kind.startswith("*"):
            parameters.append((8, where.get(id(value), -1), 0, None))  # without elements: a null pointer
        elif kind in _INTEGERS:
            parameters.append((_INTEGERS[kind], -1, int(value) & 0xFFFFFFFFFFFFFFFF, None))
        elif kind in ("fp32", "f32"):
            parameters.append((4, -1, int.from_bytes(struct.pack("<f", value), "little"), None))
        else:
            return None
    chained = bool(compiled.run.launch_pdl)
    return compiled.function, in_three(launch.grid), warps, shared, chained, tuple(parameters)
