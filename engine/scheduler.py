"""Who runs next: iteration-level batching under a token budget. No torch here.

Every step takes one token of each sequence that is decoding, then fills what is left of the budget with chunks of
prompts, so a long prompt never holds up the others. Both go by rank, priority before arrival. A sequence is admitted
once there are pages for its next chunk. Where pages run out later, the last in rank gives up all of its own and is
computed anew when its turn comes; so the first in rank always goes on, and with it, in the end, everyone. Nobody passes
by a sequence that waits ahead of it.

Steps are scheduled before the tokens of the step before are known, see `Sequence`. Pages are given up at once, although
a step that still runs may write into them: it is ahead, in stream order, of whoever has them next.
"""

import heapq
from bisect import bisect_left, insort
from operator import attrgetter

from octavo.engine.block_manager import BlockManager
from octavo.engine.sequence import Chunk, Sequence, Step

RANK = attrgetter("rank")


class QueueFullError(RuntimeError):
    """As many requests wait as may wait: try again later."""


class Scheduler:
    """Sequences that wait and that run.

    Args:
        blocks: hands out the pages.
        max_num_seqs: sequences that run at most; each has a slot from 0 to max_num_seqs - 1.
        max_num_batched_tokens: of a step, at most.
        max_waiting: sequences that wait at most; None for no limit.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        *,
        max_waiting: int | None = None,
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_waiting = max_waiting
        self.waiting: list[Sequence] = []  # both sorted by rank
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._watermark = blocks.num_pages // 100  # pages that stay free at admission, lest it be undone at once
        self._slots = list(range(max_num_seqs))
        self._step = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def check(self, prompt_length: int, max_length: int) -> None:
        """Raises ValueError where the whole cache could not hold a sequence."""
        needed = self.blocks.pages_for(max_length - 1)  # the last token is sampled, but not computed
        if needed > self.blocks.num_pages:
            raise ValueError(
                f"prompt: {prompt_length} tokens + max_tokens {max_length - prompt_length} need {needed} pages of "
                f"{self.blocks.page_size}, but the cache has {self.blocks.num_pages}: raise cache_tokens"
            )

    def add(self, *sequences: Sequence) -> None:
        """Queues sequences, all of them or none.

        Raises:
            ValueError: the whole cache could not hold one.
            QueueFullError: more than `max_waiting` would wait.
        """
        for sequence in sequences:
            self.check(sequence.prompt_length, sequence.max_length)
        if self.max_waiting is not None and len(self.waiting) + len(sequences) > self.max_waiting:
            raise QueueFullError(
                f"{len(self.waiting)} requests wait and {self.max_waiting} may: try again later, or raise max_waiting"
            )
        for sequence in sequences:
            insort(self.waiting, sequence, key=RANK)

    def schedule(self) -> Step:
        """The next step, which counts as computed from now on; empty where nothing can be computed yet."""
        self._step += 1
        preemptions = self.num_preemptions
        decodes: dict[Sequence, None] = {}
        for sequence in tuple(self.running):
            if len(decodes) == self.max_num_batched_tokens:
                break
            tokens = sequence.num_tokens
            if sequence.slot is None or tokens - sequence.num_computed != 1 or tokens >= sequence.max_length:
                continue  # preempted just now; a prompt; or it ends with the token that is in flight
            if sequence.num_computed % self.blocks.page_size == 0:  # its token is the first of a page
                if not self._make_room(sequence, sequence.num_computed + 1, decodes):
                    continue
                self.blocks.extend(sequence, sequence.num_computed + 1)
            decodes[sequence] = None
        prefills = self._continue_prompts(decodes) if len(decodes) < len(self.running) else []
        if self.num_preemptions == preemptions:
            self._admit(self.max_num_batched_tokens - len(decodes) - sum(c.length for c in prefills), prefills)
        chunks = [self._take(sequence, 1) for sequence in decodes]
        if prefills:
            chunks += sorted(prefills, key=lambda chunk: chunk.length > 1)
        return Step(chunks, self._step)

    def _continue_prompts(self, decodes: dict[Sequence, None]) -> list[Chunk]:
        """Chunks of prompts that have begun; takes out of `decodes` whom it preempts."""
        chunks: list[Chunk] = []
        taken = 0
        for sequence in tuple(self.running):
            budget = self.max_num_batched_tokens - len(decodes) - taken
            if sequence.slot is None or sequence.remaining <= 1:
                continue
            if budget <= 0:
                break
            if self._make_room(sequence, sequence.num_computed + 1, decodes):
                length = min(sequence.remaining, budget)
                if self.blocks.missing(sequence, sequence.num_computed + length) > self.blocks.num_free:
                    room = (len(sequence.block_table) + self.blocks.num_free) * self.blocks.page_size
                    length = room - sequence.num_computed
                self.blocks.extend(sequence, sequence.num_computed + length)
                chunks.append(self._take(sequence, length))
                taken += length
        return chunks

    def _admit(self, budget: int, chunks: list[Chunk]) -> None:
        blocks = self.blocks
        while self.waiting and self._slots and budget > 0:
            sequence = self.waiting[0]
            if sequence.in_flight:  # what it has sampled is needed to compute it anew
                return
            pages = blocks.match(sequence)
            cached = len(pages) * blocks.page_size
            length = min(sequence.remaining - cached, budget)
            needed = blocks.pages_for(cached + length) - len(pages)
            if needed > blocks.available_beside(pages) - (self._watermark if self.running else 0):
                return
            self.waiting.pop(0)
            sequence.slot = heapq.heappop(self._slots)
            insort(self.running, sequence, key=RANK)
            blocks.share(sequence, pages)
            blocks.extend(sequence, cached + length)
            if len(sequence.token_ids) == sequence.prompt_length:
                blocks.count(sequence.prompt_length, cached)
            sequence.num_computed = sequence.num_cached = cached
            chunks.append(self._take(sequence, length))
            budget -= length

    def _take(self, sequence: Sequence, length: int) -> Chunk:
        start = sequence.num_computed
        chunk = Chunk(sequence, start, length, start + length == sequence.num_tokens)
        sequence.num_computed = start + length
        if chunk.samples:
            sequence.in_flight += 1
        if length > 1 or sequence.num_computed % self.blocks.page_size == 0:
            self.blocks.register(sequence, start, self._step)
        return chunk

    def _make_room(self, sequence: Sequence, num_tokens: int, decodes: dict[Sequence, None]) -> bool:
        """Whether there are pages for so many tokens of a sequence; preempts for it those behind it in rank."""
        missing = self.blocks.missing(sequence, num_tokens)
        while missing > self.blocks.num_free:
            last = self.running[-1]
            if last is sequence:
                return False
            decodes.pop(last, None)
            self._preempt(last)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self._stop(sequence)
        sequence.num_computed = sequence.num_cached = 0
        insort(self.waiting, sequence, key=RANK)

    def _stop(self, sequence: Sequence) -> None:
        """Takes a sequence out of those that run, and its pages and its slot from it."""
        del self.running[bisect_left(self.running, sequence.rank, key=RANK)]
        self.blocks.free(sequence)
        assert sequence.slot is not None
        heapq.heappush(self._slots, sequence.slot)
        sequence.slot = None

    def update(self, chunk: Chunk, token_id: int) -> bool:
        """Notes what a chunk has sampled; False where its sequence has ended meanwhile, so that nobody cares."""
        sequence = chunk.sequence
        if sequence.finish_reason is not None:
            return False
        sequence.token_ids.append(token_id)
        sequence.in_flight -= 1
        known = min(len(sequence.token_ids), sequence.num_computed)
        if known and known % self.blocks.page_size == 0:
            self.blocks.register(sequence, known - 1, self._step)
        return True

    def finish(self, sequence: Sequence, reason: str) -> None:
        """Takes a sequence out, wherever it is, and its pages from it; nothing where it has ended already."""
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = reason
        if sequence.slot is not None:
            self._stop(sequence)
        else:
            at = bisect_left(self.waiting, sequence.rank, key=RANK)
            if at < len(self.waiting) and self.waiting[at] is sequence:
                del self.waiting[at]

    def fail(self, step: Step) -> list[Sequence]:
        """Ends the sequences of a step that failed, with the reason "error".

        Returns:
            Others that had begun after it with pages that it should have written: they are computed anew, and what they
            have sampled meanwhile must not be used.
        """
        for chunk in step.chunks:
            self.finish(chunk.sequence, "error")
        lost = self.blocks.forget_since(step.number)
        shared = [(s, s.block_table[: s.num_cached // self.blocks.page_size]) for s in self.running]
        again = [sequence for sequence, pages in shared if not lost.isdisjoint(pages)]
        for sequence in again:
            self._preempt(sequence)
            sequence.in_flight = 0
        return again
