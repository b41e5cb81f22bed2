"""Compiling kernels without launching them, and counting how often one is compiled.

`compile_for` compiles a recorded launch for any CUDA architecture, with or without a GPU, by Triton's own path from
arguments to binary, so that what it leaves in Triton's cache is what a launch on that architecture finds there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from octavo.kernels.descriptors import DESCRIPTORS
from octavo.kernels.launch import Launch, Pointer, compiled_kernel
from octavo.kernels.registry import OPS


class _Counter:
    """Triton's compilation listener: counts octavo's kernels, and passes on to the listener that was there before."""

    def __init__(self, before: Any) -> None:
        self.before = before
        self.compiled = 0

    def __call__(self, **event: Any) -> None:
        function = getattr(event["src"], "fn", None)
        if not event["cache_hit"] and str(getattr(function, "__module__", "")).startswith("octavo."):
            self.compiled += 1
        if self.before is not None:
            self.before(**event)


_counter = _Counter(knobs.compilation.listener)
knobs.compilation.listener = _counter


def compile_count() -> int:
    """How many of octavo's kernels this process has compiled so far; kernels found in Triton's cache do not count.

    A server that was warmed up (`warmup`) stays at one number; take the difference over the time that matters.

    Returns:
        The count since octavo was imported.

    Raises:
        RuntimeError: something has taken the place of octavo's listener at `triton.knobs.compilation.listener`, so that
            the count would be wrong; call the listener that stands there from yours.
    """
    listener = knobs.compilation.listener
    while listener is not None and listener is not _counter:
        listener = getattr(listener, "before", None)
    if listener is None:
        raise RuntimeError(
            "triton.knobs.compilation.listener was replaced, so octavo can't count compilations: keep the listener "
            "that was there in an attribute `before` of yours, and call it"
        )
    return _counter.compiled


class ToLaunchers(TorchDispatchMode):
    """Inside, octavo's ops go to their launchers on any device: with meta tensors the launches that they would do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "octavo":
            return OPS[func.__name__.split(".")[0]].launcher(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def without_memory(launch: Launch) -> Launch:
    """The launch with `Pointer`s in place of tensors, aligned as the tensors are in their storage."""

    def without(a: Any) -> Any:
        if isinstance(a, DESCRIPTORS):
            return replace(a, base=without(a.base))
        if isinstance(a, torch.Tensor):
            return Pointer(a.dtype, int(a.storage_offset()) * a.element_size() % 16)
        return a

    args = map(without, launch.args)
    return Launch(launch.kernel, launch.grid, tuple(args), launch.constexprs, launch.num_warps, launch.num_stages)


@dataclass(frozen=True)
class _Offline:
    """As much of a Triton driver as compiling takes."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return int(self.target.arch)  # JITFunctions keep what they compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _targeting(capability: tuple[int, int]) -> Iterator[None]:
    before = driver._active
    driver.set_active(_Offline(GPUTarget("cuda", capability[0] * 10 + capability[1], 32)))
    try:
        yield
    finally:
        driver._active = before


def compile_for(launch: Launch, capability: tuple[int, int]) -> Any:
    """Compiles a recorded launch for CUDA devices of a compute capability to Triton's `CompiledKernel`.

    Needs no GPU. It takes Triton's driver away for a moment, so a process that launches kernels must not call it.
    """
    if not isinstance(launch.kernel, JITFunction):
        raise RuntimeError("compiling needs real kernels: unset TRITON_INTERPRET")
    with _targeting(capability):
        args = without_memory(launch).args
        return compiled_kernel(launch.kernel, args, launch.constexprs, launch.num_warps, launch.num_stages)
