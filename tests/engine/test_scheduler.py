"""Who runs next. The runner here keeps pages without a model, and finds out who reads what is not its own."""

import pytest
from fake_runner import GARBAGE, FakeRunner, continuation
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from octavo.engine.block_manager import BlockManager, ring_pages
from octavo.engine.params import SamplingParams
from octavo.engine.scheduler import QueueFullError, Scheduler
from octavo.engine.sequence import Sequence


def sequence(i, prompt=5, max_tokens=3, priority=0):
    tokens = [1000 + i, *range(1, prompt)]  # no two begin alike
    return Sequence(i, tokens, SamplingParams(max_tokens=max_tokens), priority=priority, arrival=i)


def update(scheduler, step):
    for chunk in step.chunks:
        if chunk.samples and scheduler.update(chunk, 0) and len(chunk.sequence.token_ids) == chunk.sequence.max_length:
            scheduler.finish(chunk.sequence, "length")


def run(scheduler):
    """One step, with a made-up token for each sequence that samples."""
    step = scheduler.schedule()
    update(scheduler, step)
    return [(c.sequence.id, c.length) for c in step.chunks]


def test_decodes_come_before_prompts_and_prompts_are_chunked():
    scheduler = Scheduler(BlockManager(100, 4), max_num_seqs=8, max_num_batched_tokens=8)
    scheduler.add(sequence(0, prompt=6))
    assert run(scheduler) == [(0, 6)]
    scheduler.add(sequence(1, prompt=20))
    assert run(scheduler) == [(0, 1), (1, 7)]
    assert run(scheduler) == [(0, 1), (1, 7)]
    assert run(scheduler) == [(1, 6)]
    assert run(scheduler) == [(1, 1)]


def test_a_step_is_scheduled_before_the_tokens_of_the_last_are_known():
    scheduler = Scheduler(BlockManager(100, 4), 8, 8)
    s = sequence(0, prompt=3, max_tokens=3)
    scheduler.add(s)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert second.chunks == [(s, 3, 1, True)] and len(s.token_ids) == 3
    update(scheduler, first)
    third = scheduler.schedule()
    assert third.chunks == [(s, 4, 1, True)] and len(s.token_ids) == 4
    update(scheduler, second)
    assert not scheduler.schedule(), "the third token, which is in flight, is the last"
    update(scheduler, third)
    assert s.finish_reason == "length" and not scheduler.has_work


def test_what_was_sampled_after_the_end_is_ignored():
    blocks = BlockManager(100, 4)
    scheduler = Scheduler(blocks, 8, 8)
    s = sequence(0)
    scheduler.add(s)
    scheduler.schedule()
    late = scheduler.schedule()
    scheduler.finish(s, "stop")
    assert not scheduler.update(late.chunks[0], 7) and s.finish_reason == "stop" and blocks.num_free == 100
    scheduler.finish(s, "abort")
    assert s.finish_reason == "stop"


def test_a_request_larger_than_the_cache_is_refused_at_once():
    scheduler = Scheduler(BlockManager(3, 4), 8, 8)
    with pytest.raises(ValueError, match="prompt: 10 tokens .* max_tokens 4 need 4 pages of 4, but the cache has 3"):
        scheduler.add(sequence(0), sequence(1, prompt=10, max_tokens=4))
    assert not scheduler.has_work
    scheduler.add(sequence(2, prompt=10, max_tokens=3))  # the last token is not computed
    while scheduler.has_work:
        run(scheduler)


def test_a_full_queue_refuses():
    scheduler = Scheduler(BlockManager(8, 4), 1, 8, max_waiting=2)
    scheduler.add(sequence(0), sequence(1))
    with pytest.raises(QueueFullError, match="2 requests wait and 2 may: try again later"):
        scheduler.add(sequence(2))
    scheduler.schedule()
    scheduler.add(sequence(2))


def test_waiting_requests_start_when_pages_come_free():
    scheduler = Scheduler(BlockManager(2, 4), 8, 64)
    scheduler.add(sequence(0, prompt=5, max_tokens=1))
    scheduler.add(sequence(1, prompt=5, max_tokens=1))
    assert run(scheduler) == [(0, 5)]
    assert run(scheduler) == [(1, 5)]
    assert not scheduler.has_work


def test_priority_goes_before_arrival_and_nobody_passes_by_who_waits():
    scheduler = Scheduler(BlockManager(4, 4), 8, 64)
    scheduler.add(sequence(0, prompt=8, max_tokens=1), sequence(1, prompt=16, max_tokens=1))
    scheduler.add(sequence(2, prompt=4, max_tokens=1), sequence(3, prompt=4, max_tokens=1, priority=-1))
    assert run(scheduler) == [(3, 4), (0, 8)], "2 would fit, but 1 is before it"
    assert run(scheduler) == [(1, 16)]
    assert run(scheduler) == [(2, 4)]


def test_the_last_in_rank_makes_room_and_comes_back():
    blocks = BlockManager(4, 2, enable_prefix_caching=False)
    scheduler = Scheduler(blocks, 8, 64)
    first, second = sequence(0, prompt=4, max_tokens=4), sequence(1, prompt=4, max_tokens=4)
    scheduler.add(second, first)
    assert run(scheduler) == [(0, 4), (1, 4)]
    assert run(scheduler) == [(0, 1)] and second.slot is None and second.num_computed == 0
    assert scheduler.waiting == [second] and scheduler.num_preemptions == 1 and len(second.token_ids) == 5
    lengths = [run(scheduler) for _ in range(3)]
    assert lengths[:2] == [[(0, 1)], [(0, 1)]] and lengths[2] == [(1, 5)], "with what it had sampled"
    while scheduler.has_work:
        run(scheduler)
    assert blocks.num_free == 4 and len(second.token_ids) == 8


def test_who_is_preempted_waits_for_the_token_in_flight():
    scheduler = Scheduler(BlockManager(4, 2, enable_prefix_caching=False), 8, 64)
    first, second = sequence(0, prompt=4, max_tokens=4), sequence(1, prompt=4, max_tokens=4)
    scheduler.add(first, second)
    step = scheduler.schedule()
    assert scheduler.schedule().chunks == [(first, 4, 1, True)] and second.slot is None and second.in_flight == 1
    scheduler.finish(first, "abort")
    assert not scheduler.schedule(), "what it has sampled is part of what is computed anew"
    update(scheduler, step)
    assert scheduler.schedule().chunks == [(second, 0, 5, True)]


def test_a_decode_gives_way_to_a_prompt_of_better_rank():
    scheduler = Scheduler(BlockManager(6, 2, enable_prefix_caching=False), 8, 6)
    scheduler.add(sequence(5, prompt=2, max_tokens=6))
    assert run(scheduler) == [(5, 2)]
    scheduler.add(sequence(1, prompt=11, max_tokens=1, priority=-1))
    assert run(scheduler) == [(5, 1), (1, 5)]
    assert run(scheduler) == [(5, 1), (1, 3)], "as much as there are pages for"
    assert run(scheduler) == [(1, 3)] and scheduler.waiting[0].id == 5


def test_a_decode_of_this_step_gives_way_too():
    scheduler = Scheduler(BlockManager(4, 4, enable_prefix_caching=False), 8, 7)
    scheduler.add(sequence(5, prompt=1, max_tokens=6))
    assert run(scheduler) == [(5, 1)]
    scheduler.add(sequence(1, prompt=16, max_tokens=1, priority=-1))
    assert [run(scheduler) for _ in range(2)] == [[(5, 1), (1, 6)]] * 2
    assert run(scheduler) == [(1, 4)], "there was room for the token of 5, but 1 needs its page"


def test_who_is_preempted_does_not_come_back_in_the_same_step():
    scheduler = Scheduler(BlockManager(6, 2, enable_prefix_caching=False), 8, 12)
    scheduler.add(sequence(0, prompt=4, max_tokens=4), sequence(1, prompt=8, max_tokens=2))
    assert run(scheduler) == [(0, 4), (1, 8)]
    scheduler.max_num_batched_tokens = 5
    assert run(scheduler) == [(0, 1)] and scheduler.num_preemptions == 1
    assert run(scheduler) == [(0, 1), (1, 4)]


def test_slots_are_the_lowest_that_are_free():
    scheduler = Scheduler(BlockManager(100, 4), 3, 64)
    sequences = [sequence(i) for i in range(4)]
    scheduler.add(*sequences)
    scheduler.schedule()
    assert [s.slot for s in sequences] == [0, 1, 2, None]
    scheduler.finish(sequences[1], "stop")
    scheduler.schedule()
    assert [s.slot for s in sequences] == [0, None, 2, 1]


def test_who_read_what_a_failed_step_should_have_written_begins_anew():
    blocks = BlockManager(20, 2)
    scheduler = Scheduler(blocks, 8, 64)
    first, second = (Sequence(i, [1, 2, 3, 4, 5], SamplingParams(max_tokens=4), arrival=i) for i in range(2))
    scheduler.add(first)
    failed = scheduler.schedule()
    scheduler.add(second)
    after = scheduler.schedule()
    assert after.chunks[1] == (second, 4, 1, True)
    assert scheduler.fail(failed) == [second] and first.finish_reason == "error"
    assert second.num_computed == second.in_flight == 0 and blocks.num_used == blocks.num_cached == 0
    assert scheduler.schedule().chunks == [(second, 0, 5, True)]


class SchedulerMachine(RuleBasedStateMachine):
    """Whatever arrives, ends, is aborted or fails, a step ahead or not: pages are conserved, the budget holds, nobody
    reads what is not its own, and everyone finishes with the tokens it would have alone."""

    PAGES, SIZE, SEQS, BUDGET = 12, 3, 3, 7
    ring = None

    def __init__(self):
        super().__init__()
        self.blocks = BlockManager(self.PAGES, self.SIZE, ring_pages=self.ring)
        self.scheduler = Scheduler(self.blocks, self.SEQS, self.BUDGET)
        self.failure = None
        self.runner = FakeRunner(
            *(self.PAGES, self.SIZE, self.SEQS), window=self.window(), ring=self.ring, fail=lambda step: self.failure
        )
        self.live, self.running, self.dropped = [], [], set()
        self.count = 0

    def window(self):
        return None if self.ring is None else (self.ring - 1) * self.SIZE - self.BUDGET

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20), tokens=st.integers(1, 6), rank=st.integers(0, 2))
    def add(self, prompt, tokens, rank):
        self.count += 1
        s = Sequence(self.count, list(prompt), SamplingParams(max_tokens=tokens), priority=rank, arrival=self.count)
        self.scheduler.add(s)
        self.live.append(s)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data):
        self.scheduler.finish(data.draw(st.sampled_from(self.live)), "abort")

    @precondition(lambda self: len(self.running) < 2)
    @rule()
    def schedule(self):
        ahead = list(self.scheduler.running)
        step = self.scheduler.schedule()
        chunks = step.chunks
        assert step.num_tokens <= self.BUDGET and all(chunk.length > 0 for chunk in chunks)
        scheduled = {chunk.sequence for chunk in chunks}
        if not self.running:
            assert bool(chunks) == self.scheduler.has_work
        # Who is first in rank goes on, after decodes if it has a prompt to compute, until all its tokens are sampled.
        if ahead and ahead[0].num_tokens < ahead[0].max_length and sum(c.length == 1 for c in chunks) < self.BUDGET:
            assert ahead[0] in scheduled
        waiting = [s.rank for s in self.scheduler.waiting]
        assert waiting == sorted(waiting)
        if chunks:
            self.running.append((step, self.runner.start(step)))

    @precondition(lambda self: self.running)
    @rule()
    def wait(self):
        step, pending = self.running.pop(0)
        results = pending.wait()
        dropped, self.dropped = self.dropped, set()
        for chunk, sampled in zip([c for c in step.chunks if c.samples], results, strict=True):
            s = chunk.sequence
            if s not in dropped and self.scheduler.update(chunk, sampled.token_id):
                assert sampled.token_id != GARBAGE
                if len(s.token_ids) == s.max_length:
                    self.scheduler.finish(s, "length")
                    prompt = s.token_ids[: s.prompt_length]
                    assert s.generated == continuation(prompt, s.max_length - s.prompt_length)

    @precondition(lambda self: len(self.running) < 2)
    @rule()
    def a_step_fails(self):
        """While another runs ahead of it, or after it, or none."""
        step = self.scheduler.schedule()
        if step:
            self.failure = "wait"
            self.runner.start(step)
            self.failure = None
            self.runner.started -= 1  # nobody will wait for it
            if not self.running:
                after = self.scheduler.schedule()
                if after:
                    self.running.append((after, self.runner.start(after)))
            again = self.scheduler.fail(step)
            if self.running and self.running[0][0].number > step.number:
                self.dropped = set(again)
            for s in again:
                assert s.finish_reason is None

    @invariant()
    def pages_are_conserved(self):
        self.live = [s for s in self.live if s.finish_reason is None]
        held = [page for s in self.live for page in s.block_table]
        assert self.blocks._references == [held.count(page) for page in range(self.PAGES)]
        assert self.blocks.num_used + self.blocks.num_cached + len(self.blocks._free) == self.PAGES
        assert self.blocks.num_used == len(set(held))

    @invariant()
    def who_runs_has_a_slot_and_pages(self):
        running = self.scheduler.running
        assert sorted(s.id for s in (*running, *self.scheduler.waiting)) == sorted(s.id for s in self.live)
        slots = [s.slot for s in running]
        assert len(set(slots)) == len(slots) <= self.SEQS and set(slots) <= set(range(self.SEQS))
        assert [s.rank for s in running] == sorted(s.rank for s in running)
        for s in running:
            assert len(s.block_table) == self.blocks.pages_for(max(s.num_computed, 1))
        for s in self.scheduler.waiting:
            assert s.slot is None and not s.block_table and s.num_computed == 0

    def teardown(self):
        for _ in range(2000):
            if not (self.scheduler.has_work or self.running):
                break
            if len(self.running) < 2:
                self.schedule()
            if self.running:
                self.wait()
            self.pages_are_conserved()
        assert not self.scheduler.has_work and self.blocks.num_used == 0


class RingMachine(SchedulerMachine):
    """The same with a window of 2 or 5 tokens, where pages are written over."""

    ring = 4


SchedulerMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
RingMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestScheduler = SchedulerMachine.TestCase
TestRings = RingMachine.TestCase


def test_the_machines_ring_is_as_large_as_the_engine_makes_it():
    machine = RingMachine()
    assert ring_pages(machine.window(), machine.BUDGET, machine.SIZE) == machine.ring
