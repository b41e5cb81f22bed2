"""What a step that runs will have sampled."""

from typing import Any

import torch

from octavo.engine.sampler import Drawn
from octavo.engine.sequence import Chunk, Sampled, TokenLogprobs

Parts = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""Of some rows of a prompt at a time: log-probabilities, and ids and log-probabilities of the most probable."""


class Prompts:
    """Log-probabilities of prompts' tokens, which come chunk by chunk."""

    def __init__(self) -> None:
        self._entries: dict[int, list[TokenLogprobs]] = {}

    def add(self, chunk: Chunk, following: list[int], parts: Parts) -> None:
        """Notes those of the tokens that follow a chunk's; after a preemption they come again."""
        entries = self._entries.setdefault(chunk.sequence.id, [])
        del entries[chunk.start :]
        rows = [row for part in parts for row in zip(*(x.tolist() for x in part), strict=True)]
        for token, (logprob, ids, tops) in zip(following, rows, strict=True):
            entries.append(TokenLogprobs(token, logprob, list(zip(ids, tops, strict=True))))

    def take(self, sequence_id: int) -> list[TokenLogprobs]:
        return self._entries.pop(sequence_id, [])


class Pending:
    """A step that runs.

    Args:
        chunks: the step's.
        drawn: what it will have sampled, on its way to the host.
        following: of chunks whose prompts' log-probabilities are wanted, by index, the tokens that follow theirs.
        prompts: where those go.
        stream: what all of it is computed on; None on a CPU, where it is done.
    """

    def __init__(
        self,
        chunks: list[Chunk],
        drawn: Drawn,
        following: dict[int, tuple[list[int], Parts]],
        prompts: Prompts,
        stream: torch.cuda.Stream | None,
    ) -> None:
        self._chunks, self._drawn, self._following, self._prompts = chunks, drawn, following, prompts
        self._done: torch.cuda.Event | None = None
        if stream is not None:
            self._done = torch.cuda.Event(blocking=True)
            self._done.record(stream)
        self._results: list[Sampled] | None = None

    def wait(self) -> list[Sampled]:
        """What the step's chunks have sampled, of those that sample, in order."""
        if self._results is None:
            if self._done is not None:
                self._done.synchronize()
            for i, (tokens, parts) in self._following.items():
                self._prompts.add(self._chunks[i], tokens, parts)
            rows = zip(self._chunks, self._drawn.tokens.tolist())  # noqa: B905 (what follows is padding)
            self._results = [self._sampled(i, *row) for i, row in enumerate(rows) if row[0].samples]
        return self._results

    def _sampled(self, row: int, chunk: Chunk, token: int) -> Sampled:
        params = chunk.sequence.params
        logprob: Any = None
        top = of_prompt = None
        if params.logprobs is not None:
            logprob, ids, tops = (x[row].tolist() for x in self._drawn[1:])  # type: ignore[index]
            top = [(t, p) for t, p in zip(ids, tops, strict=True) if t >= 0][: params.logprobs]
        if params.prompt_logprobs is not None and chunk.end == chunk.sequence.prompt_length:
            of_prompt = self._prompts.take(chunk.sequence.id)
        return Sampled(token, logprob, top, of_prompt)
