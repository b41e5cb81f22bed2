import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from octavo.engine.block_manager import BlockManager
from octavo.engine.scheduler import Scheduler
from octavo.engine.sequence import SamplingParams, Sequence


def sequence(i, prompt=5, max_tokens=3):
    return Sequence(i, list(range(prompt)), SamplingParams(max_tokens=max_tokens))


def run(scheduler):
    """One step, with a made-up token for each sequence that samples."""
    chunks = scheduler.schedule()
    lengths = [(c.sequence.id, c.length) for c in chunks]
    sampled = [c.sequence for c in chunks if c.samples]
    for chunk in chunks:
        scheduler.computed(chunk)
    for s in sampled:
        s.token_ids.append(0)
        if len(s.token_ids) == s.max_length:
            scheduler.finish(s, "length")
    return lengths


def test_decodes_come_before_prompts_and_prompts_are_chunked():
    scheduler = Scheduler(BlockManager(100, 4), max_num_seqs=8, max_num_batched_tokens=8)
    scheduler.add(sequence(0, prompt=6))
    assert run(scheduler) == [(0, 6)]
    scheduler.add(sequence(1, prompt=20))
    assert run(scheduler) == [(0, 1), (1, 7)]
    assert run(scheduler) == [(0, 1), (1, 7)]
    assert run(scheduler) == [(1, 6)]
    assert run(scheduler) == [(1, 1)]


def test_a_request_larger_than_the_cache_is_refused_at_once():
    scheduler = Scheduler(BlockManager(3, 4), 8, 8)
    with pytest.raises(ValueError, match="prompt: 10 tokens .* need 4 pages of 4, but the cache has 3"):
        scheduler.add(sequence(0, prompt=10, max_tokens=3))
    assert not scheduler.has_work


def test_waiting_requests_start_when_pages_come_free():
    scheduler = Scheduler(BlockManager(2, 4), 8, 64)
    scheduler.add(sequence(0, prompt=5, max_tokens=1))
    scheduler.add(sequence(1, prompt=5, max_tokens=1))
    assert run(scheduler) == [(0, 5)]
    assert run(scheduler) == [(1, 5)]
    assert not scheduler.has_work


def test_block_manager_refuses_more_than_it_has():
    blocks = BlockManager(2, 4)
    taken = blocks.allocate(2)
    with pytest.raises(ValueError, match="num_pages: 1; only 0 of 2"):
        blocks.allocate(1)
    blocks.free(taken)
    assert taken == [] and blocks.num_free == 2


class SchedulerMachine(RuleBasedStateMachine):
    """Whatever arrives, ends or is aborted: pages are conserved, the budget holds, everyone finishes."""

    def __init__(self):
        super().__init__()
        self.scheduler = Scheduler(BlockManager(12, 3), max_num_seqs=3, max_num_batched_tokens=7)
        self.live = []
        self.count = 0

    @rule(prompt=st.integers(1, 25), max_tokens=st.integers(1, 6))
    def add(self, prompt, max_tokens):
        s = sequence(self.count, prompt, max_tokens)
        self.count += 1
        self.scheduler.add(s)
        self.live.append(s)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data):
        s = data.draw(st.sampled_from(self.live))
        self.scheduler.finish(s, "abort")

    @rule()
    def step(self):
        lengths = run(self.scheduler)
        assert sum(length for _, length in lengths) <= 7 and all(length > 0 for _, length in lengths)
        assert bool(lengths) == bool(self.live)

    @invariant()
    def pages_are_conserved(self):
        self.live = [s for s in self.live if s.finish_reason is None]
        held = [page for s in self.live for page in s.block_table]
        assert len(held) == len(set(held))
        assert len(held) + self.scheduler.blocks.num_free == 12
        assert len(self.scheduler.running) <= 3
        for s in self.scheduler.running:
            assert len(s.block_table) * 3 >= s.max_length

    def teardown(self):
        for _ in range(2000):
            if not self.scheduler.has_work:
                break
            run(self.scheduler)
        assert not self.scheduler.has_work and self.scheduler.blocks.num_free == 12


SchedulerMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestScheduler = SchedulerMachine.TestCase
