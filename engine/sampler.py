"""From logits to the next token, one request's settings a row."""

import random
from typing import Any

import torch

import octavo
from octavo.engine.sequence import Sequence


class Sampler:
    """Draws with `octavo.sample`; a seeded request draws the same tokens in any batch."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seeds: dict[int, int] = {}

    def sample(self, logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
        """One token id a sequence from `logits`, `[sequences, vocab]` fp32.

        Raises:
            RuntimeError: a row of logits has no largest, or no distribution: it holds NaN, say.
        """
        tokens = octavo.sample(logits, **self._settings(sequences)).tolist()
        for sequence, token in zip(sequences, tokens, strict=True):
            if token < 0:
                raise RuntimeError(
                    f"request {sequence.id}: its logits hold NaN or infinities, so no token can be drawn; "
                    "a model computed in fp16 may overflow: try dtype=torch.bfloat16 or torch.float32"
                )
        return tokens

    def forget(self, sequence: Sequence) -> None:
        """Drops the state of a finished request."""
        self._seeds.pop(sequence.id, None)

    def _settings(self, sequences: list[Sequence]) -> dict[str, Any]:
        """The arguments of `octavo.sample`, fewer where all requests are greedy or none has a filter."""
        params = [s.params for s in sequences]
        if not any(p.temperature > 0 for p in params):
            return {}
        settings: dict[str, Any] = {
            "temperature": self._tensor([p.temperature for p in params], torch.float32),
            "seeds": self._tensor([self._seed(s) for s in sequences], torch.int64),
            "positions": self._tensor([len(s.token_ids) - s.prompt_length for s in sequences], torch.int64),
        }
        if any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in params):  # all or none: one kernel for any of them
            settings["top_k"] = self._tensor([p.top_k for p in params], torch.int32)
            settings["top_p"] = self._tensor([p.top_p for p in params], torch.float32)
            settings["min_p"] = self._tensor([p.min_p for p in params], torch.float32)
        return settings

    def _seed(self, sequence: Sequence) -> int:
        """The request's seed as a signed 64-bit number; one of its own, for all its tokens, where it has none."""
        if sequence.id not in self._seeds:
            seed = sequence.params.seed
            seed = random.SystemRandom().getrandbits(64) if seed is None else seed
            self._seeds[sequence.id] = (seed + 2**63) % 2**64 - 2**63
        return self._seeds[sequence.id]

    def _tensor(self, values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device, non_blocking=True)
