"""Text to token ids and back, from a Hugging Face folder or from the metadata of a GGUF.

Both end in a transformers tokenizer. A GGUF holds a vocabulary, merges or scores, and the name of a way to split text
before merging; what is built of them here tokenises as llama.cpp does.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerBase

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # token types of a GGUF that are found whole in a text, before any splitting

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
PRE_TOKENIZERS = ("smollm", "gpt-2", *_LLAMA3, "tekken")
"""Values of `tokenizer.ggml.pre` that are supported."""


class Tokenizer:
    """A tokenizer; build one with `from_folder` or `from_gguf`.

    Args:
        backend: transformers' object.
        eos_token_ids: the tokens that end a completion; the backend's own is added.
    """

    def __init__(self, backend: "PreTrainedTokenizerBase", eos_token_ids: Sequence[int] = ()) -> None:
        self._backend = backend
        own = () if backend.eos_token_id is None else (backend.eos_token_id,)
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys((*eos_token_ids, *own)))

    @classmethod
    def from_folder(cls, folder: Path, eos_token_ids: Sequence[int] = ()) -> "Tokenizer":
        """Reads tokenizer.json, or whatever else of a Hugging Face folder transformers can read.

        Raises:
            ValueError: transformers can't make a tokenizer of it.
        """
        from transformers import AutoTokenizer

        try:
            return cls(AutoTokenizer.from_pretrained(folder, local_files_only=True), eos_token_ids)
        except Exception as error:  # transformers raises almost anything, depending on what is missing
            reason = (str(error).strip() or "no reason").splitlines()[0]
            raise ValueError(f"{folder}: no usable tokenizer ({type(error).__name__}: {reason})") from error

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], eos_token_ids: Sequence[int] = ()) -> "Tokenizer":
        """Builds the tokenizer that a GGUF's metadata describes: byte-level BPE ("gpt2") or SentencePiece ("llama").

        Raises:
            ValueError: a key is missing, or the kind of tokenizer or of pre-tokenizer is not supported.
        """
        from transformers import PreTrainedTokenizerFast

        tokens = _list(metadata, "tokens")
        kind = metadata.get("tokenizer.ggml.model")
        if kind == "gpt2":
            backend = _byte_level_bpe(metadata, tokens)
        elif kind == "llama":
            backend = _sentencepiece_bpe(metadata, tokens)
        else:
            raise ValueError(f"tokenizer.ggml.model: {kind!r}; supported: 'gpt2', 'llama'")
        _add_special_tokens(backend, metadata, tokens)
        names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        special = {name: token for name, key in names.items() if (token := _named_token(metadata, tokens, key))}
        fast = PreTrainedTokenizerFast(
            tokenizer_object=backend, chat_template=metadata.get("tokenizer.chat_template"), **special
        )
        return cls(fast, eos_token_ids)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and what goes with it, from which `from_folder` and transformers make the same."""
        self._backend.save_pretrained(folder)

    def to_json(self) -> str:
        """What tokenizer.json would hold."""
        return self._backend.backend_tokenizer.to_str()

    @property
    def chat_template(self) -> str | None:
        """The chat template's text; None where there is none, or several under names."""
        template = self._backend.chat_template
        return template if isinstance(template, str) else None

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` will work."""
        return self._backend.chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens written in it are recognised.

        Args:
            text: any text.
            add_special_tokens: put in front (and behind) what the model was trained to see there.
        """
        return self._backend.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        text = self._backend.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation in the model's own format.

        Args:
            messages: `[{"role": "user", "content": "…"}, …]`.
            add_generation_prompt: end where the assistant's answer begins.

        Raises:
            ValueError: the model has no chat template, or its template refuses these messages.
        """
        if not self.has_chat_template:
            raise ValueError("this model has no chat template, so it is no chat model: give it a text to continue")
        from jinja2.exceptions import TemplateError

        try:
            text = self._backend.apply_chat_template(
                [dict(m) for m in messages], add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except TemplateError as error:
            raise ValueError(f"messages: the model's chat template refuses them: {error}") from None
        return self.encode(str(text), add_special_tokens=False)  # the template has written them already


class TokenStream:
    """Turns tokens into text as they come. What `push` and `flush` return, joined, is `decode` of all the tokens.

    A token may end inside a character. Text is final, and handed out, once it does not end in U+FFFD, which is what an
    incomplete character decodes to.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._before: list[int] = []  # handed out last: some tokenizers drop the space in front of a text's first token
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Takes a token; returns the text that became final."""
        self._pending.append(token_id)
        text = self._text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._before, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """Ends the stream; returns what was held back."""
        text = self._text()
        self._before, self._pending = [], []
        return text

    def _text(self) -> str:
        known = self._tokenizer.decode(self._before, self._skip)
        return self._tokenizer.decode(self._before + self._pending, self._skip)[len(known) :]


def _list(metadata: Mapping[str, Any], key: str) -> list:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list) or not value:
        raise ValueError(f"tokenizer.ggml.{key}: {value!r}; expected a list")
    return value


def _named_token(metadata: Mapping[str, Any], tokens: list[str], name: str) -> str | None:
    key = f"tokenizer.ggml.{name}_token_id"
    token_id = metadata.get(key)
    if token_id is None:
        return None
    if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
        raise ValueError(f"{key}: {token_id!r}; expected 0 to {len(tokens) - 1}")
    return tokens[token_id]


def _byte_level_bpe(metadata: Mapping[str, Any], tokens: list[str]) -> "tokenizers.Tokenizer":
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.pre: {pre!r}; supported: {', '.join(PRE_TOKENIZERS)}")
    by_words = pre in ("smollm", "gpt-2")
    steps: list[pre_tokenizers.PreTokenizer] = []
    if pre == "smollm":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    elif not by_words:
        split = _TEKKEN_SPLIT if pre == "tekken" else _LLAMA3_SPLIT
        steps.append(pre_tokenizers.Split(tokenizers.Regex(split), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_words))
    merges = [tuple(merge.split(" ", 1)) for merge in _list(metadata, "merges")]
    # With `ignore_merges`, a word that is a token is never taken apart, even where no merges lead to it.
    backend = tokenizers.Tokenizer(models.BPE(_vocabulary(tokens), merges, ignore_merges=not by_words))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    _add_bos_and_eos(backend, metadata, tokens, add_bos=not by_words)
    return backend


def _sentencepiece_bpe(metadata: Mapping[str, Any], tokens: list[str]) -> "tokenizers.Tokenizer":
    import tokenizers
    from tokenizers import decoders, models, normalizers

    scores = _list(metadata, "scores")
    if len(scores) != len(tokens):
        raise ValueError(f"tokenizer.ggml.scores: {len(scores)} of them; expected one a token ({len(tokens)})")
    vocabulary = _vocabulary(tokens)
    unknown = _named_token(metadata, tokens, "unknown") or tokens[0]
    model = models.BPE(vocabulary, _merges(vocabulary, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    space = [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *space] if prefix else space)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    _add_bos_and_eos(backend, metadata, tokens, add_bos=True)
    return backend


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def _merges(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union scores highest, so every way to part a token in two is a merge."""
    ranked = []
    for token, i in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-scores[i], i, left, right))
    ranked.sort(key=lambda entry: entry[:2])
    return [(left, right) for *_, left, right in ranked]


def _add_special_tokens(backend: "tokenizers.Tokenizer", metadata: Mapping[str, Any], tokens: list[str]) -> None:
    from tokenizers import AddedToken

    types = metadata.get("tokenizer.ggml.token_type", [])
    pairs = list(zip(tokens, types, strict=False))
    special = [AddedToken(token, normalized=False, special=True) for token, kind in pairs if kind in (UNKNOWN, CONTROL)]
    plain = [AddedToken(token, normalized=False, special=False) for token, kind in pairs if kind == USER_DEFINED]
    backend.add_special_tokens(special)
    backend.add_tokens(plain)


def _add_bos_and_eos(
    backend: "tokenizers.Tokenizer", metadata: Mapping[str, Any], tokens: list[str], add_bos: bool
) -> None:
    """What `encode` puts around a text; `add_bos` holds where the file says nothing, as in llama.cpp."""
    from tokenizers import processors

    def wanted(name: str, default: bool) -> list[str]:
        token = _named_token(metadata, tokens, name)
        return [token] if token and metadata.get(f"tokenizer.ggml.add_{name}_token", default) else []

    before, after = wanted("bos", add_bos), wanted("eos", False)
    special = [(token, tokens.index(token)) for token in before + after]
    backend.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=special)
