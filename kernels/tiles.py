"""What tile choices and grids are computed from: the device's properties, small arithmetic, how a tensor's rows lie."""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from octavo.kernels.launch import INTERPRET, current_recorder


@dataclass(frozen=True)
class DeviceProperties:
    """What a tile choice may depend on."""

    name: str
    capability: tuple[int, int]
    """CUDA compute capability."""
    num_sms: int
    shared_memory: int
    """Bytes of shared memory that one block may use (opt-in limit)."""


KNOWN_DEVICES = {
    80: DeviceProperties("A100", (8, 0), 108, 166_912),
    89: DeviceProperties("L40S", (8, 9), 142, 101_376),
    90: DeviceProperties("H100", (9, 0), 132, 232_448),
}
"""A representative of each architecture that octavo is compiled for in its tests."""

_INTERPRETER = DeviceProperties("interpreter", (8, 0), 4, 101_376)


@cache
def _cuda_properties(index: int) -> DeviceProperties:
    p = torch.cuda.get_device_properties(index)
    return DeviceProperties(p.name, (p.major, p.minor), p.multi_processor_count, p.shared_memory_per_block_optin)  # type: ignore[attr-defined]


def device_properties(device: torch.device) -> DeviceProperties:
    """What tile choices for tensors on `device` see; inside `record_launches`, the device that is compiled for."""
    recorder = current_recorder()
    if recorder is not None and recorder.properties is not None:
        return recorder.properties
    if device.type == "cuda":
        return _cuda_properties(torch.cuda.current_device() if device.index is None else device.index)
    return _INTERPRETER


def chains(device: torch.device) -> bool:
    """Whether kernels on `device` can be chained: started while the kernel before them in the stream still runs.

    That is CUDA's programmatic dependent launch, from Hopper on. A kernel with `CHAINED=True` begins with
    `wait_for_previous`, ahead of which it may touch no memory that another kernel writes, and calls
    `let_next_start` once it is under way; it takes 0.5 to 1 µs off a launch that takes 2.
    """
    return not INTERPRET and torch.version.hip is None and device_properties(device).capability >= (9, 0)


@triton.jit
def wait_for_previous(CHAINED: tl.constexpr):
    """Waits until the kernel before this one in the stream has ended and its writes are visible."""
    if CHAINED:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_start(CHAINED: tl.constexpr):
    """Lets the next kernel in the stream start once all programs of this one have come here, if that one is chained.

    It comes after the wait: ahead of it several kernels lie in wait on the GPU at once, which takes add_rms_norm of one
    token from 1.4 to 1.2 µs, and that of 64 from 2.2 to 3.7. So it comes ahead only in small norms (`norm.py`), behind
    which a kernel may not take it that the one before the norm has ended, unless it waits.
    """
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()


def cdiv(a: int, b: int) -> int:
    """Ceiling division."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`, for n ≥ 1."""
    return 1 << (n - 1).bit_length()


def _merged(dims: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbouring (size, stride) dimensions that one stride walks are made one."""
    merged: list[tuple[int, int]] = []
    for size, stride in dims:
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


def row_strides(name: str, x: torch.Tensor) -> tuple[int, int, int]:
    """How to walk the rows (all but the last dimension) of `x`: `(inner rows, outer stride, inner stride)`.

    Row r starts at element `r // inner * outer_stride + r % inner * inner_stride`. Covers every tensor whose leading
    dimensions merge into at most two, such as heads cut out of a fused qkv projection. Dimensions of size 1 count like
    any other where they can, so that one token gets the strides that many tokens get, and the same compiled kernel.

    Raises:
        ValueError: the leading dimensions of `x` need three or more strides.
    """
    leading = list(zip(x.shape[:-1], x.stride()[:-1], strict=True))
    dims = _merged(leading)
    if len(dims) > 2:
        dims = _merged([(size, stride) for size, stride in leading if size != 1])
    if len(dims) > 2:
        raise ValueError(
            f"{name}: shape {tuple(x.shape)} with strides {x.stride()} needs {len(dims)} strides to walk its rows; "
            f"at most two are supported: pass {name}.contiguous()"
        )
    if not dims:
        return 1, 0, 0
    if len(dims) == 1:
        return 1, dims[0][1], 0
    return dims[1][0], dims[0][1], dims[1][1]


@triton.jit
def row_offset(row, inner, stride_outer, stride_inner):
    """Where row `row` starts, as int64, in a tensor with these `row_strides`.

    The division is in 32 bits: in 64 it takes far longer, and a grid has no more rows.
    """
    return (row // inner).to(tl.int64) * stride_outer + (row % inner).to(tl.int64) * stride_inner
