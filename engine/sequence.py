"""A continuation on its way through the engine, and what one step computes of it. No torch here."""

from dataclasses import dataclass, field
from typing import NamedTuple

from octavo.engine.params import SamplingParams


@dataclass(eq=False)
class Sequence:
    """Tokens so far, how many of them a scheduled step has put into the cache, and the pages that hold them.

    The scheduler runs a step ahead of what is known: `num_computed` counts what scheduled steps write, and `in_flight`
    the tokens that they sample and that nobody has seen yet. So `token_ids` may be shorter than what is computed; a
    position from `len(token_ids)` on is filled, on the device, with what the step before sampled.

    `stop_token_ids` end it (those of the model too, unless it ignores them) and may not be sampled before
    `params.min_tokens`. `max_length` is that of prompt and output together, which the context limits. `rank` orders
    sequences: the smaller goes first.
    """

    id: int
    token_ids: list[int]
    params: SamplingParams
    max_length: int = 0  # by default that of prompt and params.max_tokens
    stop_token_ids: frozenset[int] = frozenset()
    priority: int = 0
    arrival: int = 0
    prompt_length: int = field(init=False)
    num_computed: int = 0
    in_flight: int = 0  # 1, and for a moment 2: between scheduling a step and learning what the one before has sampled
    block_table: list[int] = field(default_factory=list)
    slot: int | None = None  # its row of the persistent batch, while it runs
    num_cached: int = 0  # tokens that the prefix cache had when it was last admitted
    page_keys: list[bytes] = field(default_factory=list)  # of its full pages, as far as they were needed yet
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.prompt_length = len(self.token_ids)
        if self.max_length == 0:
            assert self.params.max_tokens is not None
            self.max_length = self.prompt_length + self.params.max_tokens

    @property
    def rank(self) -> tuple[int, int]:
        return self.priority, self.arrival

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.in_flight

    @property
    def remaining(self) -> int:
        """Tokens that no scheduled step has computed: of the prompt, or the one just sampled, known or not."""
        return len(self.token_ids) + self.in_flight - self.num_computed

    @property
    def generated(self) -> list[int]:
        return self.token_ids[self.prompt_length :]


class Chunk(NamedTuple):
    """`length` tokens of a sequence from position `start` on, which one step computes; values do not move later.

    `samples` says whether it reaches the last token that there is by then, so that the next one is sampled: its
    position is `end`, and `end - sequence.prompt_length` tokens were sampled before it.
    """

    sequence: Sequence
    start: int
    length: int
    samples: bool

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class Step:
    """What one step computes: chunks of one token first, then longer ones; of any sequence at most one."""

    chunks: list[Chunk]
    number: int = 0  # steps are counted

    def __bool__(self) -> bool:
        return bool(self.chunks)

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


class TokenLogprobs(NamedTuple):
    """Of one token: its id, its log-probability, and the most probable in its place, as (id, log-probability)."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class Sampled(NamedTuple):
    """What a chunk that samples has sampled.

    `token_id` is -1 where no token could be drawn, since logits hold NaN, say; the next step, which has been started,
    must put up with it, but nobody looks at what it computes for this sequence. `logprob` and `top`, the most probable
    as (id, log-probability), are there where the request wants them. `prompt_logprobs`, where it wants those, are of
    the prompt's tokens but the first; they come with the first token.
    """

    token_id: int
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
