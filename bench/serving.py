"""Sends requests to the engine when they arrive, and keeps when their tokens came."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from octavo.bench.model_costs import Load
from octavo.bench.serving_metrics import Timeline
from octavo.bench.workload import Request
from octavo.engine.core import EngineCore, Pending, Runner
from octavo.engine.outputs import Completion
from octavo.engine.params import SamplingParams
from octavo.engine.sequence import Sequence as TokenSequence
from octavo.engine.sequence import Step


@dataclass(frozen=True)
class Recording:
    """A run: the requests in their order, and how many tokens each step computed."""

    timelines: tuple[Timeline, ...]
    step_tokens: tuple[int, ...]

    @property
    def loads(self) -> list[Load]:
        """What the completed requests made the model compute."""
        return [Load(t.prompt, len(t.token_times), t.cached) for t in self.timelines if t.completed]


class CountingRunner:
    """A runner that keeps how many tokens its steps have."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.step_tokens = runner, list[int]()

    def start(self, step: Step) -> Pending:
        self.step_tokens.append(step.num_tokens)
        return self.runner.start(step)

    def forget(self, sequence: TokenSequence) -> None:
        self.runner.forget(sequence)


def serve(
    core: EngineCore,
    requests: Sequence[Request],
    *,
    concurrency: int | None = None,
    progress: Callable[[int], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Recording:
    """Sends each request at its time and steps until all are through, greedily and to the length that each asks for.

    A request that comes while a step runs is sent behind that step, and its time counts from when it came. With
    `concurrency` no more than so many are sent at once, and all count from when they were sent.

    Args:
        core: that is idle.
        requests: in the order of their arrivals.
        concurrency: the most that are with the engine; all by default.
        progress: called with the number of tokens that each step brought.
        clock, sleep: seconds, of the engine's clock.

    Raises:
        ValueError: a concurrency below 1, or a request that the engine refuses.
    """
    if concurrency is not None and concurrency < 1:
        raise ValueError(f"concurrency: {concurrency}; expected at least 1")
    counting = CountingRunner(core.runner)
    core.runner = counting
    waiting, ids = deque(requests), count()
    sent: list[Completion] = []
    running = 0
    start = clock()
    try:
        while waiting or running:
            now = clock()
            while waiting and start + waiting[0].arrival <= now and (concurrency is None or running < concurrency):
                request = waiting.popleft()
                params = SamplingParams(max_tokens=request.output, temperature=0.0, ignore_eos=True)
                arrival = now if concurrency is not None else start + request.arrival
                sent.append(core.add(f"bench-{next(ids)}", list(request.prompt), params, arrival=arrival).completion)
                running += 1
            if not running:
                sleep(max(start + waiting[0].arrival - now, 0.0))
                continue
            events = core.step()
            running -= sum(event.finish_reason is not None for event in events)
            if progress is not None:
                progress(sum(event.token_id is not None for event in events))
        core.drain()
    finally:
        core.runner = counting.runner
    return Recording(tuple(_timeline(completion, start) for completion in sent), tuple(counting.step_tokens))


def _timeline(completion: Completion, start: float) -> Timeline:
    return Timeline(
        prompt=len(completion.prompt_token_ids),
        arrival=completion.timings.arrival - start,
        token_times=tuple(time - start for time in completion.outputs[0].token_times),
        cached=completion.num_cached_tokens,
        error=completion.error,
    )
