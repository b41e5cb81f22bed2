"""Launching kernels: the one place where a Triton kernel starts, and what tile choices may ask about the device.

Every launcher calls `launch(kernel, grid, *args, device=…, **constexprs)`. That keeps three things out of the op
modules: the current device (tensors on `cuda:1` while `cuda:0` is current), empty grids, and compiling without a GPU:
inside `record_launches(properties)` nothing runs, and each launch is kept as a `Launch` that `compile_launch` turns
into a binary for any target. A launcher given meta tensors there shows exactly the kernels that it would start.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import triton
from triton import knobs
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

INTERPRET: bool = knobs.runtime.interpret
"""True under `TRITON_INTERPRET=1`: kernels run on CPU tensors in Python, without bfloat16 `tl.dot` and inline asm."""


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


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


@dataclass
class _Recorder:
    properties: DeviceProperties
    launches: list[Launch] = field(default_factory=list)


_recorder: ContextVar[_Recorder | None] = ContextVar("octavo_recorder", default=None)


@contextmanager
def record_launches(properties: DeviceProperties) -> Iterator[list[Launch]]:
    """Inside, `launch` records instead of launching, and tile choices see a device with `properties`."""
    recorder = _Recorder(properties)
    token = _recorder.set(recorder)
    try:
        yield recorder.launches
    finally:
        _recorder.reset(token)


@cache
def _cuda_properties(index: int) -> DeviceProperties:
    p = torch.cuda.get_device_properties(index)
    return DeviceProperties(p.name, (p.major, p.minor), p.multi_processor_count, p.shared_memory_per_block_optin)  # type: ignore[attr-defined]


def device_properties(device: torch.device) -> DeviceProperties:
    """The properties that tile choices use for tensors on `device`."""
    recorder = _recorder.get()
    if recorder is not None:
        return recorder.properties
    if device.type == "cuda":
        return _cuda_properties(torch.cuda.current_device() if device.index is None else device.index)
    return _INTERPRETER


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    device: torch.device,
    num_warps: int = 4,
    num_stages: int = 2,
    **constexprs: Any,
) -> None:
    """Starts `kernel` over `grid` on `device`; a grid with no programs starts nothing."""
    if 0 in grid:
        return
    recorder = _recorder.get()
    if recorder is not None:
        recorder.launches.append(Launch(kernel, grid, args, constexprs, num_warps, num_stages))
    elif device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **constexprs, num_warps=num_warps, num_stages=num_stages)
    else:
        kernel[grid](*args, **constexprs, num_warps=num_warps, num_stages=num_stages)


_TYPE_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


def _signature(kernel: Any, launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Types, constants and alignment of a launch, specialised as Triton's own launcher would do it."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], Any] = {}
    values = dict(zip(kernel.arg_names, launch.args, strict=False)) | launch.constexprs
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name] = "*" + _TYPE_NAMES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            types[name] = "i1"
        elif isinstance(value, int):
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            types[name] = "fp32"
    return types, constants, attributes


def compile_launch(launch: Launch, properties: DeviceProperties) -> Any:
    """Compiles a recorded launch for a CUDA device with `properties` to Triton's `CompiledKernel`; needs no GPU."""
    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        raise RuntimeError("compile_launch needs real kernels: unset TRITON_INTERPRET")
    types, constants, attributes = _signature(kernel, launch)
    source = ASTSource(kernel, types, constants, attributes)
    major, minor = properties.capability
    target = triton.backends.compiler.GPUTarget("cuda", major * 10 + minor, 32)
    return triton.compile(
        source, target=target, options={"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    )


def cdiv(a: int, b: int) -> int:
    """Ceiling division."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`, for n ≥ 1."""
    return 1 << (n - 1).bit_length()


def row_strides(name: str, x: torch.Tensor) -> tuple[int, int, int]:
    """How to walk the rows (all but the last dimension) of `x`: `(inner rows, outer stride, inner stride)`.

    Row r starts at element `r // inner * outer_stride + r % inner * inner_stride`. Covers every tensor whose leading
    dimensions merge into at most two, such as heads cut out of a fused qkv projection.

    Raises:
        ValueError: the leading dimensions of `x` need three or more strides.
    """
    dims: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
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
