"""The keys of a GGUF that say what a tokenizer does, of a Hugging Face tokenizer.

A GGUF names a way to split text instead of giving it, so that the keys are made of the tokenizer's own tables, for each
way that octavo knows, until the tokenizer that octavo builds of them does the same with a text full of hard places.
"""

import json
from typing import Any

from octavo.engine.config import ModelConfig
from octavo.engine.tokenizer import CONTROL, PRE_TOKENIZERS, UNKNOWN, USER_DEFINED, Tokenizer

NORMAL, UNUSED, BYTE = 1, 5, 6
SAMPLES = (
    "The quick brown fox jumps over the lazy dog. It's 12345 o'clock, isn't it? WE'LL see!",
    "  two spaces,\ttabs\t\tand\n\n\nlines \r\n  \n end  ",
    "def f(x):\n    return [i**2 for i in range(10_000)]  # Kommentar\n",
    "Zwölf große Bären — ça déjà vu; Ελληνικά, русский, עברית, العربية, हिन्दी, 中文字符, 日本語テスト, 한국어 😀👩‍💻",
    "3.14159e-10 + 0xFF == 1,000,000 …「」 HTTPServer camelCase snake_case",
    " leading",
    "trailing ",
    "",
    "a",
    "\n",
    "Ünïcödé" * 3,
)


def tokenizer_metadata(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    """The keys `tokenizer.*`.

    Raises:
        ValueError: no keys that octavo knows make a tokenizer that does the same.
    """
    tables = json.loads(tokenizer.to_json())
    model = tables["model"]
    if model.get("type") != "BPE":
        raise ValueError(f"tokenizer: of type {model.get('type')}; convertible to a GGUF: BPE")
    keys = _tokens(tables, config) | _special_tokens(tokenizer, config)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    if model.get("byte_fallback"):
        keys |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.scores": _scores(keys["tokenizer.ggml.tokens"], merges),
        }
        choices: list[dict[str, Any]] = [{"tokenizer.ggml.add_space_prefix": prefix} for prefix in (True, False)]
    else:
        keys |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": merges}
        choices = [{"tokenizer.ggml.pre": pre} for pre in PRE_TOKENIZERS]
    samples = [*SAMPLES, *(f"{token['content']} x{token['content']}" for token in tables.get("added_tokens", [])[:20])]
    wanted = [tokenizer.encode(text) for text in samples]
    for choice in choices:
        try:
            made = Tokenizer.from_gguf(keys | choice)
        except ValueError:
            continue
        if all(
            made.encode(text) == ids and made.decode(ids) == tokenizer.decode(ids)
            for text, ids in zip(samples, wanted, strict=True)
        ):
            return keys | choice
    raise ValueError("tokenizer: none that a GGUF can describe, and octavo can build of it, does the same as this one")


def _tokens(tables: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    vocabulary: dict[str, int] = tables["model"]["vocab"]
    added = {token["content"]: token for token in tables.get("added_tokens", [])}
    by_id = {i: token for token, i in vocabulary.items()} | {t["id"]: content for content, t in added.items()}
    if max(by_id) >= config.vocab_size:
        raise ValueError(f"tokenizer: has a token {max(by_id)}, but the model's vocab_size is {config.vocab_size}")
    unknown = tables["model"].get("unk_token")
    tokens, types = [], []
    for i in range(config.vocab_size):
        token = by_id.get(i)
        tokens.append(f"[PAD{i}]" if token is None else token)
        if token is None:
            types.append(UNUSED)
        elif token in added:
            special = UNKNOWN if token == unknown else CONTROL
            types.append(special if added[token]["special"] else USER_DEFINED)
        else:
            is_byte = tables["model"].get("byte_fallback") and token.startswith("<0x") and len(token) == 6
            types.append(BYTE if is_byte else NORMAL)
    keys: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if unknown is not None and (unknown in added or tokens[0] != unknown):  # the first is the default
        keys["tokenizer.ggml.unknown_token_id"] = tokens.index(unknown)
    return keys


def _special_tokens(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    if config.bos_token_id is not None:
        keys["tokenizer.ggml.bos_token_id"] = config.bos_token_id
    for name, token_id in zip(("eos", "eot", "eom"), config.eos_token_ids, strict=False):
        keys[f"tokenizer.ggml.{name}_token_id"] = token_id
    ids, plain = tokenizer.encode("x"), tokenizer.encode("x", add_special_tokens=False)
    keys["tokenizer.ggml.add_bos_token"] = ids != plain and ids[:1] == [config.bos_token_id]
    keys["tokenizer.ggml.add_eos_token"] = ids != plain and ids[-1:] == [next(iter(config.eos_token_ids), None)]
    if tokenizer.chat_template is not None:
        keys["tokenizer.chat_template"] = tokenizer.chat_template
    return keys


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Scores by which SentencePiece joins in the order of the merges."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    return [-float(ranks.get(token, len(merges) + i)) for i, token in enumerate(tokens)]
