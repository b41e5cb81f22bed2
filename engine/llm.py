"""The front door: a model by name, prompts in, text out."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

import octavo
from octavo.engine.block_manager import BlockManager
from octavo.engine.checkpoint import open_checkpoint
from octavo.engine.config import ModelConfig
from octavo.engine.hub import resolve
from octavo.engine.load_report import measure_load
from octavo.engine.loader import load_model
from octavo.engine.runner import ModelRunner
from octavo.engine.scheduler import Scheduler
from octavo.engine.sequence import SamplingParams, Sequence
from octavo.engine.tokenizer import TokenStream
from octavo.engine.warmup import step_calls

Message = dict[str, str]
CPU_CACHE_BYTES = 1 << 30
"""What the cache takes of a CPU's memory unless `cache_tokens` says otherwise."""


@dataclass(frozen=True)
class Completion:
    """What became of one prompt.

    `finish_reason` is "stop" at an end-of-sequence token and "length" at `max_tokens` or the end of the context.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str


@dataclass(frozen=True)
class Token:
    """One step of a stream: which prompt, its new token, the text that became final, and why it ended, if it did."""

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
        max_model_len: longest context in tokens; by default the model's own.
        cache_tokens: tokens that the KV cache holds; by default what fits in 80 % of the GPU's free memory, or 1 GiB
            on a CPU, and never more than `max_num_seqs` full contexts.
        page_size: tokens a page of the cache.
        max_num_seqs: requests in one batch at most.
        max_num_batched_tokens: tokens in one step at most; longer prompts are computed in chunks.
        progress: called with (bytes read so far, bytes in all) while the weights load.
        allow_pickle: read pytorch_model.bin where there are no safetensors, by `torch.load(weights_only=True)`.
        warmup: on a GPU, compile every kernel that the model needs before the first request, so that none waits for
            the compiler; or False, and call `warmup()` at your own time.

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
        max_model_len: int | None = None,
        cache_tokens: int | None = None,
        page_size: int = 16,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        progress: Callable[[int, int], None] | None = None,
        allow_pickle: bool = False,
        warmup: bool = True,
    ) -> None:
        limits = dict(page_size=page_size, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
        for name, value in (limits | dict(max_model_len=max_model_len, cache_tokens=cache_tokens)).items():
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value}; expected at least 1")
        checkpoint = open_checkpoint(resolve(str(model), allow_pickle), allow_pickle)
        self.config = checkpoint.config
        self.notes = checkpoint.notes
        self.device = choose_device(device)
        self.max_model_len = max_model_len or self.config.max_position_embeddings
        self.tokenizer = checkpoint.tokenizer()
        self.eos_token_ids = frozenset(self.config.eos_token_ids) | frozenset(self.tokenizer.eos_token_ids)
        with measure_load(self.device, checkpoint.num_bytes) as self.load_report:
            self.model = load_model(
                checkpoint,
                self.device,
                dtype or choose_dtype(self.config, self.device),
                self.max_model_len,
                _accumulate(progress, checkpoint.num_bytes),
            )
        cache_tokens = cache_tokens or self._cache_tokens(max_num_seqs, page_size)
        self.blocks = BlockManager(-(-cache_tokens // page_size), page_size)
        self.runner = ModelRunner(self.model, self.blocks)
        self.scheduler = Scheduler(self.blocks, max_num_seqs, max_num_batched_tokens)
        self._next_id = 0
        if warmup and self.device.type == "cuda":
            self.warmup()

    def warmup(self, progress: Callable[[int, int], None] | None = None) -> octavo.WarmupReport:
        """Compiles, and loads, every kernel that batches of this model need, in parallel processes.

        Args:
            progress: called with (kernels done, kernels in all).

        Returns:
            What was compiled, what Triton's cache had, and how long it took.

        Raises:
            ValueError: the model is not on a GPU.
        """
        if self.device.type != "cuda":
            raise ValueError(f"device: {self.device}; only a GPU's kernels are compiled")
        calls = step_calls(
            self.model, self.runner.kv_cache, self.scheduler.max_num_batched_tokens, self.scheduler.max_num_seqs
        )
        return octavo.warmup(calls, device=self.device, progress=progress)

    def generate(
        self, prompts: str | list[str] | list[list[int]], params: SamplingParams | None = None
    ) -> list[Completion]:
        """Continues prompts, batched, in the order given.

        Args:
            prompts: texts, or lists of token ids.
            params: for all of them; `SamplingParams()` by default.

        Raises:
            ValueError: an empty prompt, one longer than the context, or a token id outside the vocabulary.
        """
        encoded = self._encode([prompts] if isinstance(prompts, str) else list(prompts))
        texts = [""] * len(encoded)
        tokens: list[list[int]] = [[] for _ in encoded]
        reasons = [""] * len(encoded)
        for token in self._stream(encoded, params or SamplingParams()):
            texts[token.index] += token.text
            tokens[token.index].append(token.token_id)
            reasons[token.index] = token.finish_reason or ""
        return [Completion(*fields) for fields in zip(encoded, tokens, texts, reasons, strict=True)]

    def chat(self, messages: list[Message], params: SamplingParams | None = None) -> Completion:
        """Answers a conversation, `[{"role": …, "content": …}, …]`, through the model's chat template."""
        return self.generate([self.tokenizer.apply_chat_template(messages)], params)[0]

    def stream(self, prompt: str | list[int] | list[Message], params: SamplingParams | None = None) -> Iterator[Token]:
        """Continues one prompt (text, token ids, or a conversation), token by token as they come."""
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
            prompt = self.tokenizer.apply_chat_template(prompt)
        yield from self._stream(self._encode([prompt]), params or SamplingParams())

    @torch.inference_mode()
    def prompt_logprobs(self, token_ids: list[int]) -> list[float]:
        """log p(token | those before it) of every token of a text but the first; natural logarithm."""
        self._check(token_ids, "token_ids")
        out: list[float] = []
        targets = torch.tensor(token_ids[1:], device=self.device)
        for logits in self.runner.prompt_logits(token_ids, self.scheduler.max_num_batched_tokens):
            target = targets[len(out) : len(out) + logits.shape[0]]
            logprobs = logits[: target.shape[0]].log_softmax(-1)
            out += logprobs.gather(1, target.unsqueeze(1)).squeeze(1).tolist()
        return out

    def _stream(self, prompts: list[list[int]], params: SamplingParams) -> Iterator[Token]:
        if self.scheduler.has_work:
            raise RuntimeError("this LLM is in the middle of another generate or stream: finish or close that first")
        sequences = [self._sequence(p, params) for p in prompts]
        index = {s.id: i for i, s in enumerate(sequences)}
        streams = [TokenStream(self.tokenizer) for _ in sequences]
        try:
            for sequence in sequences:
                self.scheduler.add(sequence)
            while self.scheduler.has_work:
                for sequence in self._step():
                    stream = streams[index[sequence.id]]
                    text = stream.push(sequence.token_ids[-1])
                    if sequence.finish_reason:
                        text += stream.flush()
                    yield Token(index[sequence.id], sequence.token_ids[-1], text, sequence.finish_reason)
        finally:
            for sequence in sequences:  # also when the caller stops listening
                if sequence.finish_reason is None:
                    self.scheduler.finish(sequence, "abort")
                self.sampler.forget(sequence)

    def _step(self) -> list[Sequence]:
        """Runs one batch; returns the sequences that got a token."""
        chunks = self.scheduler.schedule()
        logits = self.runner.run(chunks)
        sampled = [chunk.sequence for chunk in chunks if chunk.samples]
        for chunk in chunks:
            self.scheduler.computed(chunk)
        if sampled:
            for sequence, token in zip(sampled, self.sampler.sample(logits, sampled), strict=True):
                sequence.token_ids.append(token)
                if token in self.eos_token_ids and not sequence.params.ignore_eos:
                    self.scheduler.finish(sequence, "stop")
                elif len(sequence.token_ids) == sequence.max_length:
                    self.scheduler.finish(sequence, "length")
        return sampled

    def _sequence(self, prompt: list[int], params: SamplingParams) -> Sequence:
        room = self.max_model_len - len(prompt)
        self._next_id += 1
        return Sequence(self._next_id, list(prompt), replace(params, max_tokens=min(params.max_tokens, room)))

    def _encode(self, prompts: list) -> list[list[int]]:
        encoded = []
        for i, prompt in enumerate(prompts):
            token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
            self._check(token_ids, f"prompts[{i}]")
            encoded.append(token_ids)
        return encoded

    def _check(self, token_ids: list[int], name: str) -> None:
        if not token_ids:
            raise ValueError(f"{name}: empty; expected at least one token")
        if len(token_ids) >= self.max_model_len:
            raise ValueError(
                f"{name}: {len(token_ids)} tokens, but the context holds {self.max_model_len} and needs room for at "
                "least one more: shorten the prompt"
            )
        worst = next((t for t in token_ids if not 0 <= t < self.config.vocab_size), None)
        if worst is not None:
            raise ValueError(f"{name}: token id {worst}; expected 0 to {self.config.vocab_size - 1}")

    def _cache_tokens(self, max_num_seqs: int, page_size: int) -> int:
        c = self.config
        bytes_per_token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * self.model.dtype.itemsize
        if self.device.type == "cuda":
            room = int(0.8 * torch.cuda.mem_get_info(self.device)[0])
        else:
            room = CPU_CACHE_BYTES
        return max(min(room // bytes_per_token, max_num_seqs * self.max_model_len), page_size)


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device that a user means, by default the GPU where there is one.

    Raises:
        ValueError: a name that is none, or a GPU that is not there.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: {device!r}; expected cpu, cuda or cuda:<index>") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {device!r}, but this machine has {torch.cuda.device_count()} GPUs: choose cpu")
    return chosen


def choose_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """Of activations, where the user does not say: fp32 on a CPU, half precision on a GPU."""
    if device.type == "cpu":
        return torch.float32
    return config.dtype if config.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


def _accumulate(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(min(done, total), total)

    return advance
