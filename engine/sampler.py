"""From the last hidden states to the next tokens, one request's settings a row.

Greedy rows and draws with filters happen inside the step's CUDA graph. What few requests ask for (penalties, biases,
tokens that may not come yet, log-probabilities) is done behind it, by `EditedSampler`.
"""

import random
from collections.abc import Sequence as Items
from enum import Enum
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

import octavo
from octavo.engine.inputs import to_device, to_host
from octavo.engine.sequence import Chunk, Sequence

GREEDY_BELOW = 1e-5  # as octavo.sample has it
NUM_LOGPROBS_STEP = 4  # numbers of log-probabilities are rounded up to a multiple
BIASES_STEP = 16


class Mode(Enum):
    """What a step's graph ends with."""

    GREEDY = "greedy"
    DRAWN = "drawn"  # each row by its own temperature and filters; some may be greedy
    EDITED = "edited"  # the hidden states: sampling comes behind


class SlotSettings:
    """How each slot samples, as arrays over the slots."""

    def __init__(self, max_num_seqs: int) -> None:
        size = max_num_seqs + 2  # those of StepInputs
        self.temperature, self.top_p, self.min_p = (np.zeros(size, np.float32) for _ in range(3))
        self.top_k = np.zeros(size, np.int32)
        self.seeds = np.zeros(size, np.int64)
        self.prompt_lengths, self.min_tokens = (np.zeros(size, np.int32) for _ in range(2))
        self.looked_at = np.zeros(size, np.int32)  # where a prompt ends whose log-probabilities are wanted
        self.drawn, self.edited = (np.zeros(size, np.bool_) for _ in range(2))
        self._seeds: dict[int, int] = {}

    def adopt(self, sequence: Sequence) -> None:
        """Notes the settings of a sequence that has been given its slot."""
        slot, p = sequence.slot, sequence.params
        self.temperature[slot], self.top_p[slot], self.min_p[slot] = p.temperature, p.top_p, p.min_p
        self.top_k[slot] = p.top_k
        self.prompt_lengths[slot] = sequence.prompt_length
        self.drawn[slot] = p.temperature >= GREEDY_BELOW
        self.seeds[slot] = self._seed(sequence) if self.drawn[slot] else 0
        self.min_tokens[slot] = p.min_tokens if sequence.stop_token_ids else 0
        self.edited[slot] = p.has_penalties or bool(p.logit_bias) or p.logprobs is not None
        self.looked_at[slot] = sequence.prompt_length if p.prompt_logprobs is not None else 0

    def mode(self, slots: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> Mode:
        """What the step of these slots needs, whose chunks are from `starts` to `ends`."""
        made = ends - self.prompt_lengths[slots]  # negative where the prompt goes on
        early = (made >= 0) & (made < self.min_tokens[slots])
        if (self.edited[slots] | early | (starts < self.looked_at[slots])).any():
            return Mode.EDITED
        return Mode.DRAWN if self.drawn[slots].any() else Mode.GREEDY

    def pack(self, host: SimpleNamespace, slots: np.ndarray, ends: np.ndarray) -> None:
        """Computes the fields of a step that draws."""
        count = len(slots)
        for name in ("temperature", "top_k", "top_p", "min_p", "seeds"):
            field = getattr(host, name)
            np.take(getattr(self, name), slots, out=field[:count])
            field[count:] = 0  # greedy
        np.subtract(ends, self.prompt_lengths[slots], out=host.draws[:count])
        host.draws[count:] = 0

    def forget(self, sequence: Sequence) -> None:
        self._seeds.pop(sequence.id, None)

    def _seed(self, sequence: Sequence) -> int:
        """The request's seed as a signed 64-bit number; one of its own, for all its tokens, where it has none."""
        if sequence.id not in self._seeds:
            seed = sequence.params.seed
            seed = random.SystemRandom().getrandbits(64) if seed is None else seed
            self._seeds[sequence.id] = (seed + 2**63) % 2**64 - 2**63
        return self._seeds[sequence.id]


def drawn_settings(fields: SimpleNamespace) -> dict[str, torch.Tensor]:
    """What `octavo.sample` takes to draw each row by its own settings."""
    names = dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "seeds")) | {"positions": "draws"}
    return {name: getattr(fields, field or name) for name, field in names.items()}


class Drawn(NamedTuple):
    """On the device; the last three where someone wants log-probabilities."""

    tokens: torch.Tensor  # [B] int64
    logprobs: torch.Tensor | None = None  # [B]
    top_ids: torch.Tensor | None = None  # [B, n]
    top_logprobs: torch.Tensor | None = None


class EditedSampler:
    """Sampling with penalties, biases and log-probabilities.

    The tokens of a prompt and of what was sampled so far are counted on the device, since the latest are not known
    here; the memory for it, 4 bytes and a bit for each slot and token of the vocabulary, is taken when the first
    request has penalties.
    """

    def __init__(self, device: torch.device, max_num_seqs: int, vocab: int) -> None:
        self.device, self.vocab, self.nobody = device, vocab, max_num_seqs + 1
        self._counts: torch.Tensor | None = None  # [slots, vocab] int32
        self._prompts: torch.Tensor | None = None  # [slots, ceil(vocab / 32)] int32
        self._counted: list[Sequence | None] = [None] * (max_num_seqs + 2)

    def adopt(self, sequence: Sequence) -> None:
        """What was counted in its slot was another's."""
        self._counted[sequence.slot] = None  # type: ignore[index]

    def sample(self, logits: torch.Tensor, fields: SimpleNamespace, chunks: Items[Chunk]) -> Drawn:
        """One token a row; rows from the number of chunks on are padding."""
        rows = logits.shape[0]
        options: dict[str, Any] = drawn_settings(fields) | self._biases(chunks, rows)
        counted = [chunk.sequence if chunk.sequence.params.has_penalties else None for chunk in chunks]
        if any(counted):
            options |= self._penalties(counted, fields.slots, rows)
        wanted = [chunk.sequence.params.logprobs for chunk in chunks]
        most = max((n for n in wanted if n is not None), default=None)
        if most is None:
            drawn = Drawn(octavo.sample(logits, **options))
        else:
            most = min(-(-most // NUM_LOGPROBS_STEP) * NUM_LOGPROBS_STEP, self.vocab)
            drawn = Drawn(*octavo.sample(logits, **options, num_logprobs=most))
        if any(counted):
            assert self._counts is not None
            slots = [self.nobody] * rows
            for row, sequence in enumerate(counted):
                if sequence is not None and sequence.slot is not None and chunks[row].samples:
                    slots[row] = sequence.slot
            at = self._send(slots, np.int64) * self.vocab + drawn.tokens.clamp(min=0)
            self._counts.view(-1).scatter_add_(0, at, torch.ones_like(at, dtype=torch.int32))
        return drawn

    def _biases(self, chunks: Items[Chunk], rows: int) -> dict[str, torch.Tensor]:
        """Those that are asked for, and -inf for what would end a sequence too early."""
        biases: list[dict[int, float]] = []
        for sequence, start, length, _ in chunks:
            of_row = dict(sequence.params.logit_bias or {})
            if start + length - sequence.prompt_length < sequence.params.min_tokens:
                of_row |= dict.fromkeys(sequence.stop_token_ids, -np.inf)
            biases.append(of_row)
        width = -(-max(map(len, biases), default=1) // BIASES_STEP) * BIASES_STEP or BIASES_STEP
        ids, values = np.full((rows, width), -1, np.int32), np.zeros((rows, width), np.float32)
        for row, of_row in enumerate(biases):
            ids[row, : len(of_row)] = list(of_row)
            values[row, : len(of_row)] = list(of_row.values())
        return {"bias_ids": self._send(ids), "bias_values": self._send(values)}

    def _penalties(self, counted: list[Sequence | None], slots: torch.Tensor, rows: int) -> dict[str, torch.Tensor]:
        words = -(-self.vocab // 32)
        if self._counts is None or self._prompts is None:
            self._counts = torch.zeros(self.nobody + 1, self.vocab, dtype=torch.int32, device=self.device)
            self._prompts = torch.zeros(self.nobody + 1, words, dtype=torch.int32, device=self.device)
        for sequence in counted:
            if sequence is not None and self._counted[sequence.slot] is not sequence:  # type: ignore[index]
                self._count(sequence, self._counts, self._prompts)
        values = np.zeros((3, -(-rows // 4) * 4), np.float32)  # aligned as kernels are compiled for
        values[0] = 1
        for row, sequence in enumerate(counted):
            if sequence is not None:
                p = sequence.params
                values[:, row] = p.repetition_penalty, p.presence_penalty, p.frequency_penalty
        names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        return dict(zip(names, self._send(values)[:, :rows].unbind(0), strict=True)) | {
            "output_counts": self._counts.index_select(0, slots),
            "prompt_mask": self._prompts.index_select(0, slots),
        }

    def _count(self, sequence: Sequence, counts: torch.Tensor, prompts: torch.Tensor) -> None:
        """Begins with a sequence, of which all tokens are known."""
        slot = sequence.slot
        assert slot is not None
        self._counted[slot] = sequence
        bits = np.zeros(prompts.shape[1] * 32, np.uint8)
        bits[sequence.token_ids[: sequence.prompt_length]] = 1
        prompts[slot] = self._send(np.packbits(bits, bitorder="little").view(np.int32))
        counts[slot].zero_()
        if sequence.generated:
            at = self._send(sequence.generated, np.int64)
            counts[slot].scatter_add_(0, at, torch.ones_like(at, dtype=torch.int32))

    def _send(self, values: Any, dtype: Any = None) -> torch.Tensor:
        return to_device(torch.from_numpy(np.ascontiguousarray(values, dtype)), self.device)


def prompt_logprobs(
    logits_of: Any, hidden: torch.Tensor, targets: torch.Tensor, count: int, at_once: int = 128
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Log-probabilities `[n]` of the tokens that follow each row, and ids and values of the `count` most probable.

    A few rows at a time, since those of a vocabulary take much memory; on their way to the host.
    """
    results = []
    for rows, target in zip(hidden.split(at_once), targets.split(at_once), strict=True):
        logprobs = logits_of(rows).float().log_softmax(-1)
        top, ids = logprobs.topk(count, dim=-1)
        found = logprobs.gather(1, target.unsqueeze(1)).squeeze(1)
        results.append((to_host(found), to_host(ids), to_host(top)))
    return results
