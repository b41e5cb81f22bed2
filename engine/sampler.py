"""From logits to the next token, one request's settings a row."""

import random
from typing import Any

import torch

import octavo
from octavo.engine.sequence import Chunk, Sampled, Sequence


class Sampler:
    """Draws with `octavo.sample`; a seeded request draws the same tokens in any batch."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seeds: dict[int, int] = {}

    def sample(self, logits: torch.Tensor, chunks: list[Chunk], outputs: list[list[int]]) -> list[Sampled]:
        """One token a chunk from `logits`, `[chunks, vocab]` fp32; `outputs` are the tokens sampled before it."""
        wanted = [c.sequence.params.logprobs for c in chunks]
        most = max((w for w in wanted if w is not None), default=None)
        settings = self._settings(logits, chunks, outputs)
        if most is None:
            return [Sampled(token) for token in octavo.sample(logits, **settings).tolist()]
        results = octavo.sample(logits, **settings, num_logprobs=most)
        sampled = []
        for want, token, logprob, ids, logprobs in zip(wanted, *(r.tolist() for r in results), strict=True):
            top = None if want is None else list(zip(ids, logprobs, strict=True))[:want]
            sampled.append(Sampled(token) if top is None else Sampled(token, logprob, top))
        return sampled

    def forget(self, sequence: Sequence) -> None:
        """Drops the state of a finished request."""
        self._seeds.pop(sequence.id, None)

    def _settings(self, logits: torch.Tensor, chunks: list[Chunk], outputs: list[list[int]]) -> dict[str, Any]:
        """The arguments of `octavo.sample`: those that some request needs."""
        params = [c.sequence.params for c in chunks]
        settings: dict[str, Any] = {}
        if any(p.temperature > 0 for p in params):
            settings["temperature"] = self._tensor([p.temperature for p in params], torch.float32)
            settings["seeds"] = self._tensor([self._seed(c.sequence) for c in chunks], torch.int64)
            settings["positions"] = self._tensor([len(output) for output in outputs], torch.int64)
            if any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in params):  # all or none: one kernel
                settings["top_k"] = self._tensor([p.top_k for p in params], torch.int32)
                settings["top_p"] = self._tensor([p.top_p for p in params], torch.float32)
                settings["min_p"] = self._tensor([p.min_p for p in params], torch.float32)
        if any(p.has_penalties for p in params):
            for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
                settings[name] = self._tensor([getattr(p, name) for p in params], torch.float32)
            settings["output_counts"], settings["prompt_mask"] = self._histories(logits.shape[1], chunks, outputs)
        biases = [self._biases(c, len(output)) for c, output in zip(chunks, outputs, strict=True)]
        width = max(map(len, biases))
        if width:
            ids = [[*b, *[-1] * (width - len(b))] for b in biases]
            values = [[*b.values(), *[0.0] * (width - len(b))] for b in biases]
            settings["bias_ids"] = self._tensor(ids, torch.int64)
            settings["bias_values"] = self._tensor(values, torch.float32)
        return settings

    def _biases(self, chunk: Chunk, num_generated: int) -> dict[int, float]:
        """What is added to logits: the request's biases, and -inf for what may not end it yet."""
        sequence = chunk.sequence
        biases = dict(sequence.params.logit_bias or {})
        if num_generated < sequence.params.min_tokens:
            biases |= dict.fromkeys(sequence.stop_token_ids, -float("inf"))
        return biases

    def _histories(
        self, vocab: int, chunks: list[Chunk], outputs: list[list[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        counts = torch.zeros(len(chunks), vocab, dtype=torch.int32)
        words = torch.zeros(len(chunks), -(-vocab // 32) * 32, dtype=torch.int64)
        for row, (chunk, output) in enumerate(zip(chunks, outputs, strict=True)):
            if chunk.sequence.params.has_penalties:
                counts[row] = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=vocab)
                words[row, chunk.sequence.token_ids[: chunk.sequence.prompt_length]] = 1
        words = (words.view(len(chunks), -1, 32) << torch.arange(32)).sum(-1)
        return counts.to(self.device), (words - ((words >> 31) << 32)).int().to(self.device)

    def _seed(self, sequence: Sequence) -> int:
        """The request's seed as a signed 64-bit number; one of its own, for all its tokens, where it has none."""
        if sequence.id not in self._seeds:
            seed = sequence.params.seed
            seed = random.SystemRandom().getrandbits(64) if seed is None else seed
            self._seeds[sequence.id] = (seed + 2**63) % 2**64 - 2**63
        return self._seeds[sequence.id]

    def _tensor(self, values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device, non_blocking=True)
