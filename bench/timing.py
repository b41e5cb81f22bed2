"""Time, and nothing else: how long one call takes when its inputs are not in the cache.

On a GPU the calls of one provider are captured into a CUDA graph that walks through the input sets, and the graph's
replay is timed by events, so neither Python nor launches are part of it. A short spin ahead of the first event keeps
the GPU busy until the whole graph is queued. Results of a walk stay alive until the next one, so that the outputs
rotate as the inputs do. On a CPU a loop over the sets is timed by the clock.

Providers take turns, one replay each, and begin each round with another one: a drift of the clocks meets all of them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

Call = Callable[[], Any]

REPLAY_S = 3e-3  # what one timed replay takes, at least: thousands of times what the events resolve
CPU_ROUND_S = 2e-3
MAX_CALLS = 10_000  # kernels in one graph
MAX_SETS = 512
NOISY = 1.05  # p80 / p20 from which a pass is repeated
SPIN_HZ = 2.0e9  # `torch.cuda._sleep` counts clock cycles; at a lower clock the spin is longer, which does no harm


@dataclass(frozen=True)
class Times:
    """Microseconds of one call over the rounds."""

    median_us: float
    p20_us: float
    p80_us: float

    @property
    def spread(self) -> float:
        """1 where every round took the same."""
        return self.p80_us / max(self.p20_us, 1e-9)


class Timer(Protocol):
    """Something that can be timed once more; `note` says what is unusual about it."""

    note: str

    def run(self) -> float:
        """Microseconds of one call."""
        ...

    def result(self) -> Any:
        """What was computed from the first input set, last."""
        ...


def storage_bytes(values: Any) -> int:
    """Bytes that the tensors in nested dicts, lists and tuples hold, shared storage counted once."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in flatten(values))}.values())


def flatten(values: Any) -> list[torch.Tensor]:
    """The tensors in nested dicts, lists and tuples, in order."""
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, Mapping):
        return [t for v in values.values() for t in flatten(v)]
    if isinstance(values, list | tuple):
        return [t for v in values for t in flatten(v)]
    return []


def sets_wanted(touched: int, held: int, device: torch.device) -> int:
    """How many input sets to rotate.

    Args:
        touched: bytes that one call reads and writes; the sets together touch four times the L2 cache: what a
            call writes where it has read is counted twice.
        held: bytes that one set occupies; the sets together take at most a quarter of the free memory.

    At least 2 (1 where memory forbids it), at most 512: calls that touch less than 100 kB all fit in a 50 MB cache.
    """
    if device.type != "cuda":
        return 2
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    wanted = min(max(2, -(-4 * l2 // max(touched, 1))), MAX_SETS)
    return max(1, min(wanted, free // 4 // max(held, 1)))


class GraphTimer:
    """Replays of a CUDA graph of `calls`, repeated until a replay takes `REPLAY_S`."""

    note = ""

    def __init__(self, calls: Sequence[Call]) -> None:
        # A graph knows addresses alone: what a call made for itself (packed weights, a peer's output) must outlive it.
        self._alive = list(calls)
        _warm_up(calls)
        walk, self._result = _capture(calls, len(calls))
        walk.replay()
        once = self._time(walk, 0.0)
        walks = max(1, min(int(REPLAY_S / max(once, 1e-7)) + 1, MAX_CALLS // len(calls)))
        self._calls = walks * len(calls)
        self._graph = walk
        if walks > 1:
            self._graph, self._result = _capture(calls, self._calls)
        self._graph.replay()  # the first replay uploads the graph
        torch.cuda.synchronize()
        start = time.perf_counter()
        self._graph.replay()
        self._launch_s = time.perf_counter() - start
        torch.cuda.synchronize()

    def _time(self, graph: torch.cuda.CUDAGraph, launch_s: float) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int((min(2 * launch_s, 0.05) + 100e-6) * SPIN_HZ))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3

    def run(self) -> float:
        return self._time(self._graph, self._launch_s) / self._calls * 1e6

    def result(self) -> Any:
        return self._result


class LoopTimer:
    """Calls one by one between two events: what is left for a provider that a graph cannot capture."""

    note = "no graph"

    def __init__(self, calls: Sequence[Call]) -> None:
        _warm_up(calls)
        self._sequence = list(calls)
        once = self.run() * 1e-6 * len(calls)
        self._sequence *= max(1, min(int(REPLAY_S / max(once, 1e-7)) + 1, MAX_CALLS // len(calls)))

    def run(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for call in self._sequence:
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / len(self._sequence) * 1e3

    def result(self) -> Any:
        return self._sequence[0]()


class ClockTimer:
    """Calls one by one on a CPU, by the wall clock."""

    note = ""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._sequence = list(calls)
        self.run()
        once = self.run() * 1e-6 * len(calls)
        self._sequence *= max(1, int(CPU_ROUND_S / max(once, 1e-7)))

    def run(self) -> float:
        start = time.perf_counter()
        for call in self._sequence:
            call()
        return (time.perf_counter() - start) / len(self._sequence) * 1e6

    def result(self) -> Any:
        return self._sequence[0]()


def make_timer(calls: Sequence[Call], device: torch.device, graph: bool = True) -> Timer:
    """The timer for a device; `graph=False` for a provider that could not be captured."""
    if device.type != "cuda":
        return ClockTimer(calls)
    return GraphTimer(calls) if graph else LoopTimer(calls)


def capture_one(call: Call) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of one call, and the result that its replays write."""
    _warm_up([call])
    graph, results = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results.append(call())
    return graph, results[0]


def _warm_up(calls: Sequence[Call]) -> None:
    """At least three calls on a side stream, as a capture wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(-(-3 // len(calls))):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def _capture(calls: Sequence[Call], count: int) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of `count` calls in turns, and what the last walk's first one returned."""
    graph, held = torch.cuda.CUDAGraph(), [None] * len(calls)
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for i in range(count):
            held[i % len(calls)] = calls[i % len(calls)]()
    return graph, held[0]


def interleave(
    timers: Mapping[str, Timer],
    rounds: int,
    on_error: Callable[[str, Exception], None],
    trying: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Times every timer once a round, the first one changing from round to round.

    `trying` is told a timer's name before each of its runs. A timer that raises is reported to `on_error` and takes no
    further part; its times are dropped.
    """
    alive = list(timers)
    times: dict[str, list[float]] = {name: [] for name in timers}
    for index in range(rounds):
        shift = index % len(alive) if alive else 0
        for name in alive[shift:] + alive[:shift]:
            trying(name)
            try:
                times[name].append(timers[name].run())
            except Exception as error:
                alive.remove(name)
                del times[name]
                on_error(name, error)
    return times


def quiet_times(
    timers: Mapping[str, Timer],
    rounds: int,
    on_error: Callable[[str, Exception], None],
    trying: Callable[[str], None] = lambda name: None,
) -> dict[str, Times]:
    """`interleave`, summarised.

    Where one timer's rounds scatter, all are timed once more and each keeps its quieter pass, so that what disturbs the
    machine for a moment is not taken for a time.
    """
    first = {name: summarize(times) for name, times in interleave(timers, rounds, on_error, trying).items()}
    if all(times.spread <= NOISY for times in first.values()):
        return first
    again = interleave({name: timers[name] for name in first}, rounds, on_error, trying)
    return {name: min(first[name], summarize(times), key=lambda t: t.spread) for name, times in again.items()}


def summarize(times: Sequence[float]) -> Times:
    """Median, 20th and 80th percentile."""
    p20, median, p80 = np.percentile(times, (20, 50, 80))
    return Times(float(median), float(p20), float(p80))


def spin_up(device: torch.device, seconds: float = 0.5) -> None:
    """Matrix products for `seconds`, so that the clocks are up when the first time is taken."""
    if device.type != "cuda":
        return
    a = torch.randn(4096, 4096, device=device, dtype=torch.float16)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(10):
            a @ a
        torch.cuda.synchronize(device)
