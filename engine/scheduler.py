"""Who runs next: iteration-level batching under a token budget. No torch here.

Every step takes one token of each sequence that is decoding, then fills what is left of the budget with chunks of
prompts, so a long prompt never holds up the others. A sequence is admitted once the pages for its whole length are
free: it can't run out later, so nothing deadlocks and nothing is preempted.
"""

from collections import deque
from dataclasses import dataclass

from octavo.engine.block_manager import BlockManager
from octavo.engine.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """The next `length` tokens of a sequence to compute."""

    sequence: Sequence
    length: int

    @property
    def start(self) -> int:
        return self.sequence.num_computed

    @property
    def end(self) -> int:
        return self.sequence.num_computed + self.length

    @property
    def samples(self) -> bool:
        """Whether this chunk reaches the last token, so that its logits are sampled."""
        return self.length == self.sequence.remaining


class Scheduler:
    def __init__(self, blocks: BlockManager, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence; raises ValueError where the whole cache could not hold it."""
        needed = self.blocks.pages_for(sequence.max_length)
        if needed > self.blocks.num_pages:
            raise ValueError(
                f"prompt: {sequence.prompt_length} tokens + max_tokens {sequence.params.max_tokens} need {needed} "
                f"pages of {self.blocks.page_size}, but the cache has {self.blocks.num_pages}: raise cache_tokens"
            )
        self.waiting.append(sequence)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step: decodes first, then prompts in order of arrival."""
        self._admit()
        budget = self.max_num_batched_tokens
        chunks = []
        for sequence in sorted(self.running, key=lambda s: s.remaining > 1):
            if budget == 0:
                break
            length = min(sequence.remaining, budget)
            chunks.append(Chunk(sequence, length))
            budget -= length
        return chunks

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            needed = self.blocks.pages_for(sequence.max_length)
            if needed > self.blocks.num_free:
                return
            sequence.block_table = self.blocks.allocate(needed)
            self.running.append(self.waiting.popleft())

    def computed(self, chunk: Chunk) -> None:
        """Notes that a chunk's tokens are in the cache."""
        chunk.sequence.num_computed += chunk.length

    def finish(self, sequence: Sequence, reason: str) -> None:
        """Takes a sequence out, wherever it is, and frees its pages."""
        sequence.finish_reason = reason
        if sequence in self.running:
            self.running.remove(sequence)
            self.blocks.free(sequence.block_table)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
