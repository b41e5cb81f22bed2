"""Requests in, tokens out: the CPU prepares step n + 1 while the device computes step n. No torch here.

`step` schedules and starts a step, and only then waits for the one before: what that sampled is fed to the next on the
device, and looked at here while it runs. So stop conditions are checked one step late, and what a sequence has sampled
beyond its end is dropped.
"""

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

from octavo.engine.garbage import FullCollectionsPutOff
from octavo.engine.outputs import Completion, CompletionOutput, TextStream, Timings
from octavo.engine.params import SamplingParams
from octavo.engine.scheduler import Scheduler
from octavo.engine.sequence import Chunk, Sampled, Sequence, Step, TokenLogprobs

if TYPE_CHECKING:
    from octavo.engine.tokenizer import Tokenizer

NO_TOKEN = (
    "its logits hold NaN or infinities, or all are forbidden, so no token can be drawn; a model computed in fp16 may "
    "overflow: try dtype=torch.bfloat16 or torch.float32"
)


class Pending(Protocol):
    """A step that was started."""

    def wait(self) -> list[Sampled]:
        """What its chunks that sample have sampled, in their order; waits for the device."""
        ...


class Runner(Protocol):
    """Computes steps, in the order in which they are started."""

    def start(self, step: Step) -> Pending: ...

    def forget(self, sequence: Sequence) -> None:
        """Drops what it keeps for a sequence, which has ended, or will be computed anew."""
        ...


@dataclass(eq=False)
class Request:
    """A prompt on its way: a sequence for each of its continuations, and what became of them."""

    id: str
    params: SamplingParams
    sequences: list[Sequence]
    completion: Completion
    streams: list[TextStream] | None  # where text is wanted as tokens come
    unfinished: int


class Event(NamedTuple):
    """What a step has brought to a continuation: a token, the text that became final, and the end, or the end alone."""

    request: Request
    output: CompletionOutput
    token_id: int | None
    text: str
    finish_reason: str | None
    time: float
    logprobs: TokenLogprobs | None = None


@dataclass
class _Started:
    step: Step
    pending: Pending
    dropped: set[int] = field(default_factory=set)  # ids of sequences whose tokens nobody wants any more


class EngineCore:
    """Schedules, runs and finishes requests.

    Args:
        runner: computes steps.
        scheduler: decides on them.
        tokenizer: makes text of tokens; without one there is none, and no stop strings.
        vocab_size: token ids are below it.
        max_model_len: tokens of prompt and output together, at most.
        eos_token_ids: end a text, unless its request ignores them.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        tokenizer: "Tokenizer | None",
        *,
        vocab_size: int,
        max_model_len: int,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.eos_token_ids = frozenset(eos_token_ids)
        self.num_steps = 0
        self._requests: dict[str, Request] = {}
        self._of: dict[int, tuple[Request, CompletionOutput]] = {}  # by id of the sequence
        self._started: _Started | None = None
        self._put_off: FullCollectionsPutOff | None = None  # while there are requests
        self._count = 0

    @property
    def has_work(self) -> bool:
        return self._started is not None or self.scheduler.has_work

    def check(self, prompt: list[int], params: SamplingParams, name: str = "prompt") -> None:
        """Raises TypeError or ValueError for what `add` would refuse however little there is to do."""
        if not prompt:
            raise ValueError(f"{name}: empty; expected at least one token")
        if len(prompt) >= self.max_model_len:
            raise ValueError(
                f"{name}: {len(prompt)} tokens, but the context holds {self.max_model_len} and needs room for at least "
                "one more: shorten the prompt"
            )
        self._check_ids(name, prompt)
        self._check_ids("stop_token_ids", params.stop_token_ids or ())
        self._check_ids("logit_bias", params.logit_bias or ())
        for setting in ("logprobs", "prompt_logprobs"):
            if (getattr(params, setting) or 0) > self.vocab_size:
                raise ValueError(f"{setting}: {getattr(params, setting)}; expected at most {self.vocab_size}")
        if params.stop and self.tokenizer is None:
            raise ValueError(f"stop: {params.stop}, but there is no tokenizer")
        self.scheduler.check(len(prompt), self._max_length(prompt, params))

    def _check_ids(self, name: str, ids: Collection[int]) -> None:
        if set(map(type, ids)) - {int}:
            wrong = next(token for token in ids if type(token) is not int)
            raise TypeError(f"{name}: {wrong!r}; expected token ids, which are integers")
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            wrong = next(token for token in ids if not 0 <= token < self.vocab_size)
            raise ValueError(f"{name}: token id {wrong}; expected 0 to {self.vocab_size - 1}")

    def _max_length(self, prompt: list[int], params: SamplingParams) -> int:
        return min(len(prompt) + (params.max_tokens or self.max_model_len), self.max_model_len)

    def add(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        incremental: bool = False,
        arrival: float | None = None,
    ) -> Request:
        """Queues a request.

        Args:
            request_id: of none that is there.
            prompt: token ids.
            params: how to continue it.
            priority: the smaller goes first.
            incremental: make text as tokens come; else it is there at the end.
            arrival: when it came, by `time.monotonic`; by default now.

        Raises:
            TypeError, ValueError: what `check` raises, or an id that is taken.
            QueueFullError: too many wait.
        """
        if request_id in self._requests:
            raise ValueError(f"request_id: {request_id!r} is in use")
        if type(priority) is not int:
            raise TypeError(f"priority: {priority!r}; expected an integer, smaller ones go first")
        self.check(prompt, params)
        sequences = []
        for index in range(params.n):
            own = params
            if params.n > 1:
                own = replace(params, n=1, seed=None if params.seed is None else params.seed + index)
            stops = frozenset(own.stop_token_ids or ()) | (frozenset() if own.ignore_eos else self.eos_token_ids)
            max_length = self._max_length(prompt, own)
            sequences.append(Sequence(self._count, list(prompt), own, max_length, stops, priority, self._count))
            self._count += 1
        self.scheduler.add(*sequences)
        logprobs = params.logprobs is not None
        outputs = [CompletionOutput(index, logprobs=[] if logprobs else None) for index in range(params.n)]
        streams = None
        if self.tokenizer is not None and (incremental or params.stop):
            stop = (params.stop_strings, params.min_tokens)
            streams = [TextStream(self.tokenizer, *stop) for _ in sequences]
        timings = Timings(time.monotonic() if arrival is None else arrival)
        completion = Completion(prompt, outputs, timings, request_id)
        request = Request(request_id, params, sequences, completion, streams, len(sequences))
        self._requests[request_id] = request
        self._put_off = self._put_off or FullCollectionsPutOff()
        for sequence, output in zip(sequences, outputs, strict=True):
            self._of[sequence.id] = request, output
        return request

    def abort(self, request_id: str) -> list[Event]:
        """Ends what of a request has not ended, with the reason "abort"; nothing where there is no such request."""
        request = self._requests.get(request_id)
        sequences = [] if request is None else request.sequences
        return [self._end(sequence, "abort") for sequence in sequences if sequence.id in self._of]

    def step(self) -> list[Event]:
        """Starts a step, and returns what the one before has brought."""
        step = self.scheduler.schedule()
        failure: BaseException | None = None
        started = None
        if step:
            self._note_begin(step)
            try:
                started = _Started(step, self.runner.start(step))
            except BaseException as error:  # whatever ends this, the step must not count as computed
                failure = error
        before, self._started = self._started, started
        if before is None and not step and self.scheduler.has_work:
            raise RuntimeError("requests wait, but no step can be made of them")  # lest a caller wait for ever
        events: list[Event] = []
        try:
            if before is not None:
                self._process(before, events)
        finally:
            if failure is not None:
                self._fail(step, failure, events)
        return events

    def drain(self) -> None:
        """Waits for the step that runs, where its tokens are wanted by nobody."""
        if self._started is not None and not self.scheduler.has_work:
            before, self._started = self._started, None
            self._process(before, [])

    def _note_begin(self, step: Step) -> None:
        self.num_steps += 1
        now = time.monotonic()
        for sequence, start, _, _ in step.chunks:
            if start == sequence.num_cached:
                completion = self._of[sequence.id][0].completion
                if completion.timings.first_scheduled is None:
                    completion.timings.first_scheduled = now
                    completion.num_cached_tokens = start

    def _process(self, started: _Started, events: list[Event]) -> None:
        try:
            results = started.pending.wait()
        except BaseException as error:
            self._fail(started.step, error, events)
            return
        now = time.monotonic()
        samples = [chunk for chunk in started.step.chunks if chunk.samples]
        for chunk, sampled in zip(samples, results, strict=True):
            if chunk.sequence.finish_reason is None and chunk.sequence.id not in started.dropped:
                events.append(self._take(chunk, sampled, now))

    def _take(self, chunk: Chunk, sampled: Sampled, now: float) -> Event:
        """Notes a token, and whether it ends its sequence."""
        sequence, token = chunk.sequence, sampled.token_id
        request, output = self._of[sequence.id]
        if token < 0:
            return self._end(sequence, "error", f"request {request.id}: {NO_TOKEN}")
        self.scheduler.update(chunk, token)
        output.token_ids.append(token)
        output.token_times.append(now)
        if len(output.token_ids) == 1:
            if request.completion.timings.first_token is None:
                request.completion.timings.first_token = now
            if sampled.prompt_logprobs is not None and request.completion.prompt_logprobs is None:
                request.completion.prompt_logprobs = sampled.prompt_logprobs
        logprobs = None
        if output.logprobs is not None and sampled.logprob is not None:
            logprobs = TokenLogprobs(token, sampled.logprob, sampled.top or [])
            output.logprobs.append(logprobs)
        reason, text = None, ""
        if token in sequence.stop_token_ids and len(output.token_ids) > sequence.params.min_tokens:
            reason = "stop"
            output.stop_reason = None if token in self.eos_token_ids and not sequence.params.ignore_eos else token
        else:
            if request.streams is not None:
                text, output.stop_reason = request.streams[output.index].push(token)
                output.text += text
            if output.stop_reason is not None:
                reason = "stop"
            elif len(sequence.token_ids) >= sequence.max_length:
                reason = "length"
        if reason is not None:
            text += self._finish(sequence, reason)
        return Event(request, output, token, text, output.finish_reason, now, logprobs)

    def _finish(self, sequence: Sequence, reason: str, error: str | None = None) -> str:
        """Ends a sequence; returns the rest of its text."""
        request, output = self._of.pop(sequence.id)
        self.scheduler.finish(sequence, reason)
        self.runner.forget(sequence)
        output.finish_reason, output.error = reason, error
        rest = ""
        if request.streams is not None:
            if not isinstance(output.stop_reason, str):
                rest, stop = request.streams[output.index].flush()
                if stop is not None and error is None:
                    output.finish_reason, output.stop_reason = "stop", stop
                output.text += rest
        elif self.tokenizer is not None:
            by_token = reason == "stop"  # stop strings have streams
            output.text = self.tokenizer.decode(output.token_ids[:-1] if by_token else output.token_ids)
        request.unfinished -= 1
        if request.unfinished == 0:
            request.completion.timings.finished = time.monotonic()
            del self._requests[request.id]
            if not self._requests:
                self._put_off = None
        return rest

    def _end(self, sequence: Sequence, reason: str, message: str | None = None) -> Event:
        """Ends a sequence without another token."""
        request, output = self._of[sequence.id]
        text = self._finish(sequence, reason, message)
        return Event(request, output, None, text, output.finish_reason, time.monotonic())

    def _fail(self, step: Step, error: BaseException, events: list[Event]) -> None:
        """Ends the requests of a step that failed; raises what is no error but an end, such as KeyboardInterrupt."""
        message = f"{type(error).__name__}: {error}"
        again = self.scheduler.fail(step)
        for chunk in step.chunks:
            if chunk.sequence.id in self._of:
                request = self._of[chunk.sequence.id][0]
                events.append(self._end(chunk.sequence, "error", f"request {request.id}: {message}"))
        for sequence in again:
            self.runner.forget(sequence)
        if self._started is not None and self._started.step is not step:
            self._started.dropped.update(sequence.id for sequence in again)
        if not isinstance(error, Exception):
            raise error
