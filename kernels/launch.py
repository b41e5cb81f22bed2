"""Launching kernels: the one place where a Triton kernel starts.

Every launcher allocates its outputs with `empty(…)` and starts its kernels with `launch(kernel, grid, *args, device=…,
**constexprs)`. That keeps out of the op modules: the current device (tensors on `cuda:1` while `cuda:0` is current),
empty grids, compiling without a GPU (`octavo.kernels.warmup`), repeating a call cheaply (`octavo.kernels.replay`), and
the cost of Triton's own launch, which is what most of this module is about.

`kernel[grid](…)` costs 17 µs of CPU on an H100's host, most of it spent on finding out again which compiled kernel fits
these arguments. `launch` keeps the compiled kernels itself, by (kernel, device, constexprs, and of each argument what
Triton compiles differently for: dtype and 16-byte alignment of a pointer; width, divisibility by 16 and being 1 of an
integer), and calls the C function behind `CompiledKernel.run` with addresses in place of tensors: 4 µs. That function's
arguments are Triton's private business, so this is done for the versions in `_STARTERS` alone; with any other version,
on another backend than CUDA, and while a launch hook is set (Proton, or a user's), Triton launches as usual.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import RLock
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.runtime.jit import JITFunction

from octavo.kernels.descriptors import DESCRIPTORS, behind_encoding, descriptors_of, encoded

INTERPRET: bool = knobs.runtime.interpret
"""True under `TRITON_INTERPRET=1`: kernels run on CPU tensors in Python, without bfloat16 `tl.dot` and inline asm."""


DEVICES = {"cuda"}
"""Types of devices whose kernels are started directly; ROCm's GPUs carry CUDA's name, but have no starter."""

Grid = tuple[int, int, int]
Args = Sequence[Any]


class Ready(NamedTuple):
    """A compiled kernel, loaded on one device, and what starting it takes."""

    start: Callable[..., None]
    """The C function."""
    middle: tuple[Any, ...]
    """What it wants between the stream and the kernel's arguments; the layout is the version's."""
    descriptors: tuple[Any, ...]
    """Of each TensorDescriptor among the arguments, what encoding it takes."""
    compiled: Any
    """Triton's own object, so that it stays loaded."""


@dataclass(frozen=True)
class Pointer:
    """What compiling needs to know of a tensor: it stands for one among the arguments where nothing is started."""

    dtype: torch.dtype
    address: int = 0
    """Any number that is aligned as the tensor will be."""

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True)
class Launch:
    """One recorded launch; `ready` is None where it was not started directly."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    ready: Ready | None = None

    @property
    def pointers(self) -> int:
        """How many of the arguments are pointers, or descriptors of what the copy engine reads; they come first."""
        for count, value in enumerate(self.args):
            if value is not None and not isinstance(value, (torch.Tensor, *DESCRIPTORS)):
                return count
        return len(self.args)


@dataclass
class Recorder:
    """What the launchers did while it was current: every launch, and every tensor that they allocated."""

    properties: Any = None
    """The device that is compiled for; then nothing is started. None: launches are started as well as recorded."""
    launched: bool = False
    """Whether a launcher came as far as `launch`, be it with an empty grid."""
    launches: list[Launch] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)


_recorder: ContextVar[Recorder | None] = ContextVar("octavo_recorder", default=None)
current_recorder = _recorder.get


@contextmanager
def recording(recorder: Recorder) -> Iterator[Recorder]:
    """Inside, in this thread, launchers report to `recorder`."""
    token = _recorder.set(recorder)
    try:
        yield recorder
    finally:
        _recorder.reset(token)


@contextmanager
def record_launches(properties: Any) -> Iterator[list[Launch]]:
    """Inside, `launch` records instead of launching, and tile choices see a device with `properties`.

    It is for launchers; public ops reach theirs with meta tensors inside `octavo.kernels.compilation.ToLaunchers`.
    """
    with recording(Recorder(properties)) as recorder:
        yield recorder.launches


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Contiguous memory for an output or a workspace; the only tensors that a launcher makes."""
    out = torch.empty(shape, dtype=dtype, device=device)
    recorder = _recorder.get()
    if recorder is not None:
        recorder.outputs.append(out)
    return out


# Triton 3.6 builds a C function for each signature, which takes the kernel's arguments one by one; 3.7 has one for all,
# which takes them as a sequence. Both take integers for pointers, and skip the arguments that are constexpr.


class Starter(NamedTuple):
    """How a version's C function is called: `start(*grid, stream, *middle, …)`, then the kernel's arguments."""

    middle: Callable[[Any], tuple[Any, ...]]
    one_sequence: bool
    """Whether the kernel's arguments are one argument, a tuple of them."""


def _middle_3_6(compiled: Any) -> tuple[Any, ...]:
    run = compiled.run
    options = compiled.function, run.launch_cooperative_grid, run.launch_pdl
    return *options, None, None, compiled.packed_metadata, None, None, None


def _middle_3_7(compiled: Any) -> tuple[Any, ...]:
    run = compiled.run
    options = compiled.function, run.launch_cooperative_grid, run.launch_pdl, compiled.packed_metadata
    return *options, None, None, None, None, None, run.arg_annotations, run.kernel_signature


_STARTERS = {"3.6": Starter(_middle_3_6, one_sequence=False), "3.7": Starter(_middle_3_7, one_sequence=True)}
starter = None if torch.version.hip else _STARTERS.get(".".join(triton.__version__.split(".")[:2]))
"""For the Triton that is running; None where kernels are not started directly."""

# Taken from torch.cuda and Triton's driver once, because going through them costs half a microsecond a launch.
current_device = getattr(torch._C, "_cuda_getDevice", None)
current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
"""The CUDA stream, as an integer, that is current in this thread on the device of the given index."""


def is_current(index: int) -> bool:
    """Whether the CUDA device of that index is this thread's current one."""
    return current_device() == index  # type: ignore[misc]


_runtime = knobs.runtime


def hooked() -> bool:
    """Whether Triton's launch hooks are set, which only its own launch calls."""
    try:
        return bool(_runtime.launch_enter_hook.calls or _runtime.launch_exit_hook.calls)
    except AttributeError:  # a plain function in place of Triton's chain of them
        return True


_ready: dict[tuple[Any, ...], Ready | None] = {}
_specialized: dict[int, tuple[bool, ...]] = {}
_preparing = RLock()  # Triton's hooks may call ops in turn


def _class_of(value: Any, specialize: bool) -> Any:
    """What of an argument decides which compiled kernel fits."""
    if isinstance(value, (torch.Tensor, Pointer)):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, DESCRIPTORS):
        return value.base.dtype, *value.block_shape, getattr(value, "layout", None)
    if type(value) is int:
        wide = not -(2**31) <= value < 2**31
        return (wide, value % 16 == 0, value == 1) if specialize else wide
    return type(value)


def launch_key(
    kernel: Any, index: int, args: tuple[Any, ...], constexprs: dict[str, Any], num_warps: int, num_stages: int
) -> tuple[Any, ...]:
    """What two launches share when one compiled kernel serves both."""
    specialized = _specialized.get(id(kernel))
    if specialized is None:
        specialized = tuple(not p.do_not_specialize for p in kernel.params)
        _specialized[id(kernel)] = specialized
    classes = tuple(map(_class_of, args, specialized))
    return id(kernel), index, num_warps, num_stages, tuple(constexprs.values()), classes


def _options(constexprs: dict[str, Any], num_warps: int, num_stages: int) -> dict[str, Any]:
    """What Triton's own launch takes by name."""
    chained = {"launch_pdl": True} if constexprs.get("CHAINED") else {}
    limited = {"maxnreg": constexprs["REGISTERS"]} if constexprs.get("REGISTERS") else {}
    return dict(num_warps=num_warps, num_stages=num_stages, **chained, **limited, **constexprs)


_settled: set[int] = set()


def _settle(kernel: Any) -> None:
    """Has Triton compute the cache keys of the functions that a kernel calls before the kernel's own.

    Else a key depends on which kernels were looked at before: Triton notes a callee's constexpr globals in it only if
    the callee's own key is known already. Then two processes would not find each other's kernels in the cache.
    """
    if id(kernel) in _settled or not isinstance(kernel, JITFunction):  # the interpreter's have no key
        return
    _settled.add(id(kernel))
    for name in kernel.fn.__code__.co_names:
        callee = kernel.fn.__globals__.get(name)
        if isinstance(callee, JITFunction):
            _settle(callee)
    _ = kernel.cache_key


def compiled_kernel(kernel: Any, args: Args, constexprs: dict[str, Any], num_warps: int, num_stages: int) -> Any:
    """Triton's `CompiledKernel` for these arguments on its current device, found or compiled; nothing is started."""
    _settle(kernel)
    return kernel.run(*args, grid=(1,), warmup=True, **_options(constexprs, num_warps, num_stages))


def _prepare(kernel: Any, args: Args, constexprs: dict[str, Any], num_warps: int, num_stages: int) -> Ready | None:
    """Loads the kernel for these arguments on the current device; None where it can't be started directly."""
    compiled = compiled_kernel(kernel, args, constexprs, num_warps, num_stages)
    if compiled is None or starter is None:
        return None
    run = compiled.run  # loads it
    if not hasattr(run, "launch"):
        run()  # it could not be loaded before, and raises that error again
    start, descriptors = run.launch, descriptors_of(compiled, args)
    if descriptors:
        start = behind_encoding(start)
    if start is None or run.global_scratch_size or run.profile_scratch_size:
        return None
    return Ready(start, starter.middle(compiled), descriptors, compiled)


def ready_kernel(
    kernel: Any,
    index: int,
    args: tuple[Any, ...],
    constexprs: dict[str, Any],
    num_warps: int,
    num_stages: int,
) -> Ready | None:
    """The compiled kernel for these arguments on the current device, whose index is given; compiled at the first call.

    Nothing is started, so tensors may be given as `Pointer`s.
    """
    key = launch_key(kernel, index, args, constexprs, num_warps, num_stages)
    try:
        return _ready[key]
    except KeyError:
        pass
    with _preparing:  # threads that need a kernel at the same time compile it once
        if key not in _ready:
            _ready[key] = _prepare(kernel, args, constexprs, num_warps, num_stages)
        return _ready[key]


def tensor_of(pointer: Any) -> torch.Tensor | None:
    """The tensor that a pointer argument stands for: itself, or what a descriptor describes."""
    return pointer.base if isinstance(pointer, DESCRIPTORS) else pointer


def in_three(grid: tuple[int, ...]) -> Grid:
    """The grid with all three of its dimensions."""
    return (*grid, 1, 1)[:3]  # type: ignore[return-value]


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    device: torch.device,
    num_warps: int = 4,
    num_stages: int = 2,
    **constexprs: Any,
) -> None:
    """Starts `kernel` over `grid` on `device`; a grid with no programs starts nothing.

    `args` are the kernel's arguments in order: pointers first (tensors or None), then numbers; ahead of both what the
    copy engine reads, if anything, as TensorDescriptors, Triton's or Gluon's. Its constexprs, by name, come last in its
    signature. One named CHAINED says that the kernel waits by itself for the one before it
    (`octavo.kernels.tiles.chains`); one named REGISTERS limits a thread's registers, where it is not 0.
    """
    recorder = _recorder.get()
    if recorder is not None:
        recorder.launched = True
    if 0 in grid:
        return
    if recorder is not None and recorder.properties is not None:
        recorder.launches.append(Launch(kernel, grid, args, constexprs, num_warps, num_stages))
        return
    if device.type == "cuda" and not is_current(device.index):
        with torch.cuda.device(device):
            launch(kernel, grid, *args, device=device, num_warps=num_warps, num_stages=num_stages, **constexprs)
        return
    ready = None
    if starter is not None and device.type in DEVICES and not hooked():
        ready = ready_kernel(kernel, device.index, args, constexprs, num_warps, num_stages)
    if ready is None:
        _settle(kernel)
        kernel[grid](*args, **_options(constexprs, num_warps, num_stages))
    else:
        described = len(ready.descriptors)  # they come first
        copied = (value for of in zip(args[:described], ready.descriptors, strict=True) for value in encoded(*of))
        values = *copied, *(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args[described:])
        values += (None,) * len(constexprs)
        stream = current_stream(device.index)  # type: ignore[misc]
        last = (values,) if starter.one_sequence else values  # type: ignore[union-attr]
        ready.start(*in_three(grid), stream, *ready.middle, *last)
    if recorder is not None:
        recorder.launches.append(Launch(kernel, grid, args, constexprs, num_warps, num_stages, ready))
