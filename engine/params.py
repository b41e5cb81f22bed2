"""How a request wants its tokens chosen, and when it is done. No torch here."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import isfinite, isnan
from numbers import Integral, Real
from typing import Any

INFINITY = float("inf")
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda x: 0 <= x < INFINITY, "a finite number of at least 0 (0 is greedy)"),
    "top_p": (lambda x: 0 < x <= 1, "more than 0 and at most 1 (1 is off)"),
    "min_p": (lambda x: 0 <= x <= 1, "0 to 1 (0 is off)"),
    "repetition_penalty": (lambda x: 0 < x < INFINITY, "more than 0 (1 is off)"),
    "presence_penalty": (lambda x: -2 <= x <= 2, "-2 to 2 (0 is off)"),
    "frequency_penalty": (lambda x: -2 <= x <= 2, "-2 to 2 (0 is off)"),
}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt. Names and defaults are vLLM's, but that 0 turns `top_k` off.

    Args:
        n: how many continuations of the prompt, at least 1. With a seed, continuation i draws with seed + i.
        max_tokens: the most tokens to generate, at least 1; None for as many as the context has room for.
        min_tokens: no end-of-sequence token, stop token or stop string ends it before that many tokens.
        temperature: 0 is greedy; otherwise logits are divided by it before sampling.
        top_k: sample among that many of the most probable tokens; 0 is off.
        top_p: sample among the most probable tokens that together hold this much of the probability; 1 is off.
        min_p: sample among the tokens at least this much as probable as the most probable one; 0 is off.
        repetition_penalty: logits of tokens in prompt or output are divided by it where positive, multiplied where not;
            1 is off.
        presence_penalty: taken from the logits of tokens that are in the output; 0 is off.
        frequency_penalty: taken from them once for each time that they are there; 0 is off.
        seed: makes sampling reproducible whatever else is in the batch; None draws a fresh one.
        stop: strings that end the text, one or several; the text returned ends before the first that occurs.
        stop_token_ids: tokens that end it like the model's own end-of-sequence tokens, also with `ignore_eos`.
        ignore_eos: go on after the model's end-of-sequence token.
        logprobs: also return log-probabilities of each token, and of that many of the most probable in its place.
        prompt_logprobs: the same of the prompt's tokens; such a request takes nothing from the prefix cache.
        logit_bias: added to the logits of these token ids; -inf forbids one.

    Raises:
        TypeError: a value of another type than the field has.
        ValueError: a value out of range.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | tuple[str, ...] | list[str] | None = ()
    stop_token_ids: tuple[int, ...] | list[int] | None = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        for name, least in (("n", 1), ("max_tokens", 1), ("min_tokens", 0), ("logprobs", 0), ("prompt_logprobs", 0)):
            if getattr(self, name) is not None or name in ("n", "min_tokens"):
                _check_int(name, getattr(self, name), least)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens: {self.min_tokens}; expected at most max_tokens, {self.max_tokens}")
        if self.seed is not None:
            _check_int("seed", self.seed)
        _check_int("top_k", self.top_k, 0, "0 is off")
        for name, (fits, expected) in _RANGES.items():
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool):
                raise TypeError(f"{name}: {value!r}; expected a number")
            if not fits(value):
                raise ValueError(f"{name}: {value}; expected {expected}")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", _tuple("stop", stop, "strings"))
        for value in self.stop_strings:
            if not isinstance(value, str):
                raise TypeError(f"stop: {value!r}; expected strings")
            if not value:
                raise ValueError("stop: an empty string; expected at least one character")
        ids = _tuple("stop_token_ids", self.stop_token_ids, "several integers")
        for value in ids:
            _check_int("stop_token_ids", value, 0)
        object.__setattr__(self, "stop_token_ids", tuple(map(int, ids)))
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _bias(self.logit_bias))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        assert isinstance(self.stop, tuple)  # since __post_init__
        return self.stop

    @property
    def has_penalties(self) -> bool:
        """Whether what the output holds changes what comes next."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _check_int(name: str, value: Any, least: int | None = None, off: str = "") -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name}: {value!r}; expected an integer")
    if least is not None and not least <= int(value) < 2**31:
        raise ValueError(f"{name}: {value}; expected at least {least}" + (f" ({off})" if off else ""))


def _tuple(name: str, values: Iterable[Any] | None, kind: str) -> tuple[Any, ...]:
    if values is not None and not isinstance(values, Iterable):
        raise TypeError(f"{name}: {values!r}; expected {kind}")
    return tuple(values or ())


def _bias(biases: Any) -> dict[int, float]:
    if not isinstance(biases, Mapping):
        raise TypeError(f"logit_bias: {biases!r}; expected a mapping of token ids to numbers")
    for token, bias in biases.items():
        _check_int("logit_bias", token, 0)
        if not isinstance(bias, Real) or isinstance(bias, bool):
            raise TypeError(f"logit_bias: {bias!r}; expected a number")
        if isnan(bias) or not (isfinite(bias) or bias < 0):
            raise ValueError(f"logit_bias: {bias} for token {token}; expected a finite number, or -inf to forbid it")
    return {int(token): float(bias) for token, bias in biases.items()}
