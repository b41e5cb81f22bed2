"""What the device must know of a step, in one buffer that one copy brings over, and the tables that stay there.

The pages of a sequence lie in the row of its slot in a table on the device, to which each step adds the few that are
new; the token that a sequence sampled last is in `tokens_of_slot`, from where the next step takes it, so that the host
need not know it. All else of a step is a few numbers a token and a sequence, computed here with numpy and packed into
pinned memory. Sizes are padded to a `Shape`, which a CUDA graph can be captured for: padding is tokens whose slot in
the cache is -1 and sequences of no keys.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from octavo.engine.sequence import Chunk, Sequence

ALIGNMENT = 16  # bytes; what kernels are compiled for


@dataclass(frozen=True)
class Shape:
    """A step's sizes once it is padded. In a decode each sequence has one token, from which it samples the next."""

    tokens: int
    sequences: int
    decode: bool

    @property
    def max_seqlen_q(self) -> int:
        """As many as one sequence may have: in a graph it must hold for any step of this shape."""
        return 1 if self.decode else self.tokens


class Layout:
    """Where each field of a shape lies in the buffer; all are vectors, aligned for the kernels that read them."""

    def __init__(self, shape: Shape, page_size: int, width: int = 0) -> None:
        tokens, sequences = shape.tokens, shape.sequences
        self.updates = sequences
        if not shape.decode:  # and a prefix that was in the cache
            self.updates += tokens // page_size + min(width, 1024)
        self.fields: dict[str, tuple[str, int, int]] = {}
        self.nbytes = 0
        for name, dtype, count in (
            ("ids", "int64", tokens),  # first: behind tokens_of_slot, with which it is one vector
            ("sources", "int32", tokens),  # where in that vector each token is
            ("positions", "int32", tokens),
            ("slot_mapping", "int64", tokens),
            ("slots", "int32", sequences),
            ("seq_lens", "int32", sequences),
            ("cu_seqlens_q", "int32", sequences + 1),
            ("last_rows", "int32", sequences),
            ("targets", "int64", sequences),  # the slot that each sampled token goes to
            ("update_at", "int64", self.updates),  # new entries of the table of pages
            ("update_to", "int32", self.updates),
            ("seeds", "int64", sequences),
            ("draws", "int64", sequences),
            ("temperature", "float32", sequences),
            ("top_k", "int32", sequences),
            ("top_p", "float32", sequences),
            ("min_p", "float32", sequences),
        ):
            self.fields[name] = dtype, self.nbytes, count
            self.nbytes += -(-count * int(dtype[-2:]) // 8 // ALIGNMENT) * ALIGNMENT

    def views(self, buffer: Any, library: Any) -> SimpleNamespace:
        """The fields, in a buffer of bytes of numpy's or torch's."""
        return SimpleNamespace(
            **{
                name: buffer[at : at + count * int(dtype[-2:]) // 8].view(getattr(library, dtype))
                for name, (dtype, at, count) in self.fields.items()
            }
        )


class _Staging:
    """A buffer of the host, with its fields by shape, and when the copy out of it is done."""

    def __init__(self, nbytes: int, pinned: bool) -> None:
        self.tensor = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        self.array = self.tensor.numpy()
        self.fields: dict[Shape, SimpleNamespace] = {}
        self.copied = torch.cuda.Event() if pinned else None


class StepInputs:
    """Packs steps and brings them over.

    Args:
        device: where to.
        max_num_seqs, max_num_batched_tokens: of a step, at most.
        width: pages of a sequence, at most; of a ring exactly.
        page_size: tokens a page.
        rolling: whether rows of the table are rings.
    """

    def __init__(
        self,
        device: torch.device,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        width: int,
        page_size: int,
        rolling: bool,
    ) -> None:
        self.page_size, self.width, self.rolling, self.device = page_size, width, rolling, device
        self.spare, self.nobody = max_num_seqs, max_num_seqs + 1  # slots of no request, and of no sequence at all
        slots = max_num_seqs + 2
        self.table = torch.zeros(slots, width, dtype=torch.int32, device=device)
        most = Layout(Shape(max_num_batched_tokens, max_num_seqs, False), page_size, width).nbytes
        self._first = -(-slots * 8 // ALIGNMENT) * ALIGNMENT  # bytes of tokens_of_slot
        self._buffer = torch.zeros(self._first + most, dtype=torch.uint8, device=device)
        self.tokens_of_slot = self._buffer[: self._first].view(torch.int64)
        pinned = device.type == "cuda"
        self._staging = [_Staging(most, pinned) for _ in range(2 if pinned else 1)]
        self._layouts: dict[Shape, tuple[Layout, SimpleNamespace]] = {}
        self._turn = 0
        self._table = np.zeros((slots, width), np.int32)
        self._owners: list[Sequence | None] = [None] * slots
        self._known = np.zeros(slots, np.int32)  # pages of each slot that the table has
        self._next = np.zeros(slots, np.int32)  # where its next chunk begins
        self._seen = np.zeros(slots, np.int64)  # the last step that it was in
        self._step = 0

    def forget(self, sequence: Sequence | None = None) -> None:
        """What the tables hold of a sequence, or of all after a step that failed, counts no more."""
        self._owners = [None if sequence in (None, owner) else owner for owner in self._owners]

    def newcomers(self, sequences: Items[Sequence], slots: np.ndarray, starts: np.ndarray) -> Iterator[Sequence]:
        """Those of a step that have just been given their slots, again perhaps, after a preemption.

        A step later the scheduler may have given one the slot that it had, but then it was not in the step between.
        """
        self._step += 1
        others = [self._owners[sequence.slot] is not sequence for sequence in sequences]  # type: ignore[index]
        new = np.array(others) | (self._next[slots] != starts) | (self._seen[slots] != self._step - 1)
        self._seen[slots] = self._step
        for i in np.flatnonzero(new).tolist():
            sequence, slot = sequences[i], slots[i]
            self._owners[slot] = sequence
            self._known[slot] = 0
            yield sequence

    def pack(self, chunks: Items[Chunk], shape: Shape, slots: np.ndarray, starts: np.ndarray) -> SimpleNamespace:
        """Computes the fields of a step but those of sampling, in the host's buffer; `send` brings them over.

        No chunks will do: such a step computes nothing but padding.
        """
        host = self._host(shape)
        count, tokens = len(chunks), len(chunks)
        lengths = np.ones(count, np.int32)
        if not shape.decode:
            lengths[:] = [chunk.length for chunk in chunks]
            tokens = int(lengths.sum())
        ends = starts + lengths
        self._next[slots] = ends
        self._add_pages(chunks, slots, host)

        host.cu_seqlens_q[0] = 0
        np.cumsum(lengths, out=host.cu_seqlens_q[1 : count + 1])
        host.cu_seqlens_q[count + 1 :] = tokens
        host.seq_lens[:count] = ends
        host.seq_lens[count:] = 0
        host.slots[:count] = slots
        host.slots[count:] = self.nobody
        host.targets[:count] = slots
        host.targets[count:] = self.nobody
        positions, slots_of_tokens = host.positions[:tokens], slots
        if shape.decode:
            positions[:] = starts
        else:
            firsts = host.cu_seqlens_q[:count]
            host.last_rows[:count] = firsts + lengths - 1
            host.last_rows[count:] = 0
            host.targets[:count][[not chunk.samples for chunk in chunks]] = self.nobody
            positions[:] = np.arange(tokens, dtype=np.int32) + np.repeat(starts - firsts, lengths)
            slots_of_tokens = np.repeat(slots, lengths)
        host.positions[tokens:] = 0
        pages = positions // self.page_size
        if self.rolling:
            pages %= self.width
        host.slot_mapping[:tokens] = self._table[slots_of_tokens, pages].astype(np.int64) * self.page_size
        host.slot_mapping[:tokens] += positions % self.page_size
        host.slot_mapping[tokens:] = -1
        self._put_ids(chunks, host, slots, starts, tokens)
        return host

    def _put_ids(
        self, chunks: Items[Chunk], host: SimpleNamespace, slots: np.ndarray, starts: np.ndarray, tokens: int
    ) -> None:
        """Of each token its id, or where the device has it."""
        base = self._first // 8
        host.sources[:] = np.arange(base, base + len(host.sources), dtype=np.int32)
        host.ids[tokens:] = 0
        lengths_known = np.array([len(chunk.sequence.token_ids) for chunk in chunks], np.int32)
        firsts = host.cu_seqlens_q[: len(chunks)]
        on_device = starts >= lengths_known
        host.sources[firsts[on_device]] = slots[on_device]
        for i in np.flatnonzero(~on_device).tolist():
            sequence, start, length, _ = chunks[i]
            ids = sequence.token_ids[start : start + length]
            at = int(firsts[i])
            host.ids[at : at + len(ids)] = ids
            host.sources[at + len(ids) : at + length] = slots[i]  # the last one may not be known yet

    def _add_pages(self, chunks: Items[Chunk], slots: np.ndarray, host: SimpleNamespace) -> None:
        """Notes the pages that sequences have been given since the last step."""
        counts = np.array([len(chunk.sequence.block_table) for chunk in chunks], np.int32)
        known = self._known[slots]
        at, to = [], []
        for i in np.flatnonzero(counts > known).tolist():
            slot, first, end = int(slots[i]), int(known[i]), int(counts[i])
            pages = chunks[i].sequence.block_table[first:end]
            self._table[slot, first:end] = pages
            at.append(np.arange(slot * self.width + first, slot * self.width + end))
            to.append(pages)
        self._known[slots] = counts
        used = 0
        if at:
            where, pages = np.concatenate(at), np.concatenate(to)
            used = min(len(where), len(host.update_at))
            host.update_at[:used], host.update_to[:used] = where[:used], pages[:used]
            if len(where) > used:  # those of a prefix that was in the cache, as a rule
                rest = (torch.from_numpy(x[used:]) for x in (where, pages.astype(np.int32)))
                self.table.view(-1).scatter_(0, *(to_device(x, self.device) for x in rest))
        host.update_at[used:] = self.nobody * self.width
        host.update_to[used:] = 0

    def _host(self, shape: Shape) -> SimpleNamespace:
        """The fields of the staging buffer whose turn it is, once its last copy is over, which it is as a rule."""
        self._turn = (self._turn + 1) % len(self._staging)
        staging = self._staging[self._turn]
        if staging.copied is not None:
            staging.copied.synchronize()
        layout, _ = self._layout(shape)
        fields = staging.fields.get(shape)
        if fields is None:
            fields = staging.fields[shape] = layout.views(staging.array, np)
        return fields

    def send(self, shape: Shape) -> SimpleNamespace:
        """Brings over what was packed last; returns the fields as the device has them, at the same place each time."""
        layout, fields = self._layout(shape)
        staging = self._staging[self._turn]
        target = self._buffer[self._first : self._first + layout.nbytes]
        target.copy_(staging.tensor[: layout.nbytes], non_blocking=True)
        if staging.copied is not None:
            staging.copied.record()
        return fields

    def fields(self, shape: Shape) -> SimpleNamespace:
        """Of a step of this shape, where the device has them."""
        return self._layout(shape)[1]

    def _layout(self, shape: Shape) -> tuple[Layout, SimpleNamespace]:
        found = self._layouts.get(shape)
        if found is None:
            if len(self._layouts) >= 512:  # on a CPU steps have all sizes
                self._layouts.clear()
                for staging in self._staging:
                    staging.fields.clear()
            layout = Layout(shape, self.page_size, self.width)
            fields = layout.views(self._buffer[self._first :], torch)
            fields.pool = self._buffer[: self._first + shape.tokens * 8].view(torch.int64)
            found = self._layouts[shape] = layout, fields
        return found


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on the device, without waiting for the copy."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def to_host(x: Any) -> Any:
    """A copy that is on its way, on a GPU; its memory is given to no one else before it has arrived."""
    if x is None or x.device.type == "cpu":
        return x if x is None else x.clone()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
