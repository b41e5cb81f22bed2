"""A runner without a model, which knows what is in every page and finds out when a sequence reads what is not its own.

What a model keeps of a token depends on all tokens before it, so here a page holds a hash of those at each position,
and the token that follows is one too: `continuation` says what a prompt must lead to, whatever else is computed.
"""

from octavo.engine.sequence import Sampled

VOCAB = 50
GARBAGE = VOCAB - 1  # never sampled but after something that a failed step has left behind


class RunnerError(Exception):
    pass


def follow(state, token):
    return hash((state, token))


def sampled_after(state):
    return hash((state, "sampled")) % (VOCAB - 1)


def continuation(prompt, length):
    """The tokens that follow a prompt."""
    state, tokens = 0, []
    for token in prompt:
        state = follow(state, token)
    for _ in range(length):
        tokens.append(sampled_after(state))
        state = follow(state, tokens[-1])
    return tokens


class Pending:
    def __init__(self, runner, sampled, error):
        self.runner, self.sampled, self.error, self.number = runner, sampled, error, runner.started

    def wait(self):
        assert self.number == self.runner.waited + 1, "steps are waited for in the order in which they were started"
        self.runner.waited = self.number
        if self.error:
            raise RunnerError(self.error)
        return self.sampled


class FakeRunner:
    """Computes steps as soon as they are started.

    `fail` is called with a step: "start" and "wait" let it raise there, and leave garbage in the pages that it writes.
    """

    def __init__(self, num_pages, page_size, max_num_seqs, *, window=None, ring=None, fail=lambda step: None):
        self.pages = [[None] * page_size for _ in range(num_pages)]  # (position, hash), hash None for garbage
        self.page_size, self.window, self.ring, self.fail = page_size, window, ring, fail
        self.slots = [None] * max_num_seqs  # (sequence, the token that it sampled last)
        self.started = self.waited = self.num_tokens = 0
        self.forgotten = set()

    def start(self, step):
        assert len({chunk.sequence.id for chunk in step.chunks}) == len(step.chunks) > 0
        lengths = [chunk.length for chunk in step.chunks]
        assert lengths == sorted(lengths, key=lambda length: length > 1), "chunks of one token come first"
        failure = self.fail(step)
        # A layer writes the keys of all chunks before any of them attends: so a chunk may read what another writes.
        for chunk in step.chunks:
            self._write(chunk, garbage=bool(failure))
        if failure == "start":
            raise RunnerError("start")
        self.started += 1
        self.num_tokens += sum(lengths)
        sampled = [Sampled(self._read(chunk)) for chunk in step.chunks if chunk.samples]
        for chunk in step.chunks:
            if not chunk.samples:
                self._read(chunk)
        return Pending(self, sampled, "wait" if failure else None)

    def forget(self, sequence):
        self.forgotten.add(sequence.id)

    def _tokens(self, chunk):
        """Those of the sequence up to the chunk's end."""
        tokens = chunk.sequence.token_ids[: chunk.end]
        if len(tokens) < chunk.end:
            assert len(tokens) == chunk.end - 1, "one token at most is not known yet"
            sequence, token = self.slots[chunk.sequence.slot]
            assert sequence is chunk.sequence
            tokens = [*tokens, token]
        return tokens

    def _at(self, chunk, position):
        index = position // self.page_size
        page = chunk.sequence.block_table[index if self.ring is None else index % self.ring]
        return self.pages[page], position % self.page_size

    def _states(self, chunk):
        state, states = 0, []
        for token in self._tokens(chunk):
            state = follow(state, token)
            states.append(state)
        return states

    def _write(self, chunk, garbage):
        states = self._states(chunk)
        for position in range(chunk.start, chunk.end):
            page, offset = self._at(chunk, position)
            page[offset] = position, None if garbage else states[position]

    def _read(self, chunk):
        """Checks what a chunk's queries see; returns what it samples, and keeps it for the next step."""
        states, good = self._states(chunk), True
        first = 0 if self.window is None else max(chunk.start - self.window + 1, 0)
        for position in range(first, chunk.end):
            page, offset = self._at(chunk, position)
            if page[offset] == (position, None):
                good = False
            else:
                assert page[offset] == (position, states[position]), (
                    f"sequence {chunk.sequence.id} reads at {position} what is not its own: {page[offset]}"
                )
        if not good:  # what comes of garbage is garbage
            for position in range(chunk.start, chunk.end):
                page, offset = self._at(chunk, position)
                page[offset] = position, None
        token = sampled_after(states[-1]) if good else GARBAGE
        if chunk.samples:
            self.slots[chunk.sequence.slot] = chunk.sequence, token
        return token
