"""One step of the model on the device: chunks in, logits out."""

from collections.abc import Iterator

import torch

from octavo.engine.block_manager import BlockManager
from octavo.engine.model import AttentionMetadata, Decoder
from octavo.engine.scheduler import Chunk
from octavo.engine.sequence import SamplingParams, Sequence


class ModelRunner:
    """Owns the paged cache and turns chunks of sequences into tensors.

    Args:
        model: the decoder.
        blocks: whose pages the cache holds.
    """

    def __init__(self, model: Decoder, blocks: BlockManager) -> None:
        self.model = model
        self.blocks = blocks
        c = model.config
        self.kv_cache = torch.empty(
            (c.num_hidden_layers, 2, blocks.num_pages, blocks.page_size, c.num_key_value_heads, c.head_dim),
            dtype=model.dtype,
            device=model.device,
        )

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> torch.Tensor:
        """Computes the chunks; returns the logits of the last token of each chunk that samples, `[R, vocab]` fp32."""
        hidden, metadata = self._forward(chunks)
        ends = metadata.cu_seqlens_q[1:] - 1
        rows = [i for i, chunk in enumerate(chunks) if chunk.samples]
        return self.model.logits(hidden[ends[rows]])

    @torch.inference_mode()
    def prompt_logits(self, token_ids: list[int], chunk_size: int) -> Iterator[torch.Tensor]:
        """The logits at every position of a text, `[tokens, vocab]` a chunk of `chunk_size` tokens."""
        sequence = Sequence(-1, list(token_ids), SamplingParams())
        sequence.block_table = self.blocks.allocate(self.blocks.pages_for(len(token_ids)))
        try:
            while sequence.remaining:
                chunk = Chunk(sequence, min(chunk_size, sequence.remaining))
                hidden, _ = self._forward([chunk])
                sequence.num_computed = chunk.end
                yield self.model.logits(hidden)
        finally:
            self.blocks.free(sequence.block_table)

    def _forward(self, chunks: list[Chunk]) -> tuple[torch.Tensor, AttentionMetadata]:
        token_ids = [t for c in chunks for t in c.sequence.token_ids[c.start : c.end]]
        metadata = self._metadata(chunks)
        return self.model.hidden(self._tensor(token_ids, torch.int64), self.kv_cache, metadata), metadata

    def _metadata(self, chunks: list[Chunk]) -> AttentionMetadata:
        page_size = self.blocks.page_size
        positions, slots, cu_seqlens = [], [], [0]
        for chunk in chunks:
            table = chunk.sequence.block_table
            for position in range(chunk.start, chunk.end):
                positions.append(position)
                slots.append(table[position // page_size] * page_size + position % page_size)
            cu_seqlens.append(len(positions))
        used = [self.blocks.pages_for(chunk.end) for chunk in chunks]
        tables = [chunk.sequence.block_table[:n] + [0] * (max(used) - n) for chunk, n in zip(chunks, used, strict=True)]
        return AttentionMetadata(
            positions=self._tensor(positions, torch.int64),
            slot_mapping=self._tensor(slots, torch.int64),
            block_table=self._tensor(tables, torch.int32),
            seq_lens=self._tensor([chunk.end for chunk in chunks], torch.int32),
            cu_seqlens_q=self._tensor(cu_seqlens, torch.int32),
            max_seqlen_q=max(chunk.length for chunk in chunks),
        )

    def _tensor(self, values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(self.model.device, non_blocking=True)
