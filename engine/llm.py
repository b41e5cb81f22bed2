"""The front door: a model by name, prompts in, text out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from operator import index as as_int
from typing import Any, overload

import torch

import octavo
from octavo.engine.block_manager import BlockManager, ring_pages
from octavo.engine.checkpoint import open_checkpoint
from octavo.engine.core import EngineCore, Request
from octavo.engine.devices import choose_device, choose_dtype
from octavo.engine.hub import resolve
from octavo.engine.kv_cache import DTYPES as CACHE_DTYPES
from octavo.engine.load_report import measure_load
from octavo.engine.loader import load_model
from octavo.engine.memory import pages_that_fit
from octavo.engine.model import Decoder
from octavo.engine.options import EngineOptions
from octavo.engine.outputs import Completion, refused
from octavo.engine.params import SamplingParams
from octavo.engine.progress import running_total, show_progress
from octavo.engine.runner import ModelRunner
from octavo.engine.scheduler import Scheduler
from octavo.engine.sequence import Chunk
from octavo.engine.sequence import Sequence as TokenSequence
from octavo.engine.tokenizer import Tokenizer

Message = dict[str, str]
Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Token:
    """One step of a stream: which continuation, its new token, the text that became final, why it ended, if it did."""

    index: int
    token_id: int
    text: str
    finish_reason: str | None


class LLM:
    """A loaded model. `load_report` says what loading took: bytes, seconds, the most memory on host and device.

    Args:
        model: a folder with `config.json` and safetensors, a `.gguf` file, a Hugging Face id, or the alias `smollm2`.
        device: "cpu", "cuda", "cuda:1"; by default the GPU where there is one.
        dtype: of activations and dense weights; by default fp32 on a CPU, on a GPU the checkpoint's own half precision
            or bf16. Quantised weights stay quantised.
        progress: called with (bytes read so far, bytes in all) while the weights load.
        allow_pickle: read pytorch_model.bin where there are no safetensors, by `torch.load(weights_only=True)`.
        warmup: on a GPU, compile every kernel that the model needs before the first request, so that none waits for
            the compiler; or False, and call `warmup()` at your own time.
        options: those of `EngineOptions`: `max_model_len`, `cache_tokens`, `max_num_seqs` and others.

    Raises:
        FileNotFoundError: no such model.
        ValueError: a checkpoint that can't be read or is not supported, or an argument out of range.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        progress: Callable[[int, int], None] | None = None,
        allow_pickle: bool = False,
        warmup: bool = True,
        **options: Any,
    ) -> None:
        limits = EngineOptions(**options)
        checkpoint = open_checkpoint(resolve(str(model), allow_pickle), allow_pickle)
        config, on = checkpoint.config, choose_device(device)
        tokenizer = checkpoint.tokenizer()
        with measure_load(on, checkpoint.num_bytes) as self.load_report:
            decoder = load_model(
                checkpoint,
                on,
                dtype or choose_dtype(config, on),
                limits.max_model_len or config.max_position_embeddings,
                running_total(progress, checkpoint.num_bytes),
            )
        self._open(decoder, tokenizer, limits)
        self.notes = [*checkpoint.notes, *self.runner.notes]
        if warmup and self.device.type == "cuda":
            self.warmup()

    @classmethod
    def from_decoder(cls, model: Decoder, tokenizer: Tokenizer | None = None, **options: Any) -> "LLM":
        """An LLM of a model that is loaded already, not warmed up; without a tokenizer there are token ids alone.

        Args:
            model: the model.
            tokenizer: its tokenizer.
            options: those of `EngineOptions`.

        Raises:
            ValueError: an option out of range.
        """
        llm = cls.__new__(cls)
        llm._open(model, tokenizer, EngineOptions(**options))
        llm.notes = [*llm.runner.notes]
        return llm

    def _open(self, model: Decoder, tokenizer: Tokenizer | None, options: EngineOptions) -> None:
        self.model, self.config, self.device = model, model.config, model.device
        self.max_model_len = options.max_model_len or self.config.max_position_embeddings
        window, page_size = self.config.sliding_window, options.page_size
        ring = None
        if window is not None and window < self.max_model_len:
            ring = ring_pages(window, options.max_num_batched_tokens, page_size)
        cache_dtype = None if options.kv_cache_dtype is None else CACHE_DTYPES[options.kv_cache_dtype]
        cache_tokens = options.cache_tokens or self._cache_tokens(options, cache_dtype)
        self.blocks = BlockManager(
            -(-cache_tokens // page_size),
            page_size,
            enable_prefix_caching=options.enable_prefix_caching,
            ring_pages=ring,
        )
        self.runner = ModelRunner(
            model,
            num_pages=self.blocks.num_pages,
            page_size=page_size,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            cache_dtype=cache_dtype,
            enforce_eager=options.enforce_eager,
            ring_pages=ring,
        )
        self.scheduler = Scheduler(
            self.blocks, options.max_num_seqs, options.max_num_batched_tokens, max_waiting=options.max_waiting
        )
        self.core = EngineCore(
            self.runner,
            self.scheduler,
            tokenizer,
            vocab_size=self.config.vocab_size,
            max_model_len=self.max_model_len,
            eos_token_ids=(*self.config.eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ())),
        )
        self._busy = False
        self._count = 0

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokens that end a text: the configuration's, and the tokenizer's."""
        return self.core.eos_token_ids

    def warmup(self, progress: Callable[[int, int], None] | None = None) -> octavo.WarmupReport:
        """Compiles, and loads, every kernel that batches of this model need, and captures CUDA graphs of them.

        Args:
            progress: called with (kernels done, kernels in all), then with (graphs done, graphs in all).

        Returns:
            What was compiled, what Triton's cache had, and how long it took.

        Raises:
            ValueError: the model is not on a GPU.
        """
        return self.runner.warmup(progress)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        progress: bool | None = None,
        return_errors: bool = False,
    ) -> list[Completion]:
        """Continues prompts, batched, in the order given.

        Args:
            prompts: a text or token ids, or several.
            params: for all of them, or one for each; `SamplingParams()` by default.
            priority: one for each prompt: the smaller go first.
            progress: show a bar with tokens per second; None for where stderr is a terminal.
            return_errors: let the others go on where a request is invalid or fails: its completion has the
                finish_reason "error", and its `error` says why. Otherwise that is raised, and nobody goes on.

        Raises:
            TypeError, ValueError: an invalid request, before anything is computed: an empty prompt, one longer than the
                context, a token id outside the vocabulary, more than the cache could hold.
            RuntimeError: a request that failed.
        """
        several = _several(prompts)
        settings = [params or SamplingParams()] * len(several) if not isinstance(params, Sequence) else list(params)
        ranks = [0] * len(several) if priority is None else list(priority)
        for name, values in (("params", settings), ("priority", ranks)):
            if len(values) != len(several):
                raise ValueError(f"{name}: {len(values)} of them; expected one for each of {len(several)} prompts")
        invalid: dict[int, Completion] = {}
        valid: list[tuple[list[int], SamplingParams, int]] = []
        for i, (prompt, setting, rank) in enumerate(zip(several, settings, ranks, strict=True)):
            ids: list[int] = []
            try:
                ids = self.encode(prompt, f"prompts[{i}]")
                self.core.check(ids, setting, f"prompts[{i}]")
            except (TypeError, ValueError) as error:
                if not return_errors:
                    raise
                invalid[i] = refused(ids, setting.n, str(error))
            else:
                valid.append((ids, setting, rank))
        made = iter(self._run(valid, progress, return_errors))
        return [invalid[i] if i in invalid else next(made) for i in range(len(several))]

    def _run(
        self, requests: list[tuple[list[int], SamplingParams, int]], progress: bool | None, return_errors: bool
    ) -> list[Completion]:
        total = sum(params.n for _, params, _ in requests)
        with self._requests(requests) as added, show_progress(total, progress) as show:
            done = read = made = 0
            while done < total:
                for event in self.core.step():
                    made += event.token_id is not None
                    if event.finish_reason == "error" and not return_errors:
                        raise RuntimeError(event.request.completion.error)
                    if event.finish_reason is not None:
                        done += 1
                        read += len(event.request.completion.prompt_token_ids) if event.output.index == 0 else 0
                show(done, read, made)
            return [request.completion for request in added]

    @overload
    def chat(self, messages: list[Message], params: SamplingParams | None = ..., **options: Any) -> Completion: ...
    @overload
    def chat(
        self, messages: list[list[Message]], params: SamplingParams | None = ..., **options: Any
    ) -> list[Completion]: ...
    def chat(
        self, messages: list[Message] | list[list[Message]], params: SamplingParams | None = None, **options: Any
    ) -> Completion | list[Completion]:
        """Answers a conversation, `[{"role": …, "content": …}, …]`, through the model's chat template.

        Args:
            messages: the conversation; or several, of which there is a list of answers.
            params: as `generate` takes them.
            options: those of `generate`.
        """
        if messages and isinstance(messages[0], list):
            return self.generate([self.encode(m) for m in messages], params, **options)
        return self.generate([self.encode(messages)], params, **options)[0]  # type: ignore[arg-type]

    def stream(self, prompt: Prompt | list[Message], params: SamplingParams | None = None) -> Iterator[Token]:
        """Continues one prompt (text, token ids, or a conversation), token by token as they come.

        Raises:
            TypeError, ValueError: an invalid request.
            RuntimeError: it failed.
        """
        with self._requests([(self.encode(prompt), params or SamplingParams(), 0)], incremental=True) as (request,):
            while request.unfinished:
                for event in self.core.step():
                    if event.finish_reason == "error" or event.token_id is None:
                        raise RuntimeError(request.completion.error)
                    yield Token(event.output.index, event.token_id, event.text, event.finish_reason)

    def prompt_logprobs(self, token_ids: list[int]) -> list[float]:
        """log p(token | those before it) of every token of a text but the first; natural logarithm."""
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        self.core.check(token_ids, params, "token_ids")
        (completion,) = self.generate([token_ids], params, progress=False)
        return [token.logprob for token in completion.prompt_logprobs or []]

    def prompt_logits(self, token_ids: list[int], chunk_size: int) -> Iterator[torch.Tensor]:
        """The logits at every position of a text, `[tokens, vocab]` a chunk of `chunk_size` tokens."""
        with self._alone():
            sequence = TokenSequence(-1, list(token_ids), SamplingParams(max_tokens=1))
            self.blocks.extend(sequence, len(token_ids))
            try:
                for start in range(0, len(token_ids), chunk_size):
                    length = min(chunk_size, len(token_ids) - start)
                    yield self.runner.logits(Chunk(sequence, start, length, False))
            finally:
                self.blocks.free(sequence)

    def take(self) -> None:
        """Reserves this LLM for one caller, until `give_back`; RuntimeError where it is another's."""
        if self._busy:
            raise RuntimeError("this LLM is in the middle of another generate or stream: finish or close that first")
        self._busy = True

    def give_back(self) -> None:
        self._busy = False

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self.take()
        try:
            yield
        finally:
            self.give_back()

    @contextmanager
    def _requests(
        self, requests: list[tuple[list[int], SamplingParams, int]], incremental: bool = False
    ) -> Iterator[list[Request]]:
        """Adds requests, and takes them out again, also when the caller stops listening."""
        with self._alone():
            added: list[Request] = []
            try:
                for prompt, params, priority in requests:
                    self._count += 1
                    added.append(
                        self.core.add(str(self._count), prompt, params, priority=priority, incremental=incremental)
                    )
                yield added
            finally:
                for request in added:
                    self.core.abort(request.id)
                self.core.drain()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        if self.core.tokenizer is None:
            raise ValueError("this LLM has no tokenizer: give it token ids")
        return self.core.tokenizer

    def encode(self, prompt: Prompt | list[Message], name: str = "prompt") -> list[int]:
        """Token ids of a text, of token ids, or of a conversation; TypeError calls it by its `name`."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if prompt and isinstance(prompt[0], dict):
            return self.tokenizer.apply_chat_template(prompt)  # type: ignore[arg-type]
        try:
            return [as_int(token) for token in prompt]  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(f"{name}: {prompt!r}; expected a text, or token ids, which are integers") from None

    def _cache_tokens(self, options: EngineOptions, cache_dtype: torch.dtype | None) -> int:
        fitting = pages_that_fit(
            self.model,
            options.page_size,
            cache_dtype,
            options.gpu_memory_utilization,
            options.max_num_batched_tokens,
            options.max_num_seqs,
        )
        return max(min(fitting * options.page_size, options.max_num_seqs * self.max_model_len), options.page_size)


def _several(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """The prompts of one text, of one list of token ids, or of several of either."""
    if isinstance(prompts, str):
        return [prompts]
    if len(prompts) and isinstance(prompts[0], Integral):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
