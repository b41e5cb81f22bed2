"""Requests through the engine, on a runner without a model: each ends in its own answer, or an error of its own."""

import asyncio
import gc
import random
import time

import pytest
from fake_runner import GARBAGE, VOCAB, FakeRunner, continuation
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from octavo.engine import LLM, AsyncLLM, QueueFullError, SamplingParams
from octavo.engine.block_manager import BlockManager
from octavo.engine.core import EngineCore
from octavo.engine.garbage import FACTOR
from octavo.engine.scheduler import Scheduler
from octavo.engine.sequence import Sampled


def engine(pages=40, size=4, seqs=8, budget=32, *, fail=lambda step: None, **options):
    blocks = BlockManager(pages, size, enable_prefix_caching=options.pop("enable_prefix_caching", True))
    runner = FakeRunner(pages, size, seqs, fail=fail)
    scheduler = Scheduler(blocks, seqs, budget, **options)
    return EngineCore(runner, scheduler, None, vocab_size=VOCAB, max_model_len=100)


def finish(core):
    events = []
    while core.has_work:
        events += core.step()
    return events


def params(tokens=8, **others):
    return SamplingParams(max_tokens=tokens, **others)


def idle(core):
    """Nobody holds anything any more."""
    return (
        core.scheduler.blocks.num_used == 0
        and not core.scheduler.has_work
        and not core._requests
        and not core._of
        and len(core.scheduler._slots) == core.scheduler.max_num_seqs
    )


def test_a_request_gets_its_tokens_and_its_times():
    core = engine()
    request = core.add("a", [1, 2, 3], params(5))
    events = finish(core)
    done = request.completion
    assert done.token_ids == continuation([1, 2, 3], 5) == [e.token_id for e in events]
    assert done.finish_reason == "length" and done.finished and done.request_id == "a"
    assert [e.finish_reason for e in events] == [None] * 4 + ["length"]
    times = done.timings
    assert times.arrival <= times.first_scheduled <= times.first_token <= times.finished
    assert times.time_to_first_token <= times.latency
    assert done.outputs[0].token_times == sorted(done.outputs[0].token_times) and len(done.outputs[0].token_times) == 5
    assert idle(core)


def test_the_next_step_is_started_before_the_last_is_waited_for():
    core, order = engine(), []

    class Step:
        def __init__(self, number):
            self.number = number

        def wait(self):
            order.append(("wait", self.number))
            return [Sampled(7)]

    class Runner:
        def start(self, step):
            order.append(("start", step.number))
            return Step(step.number)

        def forget(self, sequence):
            order.append(("forget", sequence.id))

    core.runner = Runner()
    core.add("a", [1], params(3))
    finish(core)
    steps = [("start", 1), ("start", 2), ("wait", 1), ("start", 3), ("wait", 2), ("wait", 3)]
    assert order == [*steps, ("forget", 0)]


def test_tokens_after_a_stop_token_are_dropped():
    core = engine()
    tokens = continuation([1, 2, 3], 8)
    request = core.add("a", [1, 2, 3], params(8, stop_token_ids=[tokens[2]]))
    core.eos_token_ids = frozenset({tokens[1]})
    other = core.add("b", [1, 2, 3], params(8))
    ignoring = core.add("c", [1, 2, 3], params(8, ignore_eos=True))
    finish(core)
    assert request.completion.token_ids == tokens[:3] and request.completion.finish_reason == "stop"
    assert request.completion.outputs[0].stop_reason == tokens[2]
    assert other.completion.token_ids == tokens[:2] and other.completion.outputs[0].stop_reason is None
    assert ignoring.completion.token_ids == tokens and ignoring.completion.finish_reason == "length"


def test_stop_tokens_do_not_count_before_min_tokens():
    core = engine()
    tokens = continuation([1, 2, 3], 8)
    request = core.add("a", [1, 2, 3], params(8, stop_token_ids=tokens[:6], min_tokens=4))
    finish(core)
    assert request.completion.token_ids == tokens[:5] and request.completion.finish_reason == "stop"


def test_continuations_share_their_prompt():
    core = engine(budget=100)
    request = core.add("a", list(range(20)), params(4, n=3))
    core.step()
    assert [s.num_computed for s in request.sequences] == [20] * 3 and core.runner.num_tokens == 20 + 4 + 4
    assert core.scheduler.blocks.num_used == 4 + 3
    finish(core)
    assert [o.token_ids for o in request.completion.outputs] == [continuation(list(range(20)), 4)] * 3
    assert [o.index for o in request.completion.outputs] == [0, 1, 2] and request.completion.finished


def test_a_seed_is_another_for_each_continuation():
    core = engine()
    request = core.add("a", [1], params(n=3, seed=5))
    assert [s.params.seed for s in request.sequences] == [5, 6, 7] and {s.params.n for s in request.sequences} == {1}
    assert [s.params.seed for s in core.add("b", [1], params(n=2)).sequences] == [None, None]


def test_prefixes_are_found_again():
    core = engine()
    core.add("a", list(range(20)), params(4))
    finish(core)
    tokens = core.runner.num_tokens
    again = core.add("b", list(range(20)), params(4))
    finish(core)
    assert again.completion.num_cached_tokens == 16 and core.runner.num_tokens - tokens == 4 + 3
    assert core.scheduler.blocks.hit_rate == 16 / 40


def test_what_was_generated_is_found_again():
    core = engine()
    first = core.add("a", [1, 2, 3], params(15))
    finish(core)
    again = core.add("b", [1, 2, 3, *first.completion.token_ids, 5], params(2))
    finish(core)
    assert again.completion.num_cached_tokens == 16, "all that was computed, of 17 tokens, in pages of 4"


@pytest.mark.parametrize("where", ["start", "wait"])
def test_a_failed_step_ends_its_own_requests_alone(where):
    def fail(step):
        return where if any(c.sequence.id == 1 and c.start == 4 for c in step.chunks) else None

    core = engine(seqs=2, fail=fail)
    beside, failing, waiting = (core.add(name, [1, 2, 3], params(6)) for name in "abc")
    events = finish(core)
    for request in (beside, failing):  # one was in the step with the other
        done = request.completion
        assert done.finish_reason == "error" and done.error == f"request {request.id}: RunnerError: {where}"
        assert done.token_ids == continuation([1, 2, 3], 2), "what came before is kept"
    assert waiting.completion.token_ids == continuation([1, 2, 3], 6)
    assert [e.request.id for e in events if e.finish_reason == "error"] == ["a", "b"] and idle(core)


def test_who_shared_a_failed_prompt_is_computed_anew():
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    core = engine(fail=lambda step: "wait" if step.number == 1 else None)
    first = core.add("a", prompt, params(4))
    core.step()
    second = core.add("b", prompt, params(4))
    core.step()  # starts with pages of the first, then learns that these hold nothing
    assert second.completion.num_cached_tokens == 8 and first.completion.finish_reason == "error"
    assert core.runner.forgotten == {0, 1} and second.sequences[0].num_computed == 0
    finish(core)
    assert second.completion.token_ids == continuation(prompt, 4) and idle(core)


def test_no_token_is_an_error_of_one_request():
    core = engine()
    start = core.runner.start

    def nan_for_the_second(step):
        pending = start(step)
        chunks = [c for c in step.chunks if c.samples]
        pending.sampled = [
            Sampled(-1) if c.sequence.id == 1 else s for c, s in zip(chunks, pending.sampled, strict=True)
        ]
        return pending

    core.runner.start = nan_for_the_second
    requests = [core.add(name, [1, 2], params(4)) for name in "abc"]
    finish(core)
    assert requests[1].completion.finish_reason == "error" and requests[1].completion.token_ids == []
    assert "request b: its logits hold NaN or infinities" in requests[1].completion.error
    for request in (requests[0], requests[2]):
        assert request.completion.token_ids == continuation([1, 2], 4)
    assert idle(core)


def test_an_interrupt_passes_through_and_leaves_nothing_behind():
    def interrupt(step):
        raise KeyboardInterrupt

    core = engine()
    request = core.add("a", list(range(9)), params(4))
    core.runner.fail = interrupt
    with pytest.raises(KeyboardInterrupt):
        core.step()
    core.runner.fail = lambda step: None
    assert request.completion.finish_reason == "error" and idle(core)
    again = core.add("b", list(range(9)), params(4))
    finish(core)
    assert again.completion.num_cached_tokens == 0, "what was never computed is not in the cache"
    assert again.completion.token_ids == continuation(list(range(9)), 4)


def test_a_runner_that_answers_too_little_is_no_answer():
    core = engine()
    core.runner.start = lambda step: type("Pending", (), {"wait": lambda self: []})()
    core.add("a", [1], params(2))
    with pytest.raises(ValueError, match="shorter"):
        finish(core)


@pytest.mark.parametrize(
    ("prompt", "setting", "message"),
    [
        ([], {}, "prompt: empty; expected at least one token"),
        ([1] * 100, {}, "prompt: 100 tokens, but the context holds 100"),
        ([1, VOCAB], {}, f"prompt: token id {VOCAB}; expected 0 to {VOCAB - 1}"),
        ([-1], {}, "prompt: token id -1"),
        ([1.5], {}, "prompt: 1.5; expected token ids"),
        ([1], dict(stop_token_ids=[VOCAB]), f"stop_token_ids: token id {VOCAB}"),
        ([1], dict(logit_bias={VOCAB: 1.0}), f"logit_bias: token id {VOCAB}"),
        ([1], dict(logprobs=VOCAB + 1), f"logprobs: {VOCAB + 1}; expected at most {VOCAB}"),
        ([1], dict(prompt_logprobs=VOCAB + 1), "prompt_logprobs"),
        ([1], dict(stop="x"), "stop: .*there is no tokenizer"),
        ([1] * 50, dict(max_tokens=50), "need 25 pages of 4, but the cache has 10: raise cache_tokens"),
    ],
)
def test_bad_requests_are_refused_and_others_go_on(prompt, setting, message):
    core = engine(pages=10)
    good = core.add("good", [1, 2], params(4))
    with pytest.raises((TypeError, ValueError), match=message):
        core.add("bad", prompt, SamplingParams(**setting))
    finish(core)
    assert good.completion.token_ids == continuation([1, 2], 4) and idle(core)


def test_full_collections_are_put_off_while_there_are_requests():
    gc.collect()
    before = gc.get_threshold()
    one, other = engine(), engine()
    one.add("a", [1, 2, 3], params(5))
    assert gc.get_threshold() == (*before[:2], before[2] * FACTOR)
    other.add("b", [1, 2, 3], params(5))
    other.add("c", [1, 2, 3], params(5))
    finish(one)
    assert gc.get_threshold() != before
    other.abort("b")
    assert gc.get_threshold() != before
    del other  # with a request that nobody waits for
    gc.collect()
    assert gc.get_threshold() == before


def test_ids_are_of_one_request_at_a_time():
    core = engine()
    core.add("a", [1], params(2))
    with pytest.raises(ValueError, match="request_id: 'a' is in use"):
        core.add("a", [2], params(2))
    with pytest.raises(TypeError, match="priority: 'high'; expected an integer"):
        core.add("b", [2], params(2), priority="high")
    finish(core)
    core.add("a", [2], params(2))


def test_aborting_ends_what_has_not_ended():
    core = engine()
    request, other = core.add("a", [1], params(9, n=2)), core.add("b", [1], params(3))
    for _ in range(3):
        core.step()
    events = core.abort("a")
    assert [e.finish_reason for e in events] == ["abort"] * 2 and core.abort("a") == core.abort("none") == []
    assert request.completion.finished and len(request.completion.token_ids) == 2
    finish(core)
    assert other.completion.token_ids == continuation([1], 3) and idle(core)


class EngineMachine(RuleBasedStateMachine):
    """Requests that begin alike, aborts and failing steps, with so few pages that sequences are preempted."""

    def __init__(self):
        super().__init__()
        self.failure = None
        self.core = engine(9, 3, 4, 8, fail=lambda step: self.failure)
        self.requests = []

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=15), n=st.integers(1, 2), tokens=st.integers(1, 8))
    def add(self, prompt, n, tokens):
        name = str(len(self.requests))
        self.requests.append(self.core.add(name, prompt, params(tokens, n=n), priority=len(prompt) % 2))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data):
        self.core.abort(data.draw(st.sampled_from(self.requests)).id)

    @rule(failure=st.sampled_from([None] * 6 + ["start", "wait"]))
    def step(self, failure):
        self.failure = failure
        self.core.step()
        self.failure = None

    @invariant()
    def answers_are_right_so_far(self):
        for request in self.requests:
            prompt = request.completion.prompt_token_ids
            for output in request.completion.outputs:
                assert output.token_ids == continuation(prompt, len(output.token_ids))
                assert output.finish_reason != "length" or len(output.token_ids) == request.params.max_tokens
                assert (output.finish_reason == "error") == (output.error is not None)
        held = {page for r in self.requests for s in r.sequences for page in s.block_table}
        assert self.core.scheduler.blocks.num_used == len(held)

    def teardown(self):
        for _ in range(2000):
            if not self.core.has_work:
                break
            self.step(None)
        self.answers_are_right_so_far()
        assert idle(self.core) and all(r.completion.finished for r in self.requests)
        assert {s.id for r in self.requests for s in r.sequences} <= self.core.runner.forgotten


EngineMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestEngine = EngineMachine.TestCase


def random_request(chance):
    """A prompt, which may begin like others, and how to continue it."""
    shared = [7] * chance.choice([0, 0, 5, 12])
    prompt = [*shared, *(chance.randrange(VOCAB - 1) for _ in range(chance.randint(1, 14)))]
    return prompt, params(chance.randint(1, 12), n=chance.choice([1, 1, 1, 2]))


def injected(chance, rate):
    return lambda step: chance.choice(["start", "wait"]) if chance.random() < rate else None


def serve(core, count, chance):
    """Requests that come while others run, and of which one in ten is aborted at any time; how they ended."""
    waiting, reasons = [], {}
    for number in range(count):
        prompt, setting = random_request(chance)
        request = core.add(str(number), prompt, setting, priority=chance.randint(0, 2))
        waiting.append(request)
        if chance.random() < 0.1:
            core.abort(chance.choice(waiting).id)
        while len(waiting) > 20 or (number == count - 1 and waiting):
            core.step()
            for request in [r for r in waiting if r.unfinished == 0]:
                waiting.remove(request)
                for output in request.completion.outputs:
                    reasons[output.finish_reason] = reasons.get(output.finish_reason, 0) + 1
                    expected = continuation(request.completion.prompt_token_ids, request.params.max_tokens)
                    assert output.token_ids == expected[: len(output.token_ids)]
                    assert output.finish_reason != "length" or output.token_ids == expected
    core.drain()
    return reasons


def test_ten_thousand_requests_end_in_an_answer_or_an_error_of_their_own():
    chance = random.Random(0)
    core = engine(pages=30, seqs=8, budget=24, fail=injected(chance, 0.01))
    reasons = serve(core, 2000, chance)
    gc.collect()
    objects = len(gc.get_objects())
    for reason, n in serve(core, 8000, chance).items():
        reasons[reason] += n
    gc.collect()
    core.runner.forgotten.clear()
    assert len(gc.get_objects()) < objects + 500
    assert set(reasons) == {"length", "abort", "error"} and 10_000 < sum(reasons.values()) < 15_000
    assert reasons["length"] > 8000 and min(reasons.values()) > 300
    assert core.scheduler.num_preemptions > 100 and core.scheduler.blocks.hit_rate > 0.1 and idle(core)


def async_engine(core):
    llm = LLM.__new__(LLM)
    llm.core, llm._busy = core, False
    return AsyncLLM(llm)


def test_async_clients_that_are_cancelled_end_their_requests():
    chance = random.Random(1)
    reasons = {}

    async def client(server, number):
        prompt, setting = random_request(chance)
        tokens = 0
        async for completion in server.generate(prompt, setting, priority=number % 3):
            assert all(len(o.token_ids) <= setting.max_tokens for o in completion.outputs)
            tokens += 1
            if number % 7 == 0:
                break  # the client leaves
        else:
            assert completion.finished
            for output in completion.outputs:
                reasons[output.finish_reason] = reasons.get(output.finish_reason, 0) + 1
                if output.finish_reason == "length":
                    assert output.token_ids == continuation(prompt, setting.max_tokens)
                else:
                    assert "RunnerError" in output.error

    async def main():
        async with async_engine(engine(pages=30, fail=injected(chance, 0.01))) as server:
            for _ in range(10):
                tasks = [asyncio.create_task(client(server, number)) for number in range(100)]
                await asyncio.sleep(0.002)
                for task in tasks[::9]:
                    task.cancel()
                done = await asyncio.gather(*tasks, return_exceptions=True)
                assert all(result is None or isinstance(result, asyncio.CancelledError) for result in done), done
        return server

    server = asyncio.run(main())
    assert reasons["length"] > 500 and reasons["error"] > 0
    assert idle(server.llm.core) and not server._listeners and not server._thread.is_alive()


def slow(step):
    time.sleep(0.005)


async def last(steps):
    return [completion async for completion in steps][-1]


def test_async_streams_are_tokens_one_by_one():
    async def main():
        async with async_engine(engine()) as server:
            tokens = [token async for token in server.stream([1, 2, 3], params(6))]
            assert [t.token_id for t in tokens] == continuation([1, 2, 3], 6)
            assert [t.finish_reason for t in tokens] == [None] * 5 + ["length"]
            seen = [c async for c in server.generate([1, 2, 3], params(6))]
            assert [len(c.token_ids) for c in seen] == sorted({len(c.token_ids) for c in seen})
            assert seen[-1].finished and seen[-1].token_ids == continuation([1, 2, 3], 6)
            assert all(c.token_ids == continuation([1, 2, 3], len(c.token_ids)) for c in seen)

    asyncio.run(main())


@pytest.mark.parametrize("how", ["break", "aclose", "cancel"])
def test_a_client_that_leaves_is_computed_for_no_longer(how):
    async def leave(server):
        steps = server.generate([1], params(90))
        if how == "cancel":
            task = asyncio.create_task(last(steps))
            while server._core.num_steps < 3:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return
        async for _ in steps:
            break
        if how == "aclose":
            await steps.aclose()

    async def main():
        async with async_engine(engine(fail=slow)) as server:
            await leave(server)
            await last(server.generate([2], params(4)))
            assert server._core.num_steps < 40 and not server._core._requests and not server._listeners

    asyncio.run(main())


def test_async_refusals_concern_one_client():
    async def main():
        async with async_engine(engine(seqs=1, max_waiting=1, fail=slow)) as server:
            good = asyncio.create_task(last(server.generate([1, 2], params(90), request_id="good")))
            await asyncio.sleep(0.01)
            with pytest.raises(ValueError, match="prompt: empty"):
                await last(server.generate([], params(2)))
            with pytest.raises(TypeError, match="prompt: .*expected a text, or token ids"):
                await last(server.generate([None], params(2)))
            with pytest.raises(ValueError, match="'good' is in use"):
                await last(server.generate([1], params(2), request_id="good"))
            with pytest.raises(QueueFullError, match="try again later"):
                await last(server.generate([1], params(2, n=2)))
            assert (await good).token_ids == continuation([1, 2], 90)
            aborted = server.generate([3], params(90), request_id="aborted")
            await anext(aborted)
            server.abort("aborted")
            server.abort("nobody")
            assert (await last(aborted)).finish_reason == "abort"
            endless = server.generate([4], params(90))
            await anext(endless)
        with pytest.raises(RuntimeError, match="the engine was closed"):
            await last(endless)
        with pytest.raises(RuntimeError, match="the engine was closed"):
            await last(server.generate([1], params(2)))

    asyncio.run(main())


def test_an_engine_that_breaks_tells_everyone(monkeypatch):
    async def main():
        server = async_engine(engine(fail=slow))
        steps = server.generate([1], params(90))
        await anext(steps)
        monkeypatch.setattr(server._core, "step", lambda: 1 / 0)
        with pytest.raises(RuntimeError, match="the engine has failed: ZeroDivisionError"):
            while True:
                await anext(steps)
        with pytest.raises(RuntimeError, match="the engine has failed"):
            await anext(server.generate([1], params(2)))
        server.close()

    monkeypatch.setattr("threading.excepthook", lambda arguments: None)
    asyncio.run(main())


def test_garbage_is_no_token_of_anyones():
    assert GARBAGE not in continuation([1, 2, 3], 2000)
