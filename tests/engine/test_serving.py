"""Requests that arrive at the engine, computed by a runner whose steps take exactly a second."""

import math
import time

import pytest

from octavo.bench.serving import serve
from octavo.bench.serving_metrics import summarize
from octavo.bench.workload import Request
from octavo.engine.block_manager import BlockManager
from octavo.engine.core import EngineCore
from octavo.engine.scheduler import Scheduler
from octavo.engine.sequence import Sampled


class Runner:
    """Samples zeros; a step that was started ends a second after the one before, or after its start."""

    def __init__(self):
        self.now, self.ready, self.slept, self.most, self.broken = 100.0, 0.0, [], 0, None

    def start(self, step):
        if any(len(chunk.sequence.token_ids) == self.broken for chunk in step.chunks):
            raise MemoryError("out of memory")
        self.most = max(self.most, len(step.chunks))
        self.ready = max(self.ready, self.now) + 1
        return Pending(self, self.ready, sum(chunk.samples for chunk in step.chunks))

    def forget(self, sequence):
        pass

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


class Pending:
    def __init__(self, runner, ready, count):
        self.runner, self.ready, self.count = runner, ready, count

    def wait(self):
        self.runner.now = max(self.runner.now, self.ready)
        return [Sampled(0)] * self.count


@pytest.fixture
def runner(monkeypatch):
    made = Runner()
    monkeypatch.setattr(time, "monotonic", lambda: made.now)
    return made


@pytest.fixture
def core(runner):
    scheduler = Scheduler(BlockManager(100, 4), 8, 64)
    return EngineCore(runner, scheduler, None, vocab_size=50, max_model_len=100)


def run(core, requests, **options):
    recording = serve(core, requests, clock=time.monotonic, sleep=core.runner.sleep, **options)
    assert not core.has_work and core.scheduler.blocks.num_used == 0 and isinstance(core.runner, Runner)
    return recording


def test_all_at_once(core):
    seen = []
    recording = run(core, [Request((1, 2), 3), Request((3,), 1)], progress=seen.append)
    assert [t.token_times for t in recording.timelines] == [(1, 2, 3), (1,)]
    assert [(t.prompt, t.arrival, t.cached) for t in recording.timelines] == [(2, 0, 0), (1, 0, 0)]
    assert recording.step_tokens == (3, 1, 1) and sum(seen) == 4


def test_a_request_counts_from_its_own_arrival(core):
    """One comes while steps run and is sent behind them; for another the engine is idle, and waited for."""
    recording = run(core, [Request((1,), 4), Request((1,), 1, 1.25), Request((1,), 1, 9.5)])
    assert [t.token_times for t in recording.timelines] == [(1, 2, 3, 4), (4,), (10.5,)]
    assert [t.ttft for t in recording.timelines] == [1, 2.75, 1]
    assert core.runner.slept == [5.5]


@pytest.mark.parametrize("concurrency", [1, 2, 5])
def test_no_more_than_may_be_with_the_engine(core, concurrency):
    recording = run(core, [Request((1,), 2)] * 5, concurrency=concurrency)
    assert core.runner.most == min(concurrency, 5)
    assert max(t.token_times[-1] for t in recording.timelines) == 2 * math.ceil(5 / concurrency)
    assert all(t.ttft == 1 for t in recording.timelines), "from when it was sent"


def test_what_the_cache_had_is_known_of_each_request(core):
    recording = run(core, [Request((1,) * 9, 1), Request((1,) * 8 + (2,), 1, 5.0)])
    assert [t.cached for t in recording.timelines] == [0, 8]
    assert summarize(recording.timelines)["prefix_cache_hit_rate"] == 8 / 18
    assert recording.step_tokens == (9, 1)


def test_a_request_that_fails_is_counted_and_the_others_go_on(core):
    core.runner.broken = 7
    recording = run(core, [Request((1,), 2), Request((5,) * 7, 2, 4.0), Request((6,) * 3, 2, 8.0)])
    found = summarize(recording.timelines)
    assert (found["completed"], found["failed"], found["output_tokens"], found["input_tokens"]) == (2, 1, 4, 4)
    assert "out of memory" in recording.timelines[1].error
    assert [load.prompt for load in recording.loads] == [1, 3]


def test_a_concurrency_below_one_is_refused(core):
    with pytest.raises(ValueError, match="concurrency: 0; expected at least 1"):
        run(core, [Request((1,), 1)], concurrency=0)


def test_a_request_that_the_engine_refuses_is_named(core):
    with pytest.raises(ValueError, match="token id 50; expected 0 to 49"):
        run(core, [Request((50,), 1)])
