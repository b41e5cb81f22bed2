"""A request on its way through the engine. No torch here."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt.

    Args:
        max_tokens: the most tokens to generate, at least 1.
        temperature: 0 is greedy; otherwise logits are divided by it before sampling.
        top_k: sample among that many of the most probable tokens; 0 is off.
        top_p: sample among the most probable tokens that together hold this much of the probability; 1 is off.
        min_p: sample among the tokens at least this much as probable as the most probable one; 0 is off.
        seed: makes sampling reproducible whatever else is in the batch; None draws a fresh one.
        ignore_eos: go on after the model's end-of-sequence token.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: {self.max_tokens}; expected at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: {self.temperature}; expected a finite number of at least 0 (0 is greedy)")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k: {self.top_k}; expected at least 0 (0 is off)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p}; expected more than 0 and at most 1 (1 is off)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p: {self.min_p}; expected 0 to 1 (0 is off)")


@dataclass(eq=False)
class Sequence:
    """Tokens so far, how many of them are in the cache, and the pages that hold them."""

    id: int
    token_ids: list[int]
    params: SamplingParams
    prompt_length: int = field(init=False)
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.prompt_length = len(self.token_ids)

    @property
    def generated(self) -> list[int]:
        return self.token_ids[self.prompt_length :]

    @property
    def remaining(self) -> int:
        """Tokens not yet in the cache: the rest of the prompt, or the one token just sampled."""
        return len(self.token_ids) - self.num_computed

    @property
    def max_length(self) -> int:
        return self.prompt_length + self.params.max_tokens
