"""The engine for servers: requests come and go at any time, tokens are streamed, steps run in a thread of their own."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from octavo.engine.core import Event, Request
from octavo.engine.llm import LLM, Message, Prompt, Token
from octavo.engine.outputs import Completion, CompletionOutput
from octavo.engine.params import SamplingParams

CLOSED = "the engine was closed"


@dataclass(eq=False)
class _Listener:
    """Who waits for a request: its event loop, and what has come since it looked last."""

    loop: asyncio.AbstractEventLoop
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    events: list[Event] = field(default_factory=list)
    error: Exception | None = None

    def deliver(self, events: list[Event], error: Exception | None = None) -> None:
        """In the loop's thread."""
        self.events += events
        self.error = error
        self.arrived.set()

    async def take(self) -> list[Event]:
        await self.arrived.wait()
        self.arrived.clear()
        if self.error is not None:
            raise self.error
        events, self.events = self.events, []
        return events


class AsyncLLM:
    """An `LLM` that serves requests as they come, to any event loops; close it, or use it with `async with`.

    Args:
        model: as `LLM` takes it; or an `LLM`, which is nobody else's until this is closed.
        options: those of `LLM`. Where more than `max_waiting` would wait, they are refused.

    Raises:
        FileNotFoundError, ValueError: what `LLM` raises.
        RuntimeError: the LLM is busy.
    """

    def __init__(self, model: str | LLM, **options: Any) -> None:
        self.llm = model if isinstance(model, LLM) else LLM(model, **options)
        self._core = self.llm.core
        self.llm.take()
        self._changed = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._closed: str | None = None
        self._listeners: dict[str, _Listener] = {}  # like the core, touched in the engine's thread alone
        self._numbers = count(1)
        self._thread = threading.Thread(target=self._serve, name="octavo-engine", daemon=True)
        self._thread.start()

    async def generate(
        self,
        prompt: Prompt | list[Message],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncIterator[Completion]:
        """Continues one prompt (text, token ids, or a conversation).

        Whoever stops iterating, or is cancelled, ends the request. To who is slow several tokens come at once.

        Args:
            prompt: what to continue.
            params: how; `SamplingParams()` by default.
            request_id: for `abort`; by default a number.
            priority: the smaller goes first.

        Yields:
            All that there is by now; the last is finished. A request that fails while it is computed ends with the
            finish_reason "error", and `error` says why; others go on.

        Raises:
            TypeError, ValueError: an invalid request, or an id that is in use.
            QueueFullError: too many wait.
            RuntimeError: the engine was closed.
        """
        seen: Completion | None = None
        async with aclosing(self._events(prompt, params, request_id, priority)) as steps:
            async for events in steps:
                whole = events[0].request.completion  # which the engine's thread goes on writing to
                if seen is None:
                    seen = replace(whole, outputs=[_blank(output) for output in whole.outputs])
                for event in events:
                    _add(seen.outputs[event.output.index], event)
                outputs = [_copy(output) for output in seen.outputs]
                yield whole if seen.finished else replace(whole, outputs=outputs)

    async def stream(
        self,
        prompt: Prompt | list[Message],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncIterator[Token]:
        """Continues one prompt, token by token; otherwise as `generate`.

        Raises:
            TypeError, ValueError, QueueFullError: as `generate`.
            RuntimeError: the request failed or was aborted, or the engine was closed.
        """
        async with aclosing(self._events(prompt, params, request_id, priority)) as steps:
            async for events in steps:
                for event in events:
                    if event.token_id is None:
                        raise RuntimeError(event.output.error or f"request {event.request.id}: aborted")
                    yield Token(event.output.index, event.token_id, event.text, event.finish_reason)

    def abort(self, request_id: str) -> None:
        """Ends a request, with the finish_reason "abort"; nothing where there is none of that id."""
        self._submit(lambda: self._publish(self._core.abort(request_id)))

    def close(self) -> None:
        """Ends the thread; requests that are not finished raise RuntimeError."""
        with self._changed:
            self._closed = self._closed or CLOSED
            self._changed.notify()
        self._thread.join()

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.to_thread(self.close)

    async def _events(
        self, prompt: Prompt | list[Message], params: SamplingParams | None, request_id: str | None, priority: int
    ) -> AsyncGenerator[list[Event], None]:
        """What each step has brought to a request, until all its continuations have ended."""
        arrival = time.monotonic()
        params = params or SamplingParams()
        ids = self.llm.encode(prompt)
        self._core.check(ids, params)
        name = str(next(self._numbers)) if request_id is None else request_id
        listener = _Listener(asyncio.get_running_loop())

        def add() -> None:
            try:
                self._core.add(name, ids, params, priority=priority, incremental=True, arrival=arrival)
            except Exception as error:
                self._tell(listener, [], error)
            else:
                self._listeners[name] = listener

        def drop() -> None:
            if self._listeners.get(name) is listener:
                del self._listeners[name]
                self._core.abort(name)

        self._submit(add)
        left = params.n
        try:
            while left:
                events = await listener.take()
                left -= sum(event.finish_reason is not None for event in events)
                yield events
        finally:
            if left:
                self._submit(drop, late=True)

    def _submit(self, command: Callable[[], None], late: bool = False) -> None:
        """Has the engine's thread do something between two steps; after the end only what is `late` may be left out."""
        with self._changed:
            if self._closed is not None:
                if late:
                    return
                raise RuntimeError(self._closed)
            self._commands.append(command)
            self._changed.notify()

    def _serve(self) -> None:
        """The engine's thread."""
        try:
            while self._closed is None:
                with self._changed:
                    while not (self._commands or self._core.has_work or self._closed):
                        self._changed.wait()
                    commands, self._commands = self._commands, []
                for command in commands:
                    command()
                self._publish(self._core.step())
        except BaseException as error:
            self._closed = f"the engine has failed: {type(error).__name__}: {error}"
            raise
        finally:
            self._end()

    def _end(self) -> None:
        with self._changed:
            assert self._closed is not None
            commands, self._commands = self._commands, []
        for command in commands:  # whose requests are told, too
            command()
        for name, listener in self._listeners.items():
            self._core.abort(name)
            self._tell(listener, [], RuntimeError(self._closed))
        self._listeners.clear()
        self._core.drain()
        self.llm.give_back()

    def _publish(self, events: Iterable[Event]) -> None:
        by_request: dict[Request, list[Event]] = {}
        for event in events:
            by_request.setdefault(event.request, []).append(event)
        for request, of_it in by_request.items():
            listener = self._listeners.get(request.id)
            if listener is not None:
                if request.unfinished == 0:
                    del self._listeners[request.id]
                if not self._tell(listener, of_it):
                    self._core.abort(request.id)

    @staticmethod
    def _tell(listener: _Listener, events: list[Event], error: Exception | None = None) -> bool:
        """False where nobody is there any more, since the event loop was closed."""
        try:
            listener.loop.call_soon_threadsafe(listener.deliver, events, error)
        except RuntimeError:
            return False
        return True


def _blank(output: CompletionOutput) -> CompletionOutput:
    return CompletionOutput(output.index, logprobs=None if output.logprobs is None else [])


def _add(output: CompletionOutput, event: Event) -> None:
    output.text += event.text
    output.finish_reason = event.finish_reason
    if event.token_id is not None:
        output.token_ids.append(event.token_id)
        output.token_times.append(event.time)
    if output.logprobs is not None and event.logprobs is not None:
        output.logprobs.append(event.logprobs)


def _copy(output: CompletionOutput) -> CompletionOutput:
    logprobs = None if output.logprobs is None else list(output.logprobs)
    return replace(output, token_ids=list(output.token_ids), token_times=list(output.token_times), logprobs=logprobs)
