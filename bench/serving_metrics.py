"""What a run of requests was like, computed from the times at which their tokens came.

The definitions are those of vLLM's benchmarks:

- TTFT, time to first token: from a request's arrival to its first token;
- TPOT, time per output token: (last token − first token) / (tokens − 1), of requests with more than one;
- ITL, inter-token latency: each gap between two tokens of a request, all requests' together;
- E2EL, end-to-end latency: from arrival to the last token;
- percentiles interpolate linearly; throughputs divide by the time from the run's beginning to its last token.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

READING_WORDS_PER_MINUTE = 250
TOKENS_PER_WORD = 4 / 3
"""Of English text, by tokenizers of about 32,000 words and more."""
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Timeline:
    """A request as its client saw it; times are seconds since the run began, one for each token.

    `cached` is how many tokens of the prompt were found in the cache. With an `error` it was not completed.
    """

    prompt: int
    arrival: float
    token_times: tuple[float, ...]
    cached: int = 0
    error: str | None = None

    @property
    def completed(self) -> bool:
        return self.error is None and bool(self.token_times)

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.arrival

    @property
    def e2el(self) -> float:
        return self.token_times[-1] - self.arrival

    @property
    def tpot(self) -> float | None:
        """None for a request of one token."""
        if len(self.token_times) < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (len(self.token_times) - 1)

    @property
    def itl(self) -> list[float]:
        return [after - before for before, after in pairwise(self.token_times)]


def reading_seconds_per_token() -> float:
    """How long a reader has for a token."""
    return 60 / READING_WORDS_PER_MINUTE / TOKENS_PER_WORD


def spread(values: Iterable[float], factor: float = 1e3) -> dict[str, float] | None:
    """Mean, median, p95 and p99 of some times, by default in milliseconds; None of no times."""
    found = np.fromiter(values, dtype=np.float64) * factor
    if not len(found):
        return None
    p50, p95, p99 = np.percentile(found, PERCENTILES).tolist()
    return {"mean": found.mean().item(), "median": p50, "p95": p95, "p99": p99}


def summarize(timelines: Sequence[Timeline]) -> dict[str, Any]:
    """Counts, rates and latencies of a run; requests that failed count as failed and nowhere else.

    Raises:
        ValueError: not one request was completed.
    """
    done = [t for t in timelines if t.completed]
    if not done:
        errors = sorted({t.error for t in timelines if t.error})
        raise ValueError(f"no request was completed: {'; '.join(errors) or 'there was none'}")
    seconds = max(t.token_times[-1] for t in done)
    inputs, outputs = sum(t.prompt for t in done), sum(len(t.token_times) for t in done)
    return {
        "completed": len(done),
        "failed": len(timelines) - len(done),
        "seconds": seconds,
        "input_tokens": inputs,
        "output_tokens": outputs,
        "requests_per_s": len(done) / seconds,
        "output_tokens_per_s": outputs / seconds,
        "total_tokens_per_s": (inputs + outputs) / seconds,
        "ttft_ms": spread(t.ttft for t in done),
        "tpot_ms": spread(t.tpot for t in done if t.tpot is not None),
        "itl_ms": spread(gap for t in done for gap in t.itl),
        "e2el_ms": spread(t.e2el for t in done),
        "prefix_cache_hit_rate": sum(t.cached for t in done) / inputs,
    }
