"""Which pages of the cache belong to whom. No torch here."""


class BlockManager:
    """Hands out pages of `page_size` tokens from a pool of `num_pages`."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens need."""
        return -(-num_tokens // self.page_size)

    def allocate(self, num_pages: int) -> list[int]:
        """Takes pages out of the pool; raises ValueError where it holds fewer."""
        if num_pages > len(self._free):
            raise ValueError(f"num_pages: {num_pages}; only {len(self._free)} of {self.num_pages} are free")
        return [self._free.pop() for _ in range(num_pages)]

    def free(self, pages: list[int]) -> None:
        """Gives pages back and empties the list."""
        self._free.extend(reversed(pages))
        pages.clear()
