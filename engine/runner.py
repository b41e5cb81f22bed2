"""Steps on the device: chunks of sequences in, sampled tokens out, without waiting in between.

`start` enqueues a step and returns; `Pending.wait` gives what it has sampled. The next step can be started before: the
tokens that it needs are on the device already. On a GPU a step is one copy, one CUDA graph, and one copy back. On a CPU
the same code runs at once, and sizes are not padded.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import octavo
from octavo.engine.experts import ExpertLoop
from octavo.engine.graphs import Graphs, Sizes, modes
from octavo.engine.inputs import Shape, StepInputs, to_device, to_host
from octavo.engine.kv_cache import KVCache
from octavo.engine.model import AttentionMetadata, Decoder
from octavo.engine.pending import Parts, Pending, Prompts
from octavo.engine.sampler import Drawn, EditedSampler, Mode, SlotSettings, drawn_settings, prompt_logprobs
from octavo.engine.sequence import Chunk, Sequence, Step
from octavo.engine.warmup import distinct_layers, step_calls

NOT_CAPTURED = "experts are computed one by one, which no CUDA graph can hold: steps are launched from Python"


class ModelRunner:
    """Owns the cache and all that a step needs on the device.

    Args:
        model: the decoder.
        num_pages, page_size: of the cache.
        max_num_seqs: sequences of a step, at most; their slots are 0 to max_num_seqs - 1.
        max_num_batched_tokens: tokens of a step, at most.
        max_model_len: tokens of a sequence, at most.
        cache_dtype: of the cache; by default the model's. float8_e4m3fn, float8_e5m2 or int8 take half the memory.
        enforce_eager: launch every kernel from Python instead of replaying CUDA graphs.
        ring_pages: None, or of a model with a sliding window the pages of a sequence (`BlockManager`'s).
        padded: whether steps are padded to the sizes that graphs have; by default on a GPU, with graphs or without.

    Raises:
        ValueError: a ring that is too short, or beside a model without a window.
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
        cache_dtype: torch.dtype | None = None,
        enforce_eager: bool = False,
        ring_pages: int | None = None,
        padded: bool | None = None,
    ) -> None:
        self.model, self.device, c = model, model.device, model.config
        self.rolling = ring_pages is not None
        width = -(-max_model_len // page_size)
        if ring_pages is not None:
            needed = (c.sliding_window or 0) + max_num_batched_tokens - 1
            if c.sliding_window is None or ring_pages * page_size < needed:
                raise ValueError(
                    f"ring_pages: {ring_pages} pages of {page_size}; expected at least {needed} tokens, a window and a "
                    f"step, or None for a model without a window (sliding_window: {c.sliding_window})"
                )
            width = ring_pages
        on_gpu = self.device.type == "cuda"
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.cache = KVCache.empty(c, num_pages, page_size, cache_dtype or model.dtype, self.device)
        self.inputs = StepInputs(self.device, max_num_seqs, max_num_batched_tokens, width, page_size, self.rolling)
        self.settings = SlotSettings(max_num_seqs)
        self.edited = EditedSampler(self.device, max_num_seqs, c.vocab_size)
        self.sizes = Sizes(max_num_seqs, max_num_batched_tokens) if (on_gpu if padded is None else padded) else None
        self.notes: tuple[str, ...] = ()
        self.graphs: Graphs | None = None
        self._rehearsed = min(distinct_layers(model), model, key=lambda m: len(m.layers))
        self.stream: torch.cuda.Stream | None = None
        if on_gpu:
            self.stream = torch.cuda.Stream(self.device)
            self.stream.wait_stream(torch.cuda.current_stream(self.device))  # the weights, and the zeros of the tables
            loops = any(isinstance(getattr(layer.mlp, "experts", None), ExpertLoop) for layer in model.layers)
            if loops and not enforce_eager:
                self.notes = (NOT_CAPTURED,)
            elif not enforce_eager:
                self.graphs = Graphs(self._compute, self._rehearse, self.stream)
        self._prompts = Prompts()

    @property
    def num_graphs(self) -> int:
        return 0 if self.graphs is None else self.graphs.count

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the cache, and of what graphs took when they were captured."""
        return {"cache": self.cache.nbytes, "graphs": 0 if self.graphs is None else self.graphs.nbytes}

    def warmup(self, progress: Callable[[int, int], None] | None = None) -> octavo.WarmupReport:
        """Compiles every kernel that steps of this model need, in parallel processes, and captures their graphs.

        Args:
            progress: called with (kernels done, kernels in all), then with (graphs done, graphs in all).

        Raises:
            ValueError: the model is not on a GPU.
        """
        if self.device.type != "cuda" or self.sizes is None:
            raise ValueError(f"device: {self.device}; only a GPU's kernels are compiled")
        calls = step_calls(self.model, self.cache, self.sizes.every(), self.inputs.width, self.rolling)
        report = octavo.warmup(calls, device=self.device, progress=progress)
        self.capture_all(progress)
        return report

    def capture_all(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Captures the graphs of all sizes, where there are graphs, whose kernels should be compiled by then."""
        if self.graphs is None or self.sizes is None:
            return
        every = [(shape, mode) for shape in self.sizes.every() for mode in modes(shape)]
        with self._on_stream():
            for done, (shape, mode) in enumerate(every, 1):
                self.graphs.capture(shape, mode)
                if progress is not None:
                    progress(done, len(every))
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def start(self, step: Step) -> Pending:
        """Enqueues a step; nothing waits for the device, but where a graph is captured that no warm-up has.

        Raises:
            Exception: whatever goes wrong; the sequences of this step must not be continued then.
        """
        try:
            with self._on_stream():
                return self._start(step.chunks)
        except BaseException:
            self.inputs.forget()
            raise

    def forget(self, sequence: Sequence) -> None:
        """Drops what is kept of a sequence that has ended."""
        self.inputs.forget(sequence)
        self.settings.forget(sequence)
        self._prompts.take(sequence.id)

    def logits(self, chunk: Chunk) -> torch.Tensor:
        """The logits of all tokens of a chunk, `[length, vocab]` fp32; its sequence has pages and no slot.

        Raises:
            ValueError: more tokens than a step has.
        """
        if chunk.length > self.max_num_batched_tokens:
            raise ValueError(
                f"chunk: {chunk.length} tokens; expected at most {self.max_num_batched_tokens}, as of a step"
            )
        chunk = Chunk(replace(chunk.sequence, slot=self.inputs.spare), chunk.start, chunk.length, False)
        with self._on_stream():
            slots, starts = np.array([self.inputs.spare], np.int32), np.array([chunk.start], np.int32)
            list(self.inputs.newcomers([chunk.sequence], slots, starts))
            shape = self.shape_of([chunk])
            self.inputs.pack([chunk], shape, slots, starts)
            self.inputs.send(shape)
            logits = self.model.logits(self._compute(shape, Mode.EDITED)[: chunk.length])
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return logits

    def shape_of(self, chunks: Items[Chunk]) -> Shape:
        """The sizes that a step of these chunks is computed with."""
        tokens = sum([chunk.length for chunk in chunks])
        decode = tokens == len(chunks) and all(chunk.samples for chunk in chunks)
        if self.sizes is None:
            return Shape(tokens, len(chunks), decode)
        return self.sizes.shape(tokens, len(chunks), decode)

    def _start(self, chunks: list[Chunk]) -> Pending:
        sequences = [chunk.sequence for chunk in chunks]
        slots = np.array([sequence.slot for sequence in sequences], np.int32)
        starts = np.array([chunk.start for chunk in chunks], np.int32)
        for sequence in self.inputs.newcomers(sequences, slots, starts):
            self.settings.adopt(sequence)
            self.edited.adopt(sequence)
        shape = self.shape_of(chunks)
        ends = starts + np.array([chunk.length for chunk in chunks], np.int32)
        mode = self.settings.mode(slots, starts, ends)
        if self.graphs is not None:
            mode = mode if mode in (*modes(shape), Mode.EDITED) else Mode.DRAWN
            self.graphs.capture(shape, mode)
        host = self.inputs.pack(chunks, shape, slots, starts)
        if mode is not Mode.GREEDY:
            self.settings.pack(host, slots, ends)
        fields = self.inputs.send(shape)
        result = self._compute(shape, mode) if self.graphs is None else self.graphs.replay(shape, mode)
        drawn = Drawn(result)
        following: dict[int, tuple[list[int], Parts]] = {}
        if mode is Mode.EDITED:
            drawn, following = self._edit(result, fields, shape, chunks)
        return Pending(chunks, Drawn(*map(to_host, drawn)), following, self._prompts, self.stream)

    def _compute(self, shape: Shape, mode: Mode, model: Decoder | None = None) -> torch.Tensor:
        """Enqueues a step whose inputs have been sent: this is what a graph holds.

        Args:
            model: in place of the runner's.

        Returns:
            The tokens, `[sequences]`, or with Mode.EDITED the hidden states of all tokens.
        """
        fields = self.inputs.fields(shape)
        self.inputs.table.view(-1).scatter_(0, fields.update_at, fields.update_to)
        hidden = (model or self.model).hidden(
            fields.pool.index_select(0, fields.sources),
            self.cache,
            AttentionMetadata(
                positions=fields.positions,
                slot_mapping=fields.slot_mapping,
                block_table=self.inputs.table.index_select(0, fields.slots),
                seq_lens=fields.seq_lens,
                cu_seqlens_q=fields.cu_seqlens_q,
                max_seqlen_q=shape.max_seqlen_q,
                rolling=self.rolling,
            ),
        )
        if mode is Mode.EDITED:
            return hidden
        logits = self._logits(hidden, fields, shape)
        settings: dict[str, Any] = drawn_settings(fields) if mode is Mode.DRAWN else {}
        tokens = octavo.sample(logits, **settings)
        self._keep(tokens, fields)
        return tokens

    def _logits(self, hidden: torch.Tensor, fields: SimpleNamespace, shape: Shape) -> torch.Tensor:
        """`[sequences, vocab]`, in the model's dtype: octavo.sample reads that as it is."""
        return self.model.head(hidden if shape.decode else hidden.index_select(0, fields.last_rows))

    def _keep(self, tokens: torch.Tensor, fields: SimpleNamespace) -> None:
        """Keeps what was sampled for the next step. A row without a distribution has -1: it goes on with 0, unseen."""
        self.inputs.tokens_of_slot.scatter_(0, fields.targets, tokens.clamp(min=0))

    def _edit(
        self, hidden: torch.Tensor, fields: SimpleNamespace, shape: Shape, chunks: list[Chunk]
    ) -> tuple[Drawn, dict[int, tuple[list[int], Parts]]]:
        """Samples behind the graph, and looks at prompts: at the tokens that follow each chunk's."""
        drawn = self.edited.sample(self._logits(hidden, fields, shape), fields, chunks)
        self._keep(drawn.tokens, fields)
        following = {}
        row = 0
        for i, (sequence, start, length, _) in enumerate(chunks):
            count, rows = sequence.params.prompt_logprobs, hidden[row : row + length]
            tokens = sequence.token_ids[start + 1 : min(start + length + 1, sequence.prompt_length)]
            if count is not None and tokens:
                targets = to_device(torch.tensor(tokens), self.device)
                following[i] = tokens, prompt_logprobs(self.model.head, rows[: len(tokens)], targets, count)
            row += length
        return drawn, following

    def _prepare(self, shape: Shape) -> None:
        """Inputs of a step of nothing but padding."""
        nothing = np.zeros(0, np.int32)
        self.settings.pack(self.inputs.pack([], shape, nothing, nothing), nothing, nothing)
        self.inputs.send(shape)

    def _rehearse(self, shape: Shape, mode: Mode) -> None:
        """A step of nothing but padding, through one layer of each kind: what the others do, these do."""
        self._prepare(shape)
        self._compute(shape, mode, self._rehearsed)

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        with torch.inference_mode():
            if self.stream is None:
                yield
            else:
                with torch.cuda.stream(self.stream):
                    yield
