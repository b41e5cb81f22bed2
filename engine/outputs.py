"""What requests get: text as tokens come, until a stop string; log-probabilities; times."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from octavo.engine.sequence import TokenLogprobs
from octavo.engine.tokenizer import TokenStream

if TYPE_CHECKING:
    from octavo.engine.tokenizer import Tokenizer


@dataclass
class CompletionOutput:
    """One continuation of a prompt.

    `finish_reason` is None while it goes on, "stop" at an end-of-sequence token, a stop token or a stop string,
    "length" at `max_tokens` or the end of the context, "abort", or "error", of which `error` tells more. `stop_reason`
    is the stop string or stop token, None at the model's own end. `token_ids` hold what ended it, `text` does not.
    `token_times` are the times at which tokens were known, by `time.monotonic`.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] | None = None
    token_times: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """The log-probability of all its tokens, where log-probabilities were wanted."""
        return None if self.logprobs is None else sum(token.logprob for token in self.logprobs)


@dataclass
class Timings:
    """When a request arrived, was first scheduled, had its first token and was done, by `time.monotonic`."""

    arrival: float
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def latency(self) -> float | None:
        return None if self.finished is None else self.finished - self.arrival


@dataclass
class Completion:
    """What became of one prompt: `outputs` has `params.n` continuations; what the first is, this is too.

    `prompt_logprobs` has an entry for each token of the prompt but the first. `num_cached_tokens` is how much of the
    prompt the prefix cache had.
    """

    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    timings: Timings
    request_id: str = ""
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = 0

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        return self.outputs[0].logprobs

    @property
    def error(self) -> str | None:
        """The first error among the continuations."""
        return next((output.error for output in self.outputs if output.error is not None), None)

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)


def refused(prompt: list[int], n: int, error: str) -> Completion:
    """What becomes of an invalid request."""
    outputs = [CompletionOutput(i, finish_reason="error", error=error) for i in range(n)]
    return Completion(prompt, outputs, Timings(time.monotonic()))


class TextStream:
    """Turns tokens into text as they come, until one of `stop` occurs, in one token or over several.

    Text is handed out once it can't be the beginning of a stop string any more. Before `min_tokens` tokens a stop
    string is text like any other.
    """

    def __init__(self, tokenizer: "Tokenizer", stop: tuple[str, ...] = (), min_tokens: int = 0) -> None:
        self._tokens = TokenStream(tokenizer)
        self._stop = stop
        self._min_tokens = min_tokens
        self._count = 0
        self._held = ""

    def push(self, token_id: int) -> tuple[str, str | None]:
        """Takes a token; returns the text that became final, and the stop string that ended it, if one did."""
        self._count += 1
        return self._take(self._tokens.push(token_id), held_back=True)

    def flush(self) -> tuple[str, str | None]:
        """Ends the stream; returns what was held back, up to a stop string if there is one in it."""
        return self._take(self._tokens.flush(), held_back=False)

    def _take(self, text: str, held_back: bool) -> tuple[str, str | None]:
        if not self._stop:
            return text, None
        text = self._held + text
        if self._count >= self._min_tokens:
            found = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
            if found:
                at, stop = min(found)
                self._held = ""
                return text[:at], stop
        self._held = text[len(text) - self._may_begin_stop(text) :] if held_back else ""
        return text[: len(text) - len(self._held)], None

    def _may_begin_stop(self, text: str) -> int:
        """The length of the longest end of a text that a stop string begins with."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
