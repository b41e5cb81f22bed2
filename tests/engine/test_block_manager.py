"""Pages are counted, and what is found in them by a beginning is that beginning's."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from octavo.engine.block_manager import BlockManager, ring_pages
from octavo.engine.params import SamplingParams
from octavo.engine.sequence import Sequence


def sequence(tokens, i=0, **params):
    return Sequence(i, list(tokens), SamplingParams(**params))


def admit(blocks, s, step=1):
    """Takes what is cached and computes the rest; returns how many tokens were there."""
    pages = blocks.match(s)
    blocks.share(s, pages)
    blocks.extend(s, len(s.token_ids))
    s.num_cached = len(pages) * blocks.page_size
    s.num_computed = len(s.token_ids)
    blocks.register(s, s.num_cached, step)
    return s.num_cached


def test_equal_beginnings_share_pages_but_never_the_last_token():
    blocks = BlockManager(10, 4)
    first, second, third = sequence(range(9)), sequence([*range(8), 50, 51]), sequence(range(8))
    assert admit(blocks, first) == 0
    assert admit(blocks, second) == 8 and second.block_table[:2] == first.block_table[:2]
    assert admit(blocks, third) == 4, "the page with its last token is computed again"
    assert blocks.num_used == 3 + 1 + 1
    for s in (first, second, third):
        blocks.free(s)
    assert blocks.num_free == 10 and blocks.num_cached == 2


def test_the_same_page_after_another_beginning_is_another():
    blocks = BlockManager(10, 2)
    admit(blocks, sequence([1, 2, 3, 4, 5]))
    assert admit(blocks, sequence([9, 2, 3, 4, 5])) == 0
    assert admit(blocks, sequence([1, 2, 3, 5, 5])) == 2


def test_a_collision_of_keys_is_no_hit(monkeypatch):
    blocks = BlockManager(10, 2)
    monkeypatch.setattr(blocks, "_key", lambda s, index: b"the same")
    admit(blocks, sequence([1, 2, 3]))
    assert blocks.match(sequence([1, 2, 4])) and not blocks.match(sequence([7, 2, 4]))


def test_the_longest_unused_go_first_and_the_last_of_a_sequence_before_its_first():
    blocks = BlockManager(6, 2)
    old, new = sequence([1, 2, 3, 4, 5]), sequence([6, 7, 8])
    for s in (old, new):
        admit(blocks, s)
        blocks.free(s)
    assert blocks.num_cached == 3
    filler = sequence([])
    blocks.extend(filler, 8)  # the three free pages, and one that must be given up
    assert len(blocks.match(sequence([1, 2, 3, 4, 5]))) == 1 == len(blocks.match(sequence([6, 7, 8])))
    blocks.free(filler)
    again = sequence([1, 2, 9])
    assert admit(blocks, again) == 2
    blocks.free(again)
    blocks.extend(filler, 10)
    assert len(blocks.match(sequence([1, 2, 3]))) == 1 and not blocks.match(sequence([6, 7, 8]))


def test_what_is_matched_is_not_given_up():
    blocks = BlockManager(3, 2)
    first = sequence([1, 2, 3, 4, 5])
    admit(blocks, first)
    blocks.free(first)
    second = sequence([1, 2, 3, 4, 9])
    pages = blocks.match(second)
    assert len(pages) == 2 and blocks.available_beside(pages) == 1
    assert admit(blocks, second) == 4 and blocks.num_free == 0
    with pytest.raises(ValueError, match="num_tokens: 7 need 1 more pages; only 0 can be had"):
        blocks.extend(second, 7)


def test_hit_rate_counts_tokens():
    blocks = BlockManager(4, 2)
    assert blocks.hit_rate == 0
    blocks.count(8, 0)
    blocks.count(8, 4)
    assert blocks.hit_rate == 0.25


def test_prompt_logprobs_and_rings_take_nothing_from_the_cache():
    blocks = BlockManager(8, 2)
    admit(blocks, sequence([1, 2, 3]))
    assert not blocks.match(sequence([1, 2, 3], prompt_logprobs=0))
    ring = BlockManager(8, 2, ring_pages=3)
    s = sequence(range(20))
    assert admit(ring, s) == 0 and len(s.block_table) == 3 == ring.pages_for(100)
    assert ring.pages_for(5) == 3 and ring.pages_for(3) == 2
    assert not ring.match(sequence(range(20))) and not ring.enable_prefix_caching
    off = BlockManager(8, 2, enable_prefix_caching=False)
    admit(off, sequence([1, 2, 3]))
    assert not off.match(sequence([1, 2, 3]))


@pytest.mark.parametrize(("window", "chunk", "page"), [(1, 1, 1), (5, 3, 4), (11, 7, 5), (8, 8, 4)])
def test_a_ring_holds_what_a_chunks_queries_see(window, chunk, page):
    """At any place of the chunk: the pages from its first key to its last query are different ones of the ring."""
    size = ring_pages(window, chunk, page)
    for start in range(60):
        seen = range(max(start - window + 1, 0) // page, (start + chunk - 1) // page + 1)
        assert len(seen) <= size


def test_a_page_is_known_once_all_its_tokens_are():
    blocks = BlockManager(8, 2)
    s = sequence([1, 2, 3])
    blocks.extend(s, 4)
    s.num_computed = 4  # of which the last was sampled by a step that runs
    blocks.register(s, 0, 1)
    assert len(blocks.match(sequence([1, 2, 3, 4, 5]))) == 1
    s.token_ids.append(4)
    blocks.register(s, 3, 2)
    assert len(blocks.match(sequence([1, 2, 3, 4, 5]))) == 2


def test_what_failed_is_unlearned():
    blocks = BlockManager(8, 2)
    first, second = sequence([1, 2, 3]), sequence([4, 5, 6])
    admit(blocks, first, step=1)
    admit(blocks, second, step=2)
    page = second.block_table[0]
    blocks.free(second)
    assert blocks.forget_since(2) == {page}
    assert not blocks.match(sequence([4, 5, 6])) and blocks.match(sequence([1, 2, 3]))
    assert blocks.num_cached == 0
    blocks.forget_since(0)
    assert not blocks.match(sequence([1, 2, 3]))


class BlockMachine(RuleBasedStateMachine):
    """Sequences of few different tokens come, grow and go; every page's content is known here, too."""

    PAGES, SIZE = 10, 2

    def __init__(self):
        super().__init__()
        self.blocks = BlockManager(self.PAGES, self.SIZE)
        self.live = []
        self.written = {}  # page: the tokens from the beginning to its end
        self.step = 0

    def write(self, s, start):
        for index in range(start // self.SIZE, len(s.block_table)):
            self.written[s.block_table[index]] = tuple(s.token_ids[: (index + 1) * self.SIZE])
        s.num_computed = len(s.token_ids)
        self.blocks.register(s, start, self.step)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def come(self, tokens):
        self.step += 1
        s = sequence(tokens)
        pages = self.blocks.match(s)
        for index, page in enumerate(pages):
            assert self.written[page] == tuple(tokens[: (index + 1) * self.SIZE]), "a hit is what a miss would compute"
        assert len(pages) * self.SIZE < len(tokens)
        if self.blocks.pages_for(len(tokens)) - len(pages) > self.blocks.available_beside(pages):
            return
        self.blocks.share(s, pages)
        self.blocks.extend(s, len(tokens))
        self.write(s, len(pages) * self.SIZE)
        self.live.append(s)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.integers(0, 1))
    def grow(self, data, token):
        s = data.draw(st.sampled_from(self.live))
        if self.blocks.missing(s, len(s.token_ids) + 1) <= self.blocks.num_free:
            self.step += 1
            s.token_ids.append(token)
            self.blocks.extend(s, len(s.token_ids))
            self.write(s, len(s.token_ids) - 1)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def go(self, data):
        s = data.draw(st.sampled_from(self.live))
        self.live.remove(s)
        self.blocks.free(s)
        assert s.block_table == []

    @rule(steps=st.integers(0, 3))
    def fail(self, steps):
        self.blocks.forget_since(self.step - steps)

    @invariant()
    def pages_are_conserved(self):
        held = [page for s in self.live for page in s.block_table]
        assert self.blocks.num_used == len(set(held))
        assert self.blocks._references == [held.count(page) for page in range(self.PAGES)]
        kinds = [set(held), set(self.blocks._free), set(self.blocks._unused)]
        assert sum(map(len, kinds)) == self.PAGES and set.union(*kinds) == set(range(self.PAGES))
        assert len(self.blocks._free) == len(kinds[1])
        known = {page for page, content in enumerate(self.blocks._content) if content is not None}
        assert known == set(self.blocks._page_of.values()) and kinds[2] <= known and not kinds[1] & known

    def teardown(self):
        for s in self.live:
            self.blocks.free(s)
        assert self.blocks.num_free == self.PAGES


BlockMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBlocks = BlockMachine.TestCase
