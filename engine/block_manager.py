"""Which pages of the cache belong to whom, and what is in those that belong to nobody. No torch here.

A page is *used* by one sequence or several (its references are counted), *free*, or *cached*: nobody's, but its content
is known and may be asked for again, until the page is needed. Contents are known by a key, the hash of the key of the
page before and of this page's tokens, so that equal keys mean equal tokens from the beginning on. The longest unused
are given up first, of one sequence the last pages, since a page is only found by way of those before it.
"""

from array import array
from hashlib import blake2b

from octavo.engine.sequence import Sequence


def ring_pages(window: int, longest_chunk: int, page_size: int) -> int:
    """Pages of the ring of a sequence whose queries see `window` tokens: what those of a chunk see, where it begins."""
    return -(-(window + longest_chunk) // page_size) + 1


class BlockManager:
    """Hands out pages of `page_size` tokens from a pool of `num_pages`.

    Args:
        num_pages: how many the cache has.
        page_size: tokens a page.
        enable_prefix_caching: keep what is known to be in pages, and give it to sequences that begin alike. Not with
            rings, whose pages are written over.
        ring_pages: of models with a sliding window: the most pages that a sequence has. Position j lies in page
            `block_table[j // page_size % ring_pages]`.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        enable_prefix_caching: bool = True,
        ring_pages: int | None = None,
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.ring_pages = ring_pages
        self.enable_prefix_caching = enable_prefix_caching and ring_pages is None
        self.queries = self.hits = 0  # tokens that were looked for, and found
        self._free = list(range(num_pages - 1, -1, -1))
        self._unused: dict[int, None] = {}  # cached pages, the longest unused first
        self._references = [0] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._content: list[tuple[bytes, bytes, int] | None] = [None] * num_pages  # key, tokens, step that wrote it

    @property
    def num_free(self) -> int:
        """Pages that can be had: free ones and cached ones."""
        return len(self._free) + len(self._unused)

    @property
    def num_cached(self) -> int:
        """Pages that nobody uses and whose content is known."""
        return len(self._unused)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    @property
    def hit_rate(self) -> float:
        """The share of the prompts' tokens that were in the cache."""
        return self.hits / self.queries if self.queries else 0.0

    def pages_for(self, num_tokens: int) -> int:
        """Pages that a sequence of `num_tokens` tokens has."""
        pages = -(-num_tokens // self.page_size)
        return pages if self.ring_pages is None else min(pages, self.ring_pages)

    def match(self, sequence: Sequence) -> list[int]:
        """Pages that hold the beginning of a sequence, from the first on; never its last token, which is computed."""
        if not self.enable_prefix_caching or sequence.params.prompt_logprobs is not None:
            return []
        pages = []
        for index in range((len(sequence.token_ids) - 1) // self.page_size):
            key = self._key(sequence, index)
            page = self._page_of.get(key)
            if page is None:
                break
            content = self._content[page]
            if content is None or content[1] != self._tokens(sequence, index):
                break
            pages.append(page)
        return pages

    def count(self, num_tokens: int, num_found: int) -> None:
        """Counts what a new request looked for, and what it found."""
        self.queries += num_tokens
        self.hits += num_found

    def available_beside(self, pages: list[int]) -> int:
        """Pages that can be had once `pages` are shared."""
        return self.num_free - sum(page in self._unused for page in pages)

    def share(self, sequence: Sequence, pages: list[int]) -> None:
        """Gives a sequence that has no pages yet those that `match` has found."""
        for page in pages:
            self._unused.pop(page, None)
            self._references[page] += 1
        sequence.block_table += pages

    def missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Pages that a sequence lacks to hold `num_tokens` tokens."""
        return max(self.pages_for(num_tokens) - len(sequence.block_table), 0)

    def extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Gives a sequence the pages that `num_tokens` tokens need.

        Raises:
            ValueError: fewer can be had.
        """
        missing = self.missing(sequence, num_tokens)
        if missing > self.num_free:
            raise ValueError(f"num_tokens: {num_tokens} need {missing} more pages; only {self.num_free} can be had")
        for _ in range(missing):
            if self._free:
                page = self._free.pop()
            else:
                page = next(iter(self._unused))
                del self._unused[page]
                self._forget(page)
            self._references[page] = 1
            sequence.block_table.append(page)

    def free(self, sequence: Sequence) -> None:
        """Takes all of a sequence's pages from it."""
        for page in reversed(sequence.block_table):
            self._references[page] -= 1
            if self._references[page] == 0:
                if self._content[page] is None:
                    self._free.append(page)
                else:
                    self._unused[page] = None
        sequence.block_table.clear()

    def register(self, sequence: Sequence, start: int, step: int) -> None:
        """Makes known what is in the pages from the one with position `start` on, where they are full.

        They are as far as tokens are known and a scheduled step writes them, of which `step` is the latest: whoever
        finds them reads them after that, in stream order.
        """
        if not self.enable_prefix_caching:
            return
        full = min(len(sequence.token_ids), sequence.num_computed) // self.page_size
        for index in range(start // self.page_size, full):
            page, key = sequence.block_table[index], self._key(sequence, index)
            if self._content[page] is None and key not in self._page_of:
                self._page_of[key] = page
                self._content[page] = key, self._tokens(sequence, index), step

    def forget_since(self, step: int) -> set[int]:
        """Unlearns what steps from `step` on have written, which failed; returns the pages."""
        pages = {p for p, content in enumerate(self._content) if content is not None and content[2] >= step}
        for page in pages:
            self._forget(page)
            if page in self._unused:
                del self._unused[page]
                self._free.append(page)
        return pages

    def _forget(self, page: int) -> None:
        content = self._content[page]
        if content is not None:
            del self._page_of[content[0]]
            self._content[page] = None

    def _key(self, sequence: Sequence, index: int) -> bytes:
        keys = sequence.page_keys
        while len(keys) <= index:
            before = keys[-1] if keys else b""
            keys.append(blake2b(before + self._tokens(sequence, len(keys)), digest_size=16).digest())
        return keys[index]

    def _tokens(self, sequence: Sequence, index: int) -> bytes:
        begin = index * self.page_size
        return array("i", sequence.token_ids[begin : begin + self.page_size]).tobytes()
