"""Requests to measure with: how long they are, what they say, and when they arrive; the same for the same seed."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

DISTRIBUTIONS = ("fixed", "uniform", "normal")


@dataclass(frozen=True)
class Request:
    """`output` tokens are generated, whatever they are; `arrival` is seconds after the run's beginning."""

    prompt: tuple[int, ...]
    output: int
    arrival: float = 0.0


@dataclass(frozen=True)
class Lengths:
    """How long prompts and outputs are.

    `kind` is "fixed"; "uniform", within ± `spread` of the length; "normal", with a standard deviation of `spread` times
    the length, at least one token; or "file": `pairs`, one a request, over and over.
    """

    input_len: int = 1024
    output_len: int = 128
    kind: str = "fixed"
    spread: float = 0.0
    pairs: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for name, value in (("input_len", self.input_len), ("output_len", self.output_len)):
            if value < 1:
                raise ValueError(f"{name}: {value}; expected at least 1")

    @classmethod
    def parse(cls, text: str, input_len: int, output_len: int) -> "Lengths":
        """Reads "fixed", "uniform:0.5", "normal:0.25", or a file with a prompt's and an output's length on each line.

        Raises:
            ValueError: none of these; a line that does not hold two numbers.
        """
        kind, _, spread = text.partition(":")
        if kind in DISTRIBUTIONS:
            return cls(input_len, output_len, kind, _spread(text, kind, spread))
        path = Path(text)
        if not path.is_file():
            raise ValueError(f"lengths: {text!r}; expected fixed, uniform:SHARE, normal:SHARE, or a file of lengths")
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{path}: empty; expected a prompt's and an output's length on each line")
        return cls(input_len, output_len, "file", pairs=tuple(_pair(path, line) for line in lines))

    def draw(self, count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
        """Lengths of prompt and output of so many requests."""
        if self.kind == "file":
            return [self.pairs[i % len(self.pairs)] for i in range(count)]
        columns = []
        for length in (self.input_len, self.output_len):
            if self.kind == "uniform":
                low, high = max(int(length * (1 - self.spread)), 1), int(length * (1 + self.spread))
                columns.append(rng.integers(low, high, count, endpoint=True))
            else:
                columns.append(rng.normal(length, self.spread * length, count).round().clip(1).astype(int))
        return list(zip(*(column.tolist() for column in columns), strict=True))


def _spread(text: str, kind: str, spread: str) -> float:
    if kind == "fixed" and not spread:
        return 0.0
    try:
        value = float(spread)
    except ValueError:
        value = -1.0
    if kind == "fixed" or not 0 < value < 1:
        expected = "no share" if kind == "fixed" else f"a share of the length between 0 and 1, as in {kind}:0.25"
        raise ValueError(f"lengths: {text!r}; expected {expected}")
    return value


def _pair(path: Path, line: str) -> tuple[int, int]:
    try:
        prompt, output = (int(part) for part in line.replace(",", " ").split())
    except ValueError:
        prompt = output = 0
    if prompt < 1 or output < 1:
        raise ValueError(f"{path}: {line!r}; expected a prompt's and an output's length, two numbers of at least 1")
    return prompt, output


def arrivals(count: int, request_rate: float | None, rng: np.random.Generator) -> list[float]:
    """When requests come: all at once, or in a Poisson process of so many a second that begins with the first."""
    if request_rate is None:
        return [0.0] * count
    return [0.0, *rng.exponential(1 / request_rate, count - 1).cumsum().tolist()]


@dataclass(frozen=True)
class Workload:
    """Which requests to serve.

    Args:
        lengths: of prompts and outputs.
        num_prompts: how many requests.
        request_rate: requests a second, on average; None where all come at once.
        prefix_len: so many tokens are the same in all prompts of a run, in front of those that `lengths` says.
        seed: of all that is drawn.

    Raises:
        ValueError: a value out of range.
    """

    lengths: Lengths
    num_prompts: int = 1
    request_rate: float | None = None
    prefix_len: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (("num_prompts", self.num_prompts, 1), ("prefix_len", self.prefix_len, 0)):
            if value < least:
                raise ValueError(f"{name}: {value}; expected at least {least}")
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed}; expected at least 0")
        if self.request_rate is not None and not 0 < self.request_rate < float("inf"):
            raise ValueError(f"request_rate: {self.request_rate}; expected more than 0 requests a second")

    def of(self, num_prompts: int, request_rate: float | None = None) -> "Workload":
        """So many requests, that come at this rate or all at once."""
        return replace(self, num_prompts=num_prompts, request_rate=request_rate)

    def shortened(self, output_len: int) -> "Workload":
        """The same prompts with at most so many tokens each, all at once."""
        of = self.lengths
        pairs = tuple((prompt, min(output, output_len)) for prompt, output in of.pairs)
        lengths = replace(of, output_len=min(of.output_len, output_len), pairs=pairs)
        return replace(self, lengths=lengths, request_rate=None)

    def requests(self, run: int, vocab_size: int) -> list[Request]:
        """Those of one run. Each run has others, or a prefix cache would have seen their prompts; any vocabulary's
        tokens are drawn evenly, so that no two prompts begin alike but by `prefix_len`."""
        rng = np.random.default_rng((self.seed, run))

        def tokens(count: int) -> tuple[int, ...]:
            return tuple(rng.integers(0, vocab_size, count).tolist())

        prefix, sizes = tokens(self.prefix_len), self.lengths.draw(self.num_prompts, rng)
        times = arrivals(self.num_prompts, self.request_rate, rng)
        return [
            Request(prefix + tokens(prompt), output, arrival)
            for (prompt, output), arrival in zip(sizes, times, strict=True)
        ]

    def describe(self) -> dict[str, Any]:
        """The workload in JSON."""
        of = self.lengths
        return {
            "num_prompts": self.num_prompts,
            "input_len": of.input_len if of.kind != "file" else None,
            "output_len": of.output_len if of.kind != "file" else None,
            "lengths": f"{of.kind}:{of.spread:g}" if of.spread else of.kind,
            "request_rate": self.request_rate,
            "prefix_len": self.prefix_len,
            "seed": self.seed,
        }
