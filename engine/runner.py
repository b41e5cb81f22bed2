"""One step of the model on the device: chunks in, tokens out."""

from dataclasses import dataclass

import torch

from octavo.engine.block_manager import ring_pages
from octavo.engine.model import AttentionMetadata, Decoder
from octavo.engine.sampler import Sampler
from octavo.engine.sequence import Chunk, Sampled, Sequence, Step, TokenLogprobs


@dataclass(frozen=True)
class Done:
    """A step that was computed when it was started."""

    sampled: list[Sampled]

    def wait(self) -> list[Sampled]:
        return self.sampled


class ModelRunner:
    """Owns the paged cache and turns chunks of sequences into tensors.

    Args:
        model: the decoder.
        num_pages, page_size: of the cache.
        max_num_seqs, max_num_batched_tokens, max_model_len: of a step, at most.
        rolling: whether block tables are rings.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        num_pages: int,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        rolling: bool = False,
    ) -> None:
        self.model = model
        self.page_size = page_size
        window = model.config.sliding_window
        self.ring = ring_pages(window, max_num_batched_tokens, page_size) if window is not None and rolling else None
        c = model.config
        self.kv_cache = torch.empty(
            (c.num_hidden_layers, 2, num_pages, page_size, c.num_key_value_heads, c.head_dim),
            dtype=model.dtype,
            device=model.device,
        )
        self.sampler = Sampler(model.device)
        self._last = [0] * max_num_seqs  # what each slot has sampled last, perhaps not known to its sequence yet
        self._prompts: dict[int, list[TokenLogprobs]] = {}

    @torch.inference_mode()
    def start(self, step: Step) -> Done:
        """Computes a step, and samples."""
        chunks = step.chunks
        hidden, metadata = self._forward(chunks)
        begin = 0
        for chunk in chunks:
            if chunk.sequence.params.prompt_logprobs is not None and chunk.start < chunk.sequence.prompt_length - 1:
                self._note_prompt(chunk, hidden[begin : begin + chunk.length])
            begin += chunk.length
        rows = [i for i, chunk in enumerate(chunks) if chunk.samples]
        if not rows:
            return Done([])
        logits = self.model.logits(hidden[metadata.cu_seqlens_q[1:][rows].long() - 1])
        sampling = [chunks[row] for row in rows]
        outputs = [self._tokens(c.sequence, c.sequence.prompt_length, c.end) for c in sampling]
        sampled = self.sampler.sample(logits, sampling, outputs)
        for i, chunk in enumerate(sampling):
            assert chunk.sequence.slot is not None
            self._last[chunk.sequence.slot] = max(sampled[i].token_id, 0)
            if chunk.sequence.id in self._prompts:
                sampled[i] = sampled[i]._replace(prompt_logprobs=self._prompts.pop(chunk.sequence.id))
        return Done(sampled)

    def forget(self, sequence: Sequence) -> None:
        """Drops the state of a sequence."""
        self.sampler.forget(sequence)
        self._prompts.pop(sequence.id, None)

    @torch.inference_mode()
    def logits(self, chunk: Chunk) -> torch.Tensor:
        """The logits at every position of a chunk, `[length, vocab]`."""
        return self.model.logits(self._forward([chunk])[0])

    def _note_prompt(self, chunk: Chunk, hidden: torch.Tensor) -> None:
        """Log-probabilities of the prompt's tokens that follow those of a chunk."""
        sequence, k = chunk.sequence, chunk.sequence.params.prompt_logprobs
        targets = sequence.token_ids[chunk.start + 1 : min(chunk.end + 1, sequence.prompt_length)]
        logprobs = self.model.logits(hidden[: len(targets)]).log_softmax(-1)
        top, ids = logprobs.topk(k or 0)
        own = logprobs[range(len(targets)), targets]
        if chunk.start == 0:
            self._prompts[sequence.id] = []
        for token, p, i, t in zip(targets, own.tolist(), ids.tolist(), top.tolist(), strict=True):
            self._prompts[sequence.id].append(TokenLogprobs(token, p, list(zip(i, t, strict=True))))

    def _tokens(self, sequence: Sequence, start: int, end: int) -> list[int]:
        """Token ids of positions, of which the last may be known here alone."""
        ids = sequence.token_ids[start:end]
        if end > len(sequence.token_ids):
            assert sequence.slot is not None
            ids.append(self._last[sequence.slot])
        return ids

    def _forward(self, chunks: list[Chunk]) -> tuple[torch.Tensor, AttentionMetadata]:
        token_ids = [t for c in chunks for t in self._tokens(c.sequence, c.start, c.end)]
        metadata = self._metadata(chunks)
        return self.model.hidden(self._tensor(token_ids, torch.int64), self.kv_cache, metadata), metadata

    def _metadata(self, chunks: list[Chunk]) -> AttentionMetadata:
        page_size = self.page_size
        positions, slots, cu_seqlens = [], [], [0]
        for chunk in chunks:
            table = chunk.sequence.block_table
            for position in range(chunk.start, chunk.end):
                positions.append(position)
                index = position // page_size
                page = table[index if self.ring is None else index % self.ring]
                slots.append(page * page_size + position % page_size)
            cu_seqlens.append(len(positions))
        width = self.ring or max(-(-chunk.end // page_size) for chunk in chunks)
        tables = [chunk.sequence.block_table[:width] for chunk in chunks]
        tables = [table + [0] * (width - len(table)) for table in tables]
        return AttentionMetadata(
            positions=self._tensor(positions, torch.int64),
            slot_mapping=self._tensor(slots, torch.int64),
            block_table=self._tensor(tables, torch.int32),
            seq_lens=self._tensor([chunk.end for chunk in chunks], torch.int32),
            cu_seqlens_q=self._tensor(cu_seqlens, torch.int32),
            max_seqlen_q=max(chunk.length for chunk in chunks),
            rolling=self.ring is not None,
        )

    def _tensor(self, values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(self.model.device, non_blocking=True)
