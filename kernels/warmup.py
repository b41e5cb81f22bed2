"""Compiling ahead everything that a model needs, so that no request waits for the compiler.

`warmup` takes calls of octavo's functions on meta tensors, finds out which kernels those calls would start (nothing is
started, no memory is taken), compiles them in parallel processes into Triton's cache on disk, and, where the GPU is
here, loads them into this process. A server that does this before it reports ready compiles nothing while it serves:
`octavo.compile_count()` stays where it is.
"""

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import torch

from octavo.kernels.compilation import ToLaunchers, compile_count, compile_for, without_memory
from octavo.kernels.launch import (
    INTERPRET,
    Launch,
    compiled_kernel,
    launch_key,
    ready_kernel,
    record_launches,
    starter,
)
from octavo.kernels.starts import plan_type
from octavo.kernels.tiles import KNOWN_DEVICES, DeviceProperties, device_properties

MAX_PROCESSES = 16


@dataclass(frozen=True)
class WarmKernel:
    """One kernel variant that `warmup` made ready."""

    name: str
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    seconds: float
    """What compiling it took, or finding it in the cache."""
    compiled: bool
    """False where Triton's cache had it already."""


@dataclass(frozen=True)
class WarmupReport:
    """What `warmup` did, slowest kernel first; `print` it for a summary."""

    kernels: tuple[WarmKernel, ...]
    seconds: float
    """Wall-clock time of it all."""
    processes: int

    def __str__(self) -> str:
        compiled = [k for k in self.kernels if k.compiled]
        lines = [
            f"{len(self.kernels)} kernels ready in {self.seconds:.1f} s: {len(compiled)} compiled "
            f"({sum(k.seconds for k in compiled):.1f} s of work in {self.processes} processes), "
            f"{len(self.kernels) - len(compiled)} found in the cache"
        ]
        for k in compiled[:10]:
            values = ", ".join(f"{name}={value}" for name, value in k.constexprs.items())
            lines.append(f"  {k.seconds:6.2f} s  {k.name}  {values}, {k.num_warps} warps, {k.num_stages} stages")
        if len(compiled) > 10:
            lines.append(f"  and {len(compiled) - 10} quicker ones")
        return "\n".join(lines)


def warmup(
    calls: Iterable[Callable[[], Any]],
    *,
    device: torch.device | str | None = None,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> WarmupReport:
    """Compiles ahead the kernels that calls on meta tensors would start, without starting any.

    `warmup([lambda: octavo.silu_and_mul(torch.empty(1, 28672, dtype=torch.bfloat16, device="meta"))])`

    Args:
        calls: each is called once, without arguments, and calls functions of octavo (and of torch) on meta tensors
            that have the shapes, strides and dtypes of the work to come. `octavo.model_calls` lists those of a Llama,
            Mistral or Mixtral model. The number of tokens matters only where a tile choice depends on it.
        device: "cuda" (the default), "cuda:1" and so on: the kernels are compiled for it and loaded. Without a GPU,
            "sm_80", "sm_89" or "sm_90": compiled for an A100, an L40S or an H100 into Triton's cache, which can be
            shipped (the folder `TRITON_CACHE_DIR`).
        processes: how many compile at a time; by default one a CPU core, up to 16. They are started when the first
            kernel that Triton's cache lacks has been compiled; with 1, and on ROCm, this process compiles them all
            (without a GPU, one other does).
        progress: called with (kernels done, kernels in all), from one thread at a time.

    Returns:
        What was compiled, what was found in Triton's cache, and how long it took.

    Raises:
        ValueError: a device that is not known or not here, or fewer than one process.
        RuntimeError: a kernel does not compile, or the process that compiled it died.

    Another process then finds everything in Triton's cache; it loads a kernel at its first call, or by a warmup of its
    own, in milliseconds each. Under `TRITON_INTERPRET=1` there is nothing to compile, and nothing is done.
    """
    began = time.perf_counter()
    if processes is None:
        processes = min(len(os.sched_getaffinity(0)), MAX_PROCESSES)
    if processes < 1:
        raise ValueError(f"processes: {processes}; expected at least 1")
    target, properties = _target(device)
    launches = _launches(calls, properties)
    done = 0
    lock = threading.Lock()

    def advance() -> None:
        nonlocal done
        with lock:
            done += 1
            if progress is not None:
                progress(done, len(launches))

    kernels: list[WarmKernel] = []
    alone = processes == 1 or torch.version.hip is not None
    if target is not None:
        for launch in launches:
            kernels.append(_timed(launch, partial(_load, launch, target)))
            advance()
            if kernels[-1].compiled and not alone:
                break
    rest = launches[len(kernels) :]
    processes = min(processes, len(rest))
    if rest:
        kernels += _compile_in_processes(rest, properties.capability, processes, advance)
        if target is not None:
            for launch in rest:
                _load(launch, target)
    if target is not None:
        plan_type()  # what repeats calls is compiled ahead too
    kernels.sort(key=lambda k: -k.seconds)
    return WarmupReport(tuple(kernels), time.perf_counter() - began, max(processes, 1))


def _target(device: torch.device | str | None) -> tuple[torch.device | None, DeviceProperties]:
    """The device to load on, if there is one, and the properties to compile for."""
    architectures = {f"sm_{arch}": properties for arch, properties in KNOWN_DEVICES.items()}
    if isinstance(device, str) and device in architectures:
        return None, architectures[device]
    expected = f'expected "cuda", "cuda:<index>", {", ".join(architectures)}'
    try:
        target = torch.device("cuda" if device is None else device)
    except RuntimeError:
        raise ValueError(f"device: {device!r}; {expected}") from None
    if target.type != "cuda":
        raise ValueError(f"device: {device!r}; {expected}")
    if (target.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: {device!r}, but this machine has {torch.cuda.device_count()} GPUs; to compile without one, name "
            f"the architecture: {', '.join(architectures)}"
        )
    target = torch.device("cuda", torch.cuda.current_device() if target.index is None else target.index)
    return target, device_properties(target)


def _launches(calls: Iterable[Callable[[], Any]], properties: DeviceProperties) -> list[Launch]:
    """One launch of each compiled kernel that the calls need."""
    if INTERPRET:
        return []
    with record_launches(properties) as recorded, torch.no_grad(), ToLaunchers():
        for call in calls:
            call()
    distinct: dict[Any, Launch] = {}
    for launch in map(without_memory, recorded):
        key = launch_key(launch.kernel, 0, launch.args, launch.constexprs, launch.num_warps, launch.num_stages)
        distinct.setdefault(key, launch)
    return list(distinct.values())


def _load(launch: Launch, device: torch.device) -> None:
    """Makes the launch ready on the device, in this process."""
    args = launch.args, launch.constexprs, launch.num_warps, launch.num_stages
    with torch.cuda.device(device):
        if starter is not None:
            ready_kernel(launch.kernel, device.index, *args)
        else:
            compiled_kernel(launch.kernel, *args)


def _timed(launch: Launch, compile: Callable[[], Any]) -> WarmKernel:
    before, began = compile_count(), time.perf_counter()
    compile()
    seconds, compiled = time.perf_counter() - began, compile_count() > before
    name = launch.kernel.__name__
    return WarmKernel(name, launch.constexprs, launch.num_warps, launch.num_stages, seconds, compiled)


def _compile_in_processes(
    launches: list[Launch], capability: tuple[int, int], processes: int, advance: Callable[[], None]
) -> list[WarmKernel]:
    """Compiles each launch in some worker; one thread here serves each worker."""
    jobs: SimpleQueue[Launch] = SimpleQueue()
    for launch in launches:
        jobs.put(launch)
    kernels: list[WarmKernel] = []
    failures: list[BaseException] = []

    def serve() -> None:
        try:
            with _Worker() as worker:
                while not failures:
                    kernels.append(worker.ask(jobs.get_nowait(), capability))
                    advance()
        except Empty:
            pass
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return kernels


class _Worker:
    """A process that compiles one launch after the other, as `work` does."""

    def __enter__(self) -> "_Worker":
        # Not multiprocessing: its spawned children run the caller's main module again. Answers have a pipe of their
        # own, since anything may print.
        answers, answering = os.pipe()
        code = f"import sys; sys.path[:] = {sys.path!r}; from octavo.kernels.warmup import work; work({answering})"
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=2, env=environment, pass_fds=(answering,)
        )
        os.close(answering)
        self.answers = os.fdopen(answers, "rb")
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.answers.close()

    def ask(self, launch: Launch, capability: tuple[int, int]) -> WarmKernel:
        """Has one launch compiled."""
        assert self.process.stdin is not None
        function = launch.kernel.fn
        where = function.__module__, function.__name__
        job = (*where, launch.args, launch.constexprs, launch.num_warps, launch.num_stages)
        try:
            pickle.dump((job, capability), self.process.stdin)
            self.process.stdin.flush()
            answer = pickle.load(self.answers)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            raise RuntimeError(f"the process that compiled {function.__name__} died; its output is above") from None
        if isinstance(answer, str):
            raise RuntimeError(f"{function.__name__} does not compile with {launch.constexprs}:\n{answer}")
        return answer


def work(answering: int) -> None:
    """A worker's life: jobs from stdin; `WarmKernel`s, or what went wrong, to a pipe."""
    with os.fdopen(answering, "wb") as answers:
        while True:
            try:
                (module, name, *rest), capability = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            __import__(module)
            launch = Launch(getattr(sys.modules[module], name), (1,), *rest)
            try:
                answer: WarmKernel | str = _timed(launch, partial(compile_for, launch, capability))
            except Exception as error:
                answer = f"{type(error).__name__}: {error}"
            pickle.dump(answer, answers)
            answers.flush()
