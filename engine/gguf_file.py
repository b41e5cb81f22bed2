"""GGUF, llama.cpp's file format: a header of keys and values, a table of tensors, then their data, aligned.

    "GGUF" version:u32 tensors:u64 keys:u64 | key type value … | name dims:u32 dim:u64… type:u32 offset:u64 … | data

Numbers are little-endian, strings are a length (u64) and UTF-8. Blocks of 32 weights along a row, as Q4_0, Q4_1 and
Q8_0 have them, stay quantised; byte i of a 4-bit block holds elements i (low nibble) and i + 16 (high nibble).
The matrices of a layer's experts lie in one tensor, `ffn_gate_exps`, or, in files of 2023, one each, `ffn_gate.0`; they
are read as the latter.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

The header is parsed here because the gguf package's reader makes an object of every string, which takes seconds for a
vocabulary of 49,152 (here a quarter of one), and because it reads past the end of a file that was cut off. Its tables
of types and its dequantisation are used.
"""

import math
import mmap
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from octavo.engine.checkpoint import CPU, Entry, Int4Weight, Int8Weight, Weight
from octavo.engine.config import ModelConfig
from octavo.engine.tensor_files import Reader

if TYPE_CHECKING:
    from octavo.engine.tokenizer import Tokenizer

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTISED = ("Q4_0", "Q4_1", "Q8_0")
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
BY_TABLE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS")
DEQUANTISED = ("Q5_0", "Q5_1", *K_QUANTS, *BY_TABLE, "TQ1_0", "TQ2_0", "MXFP4")
ROWS_AT_A_TIME = 4096  # of a tensor that is dequantised: bounds the fp32 copy

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "block_sparse_moe.gate",
}
EXPERT_NAMES = {"ffn_gate": "w1", "ffn_up": "w3", "ffn_down": "w2"}
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class GgufTensor:
    """An entry of the table: `shape` is torch's, outermost first; `start` counts from the beginning of the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    num_bytes: int


class GgufCheckpoint:
    """A GGUF file of a "llama" model.

    Args:
        path: the file.

    Raises:
        ValueError: not a GGUF file, one that is cut off or broken, or a model that is not supported; it names the file,
            and the key or tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{path}: not a GGUF file: it does not begin with the letters GGUF")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            with data:
                self.metadata, self.table = _read_header(data)
            if self.metadata.get("split.count", 1) > 1:
                raise ValueError(
                    f"split.count: one of {self.metadata['split.count']} parts; supported: a single file, which "
                    "llama-gguf-split --merge makes of them"
                )
            self.config = ModelConfig.from_gguf(
                self.metadata, {t.name: t.type.name for t in self.table.values()}, self._rope_factors()
            )
            self.notes = _notes(self.table)
            self.table = {t.name: t for tensor in self.table.values() for t in _by_expert(tensor)}
            self.index = {_hugging_face_name(t.name): Entry(path, t.shape) for t in self.table.values()}
            for tensor in self.table.values():
                _check_type(tensor)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        self.num_bytes = sum(t.num_bytes for t in self.table.values())

    def tensors(
        self,
        device: torch.device = CPU,
        dtype: torch.dtype | None = None,
        progress: Callable[[int], None] | None = None,
        *,
        prefix: str = "",
    ) -> Iterator[tuple[str, Weight]]:
        """Reads one tensor at a time; see `Checkpoint`."""
        readers = {True: Reader(device, progress), False: Reader(CPU, progress)}
        for tensor in self.table.values():
            name = _hugging_face_name(tensor.name)
            if not name.startswith(prefix):
                continue
            as_it_is = tensor.type.name in DENSE or tensor.type.name in QUANTISED
            raw = readers[as_it_is].read(self.path, tensor.start, tensor.num_bytes)
            try:
                rows = self._unpermute(tensor.name, raw.view(tensor.shape[0], -1))
                weight = _decode(rows, tensor, dtype or self.config.dtype, device)
            except ValueError as error:
                raise ValueError(f"{self.path}: {tensor.name}: {error}") from None
            yield name, weight

    def tokenizer(self) -> "Tokenizer":
        """Builds the tokenizer that the metadata describes."""
        from octavo.engine.tokenizer import Tokenizer

        try:
            return Tokenizer.from_gguf(self.metadata, self.config.eos_token_ids)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    def _rope_factors(self) -> torch.Tensor | None:
        tensor = self.table.pop(ROPE_FACTORS, None)
        if tensor is None:
            return None
        if tensor.type.name != "F32":
            raise ValueError(f"{ROPE_FACTORS}: type {tensor.type.name}; expected F32")
        return Reader(CPU).read(self.path, tensor.start, tensor.num_bytes).view(torch.float32)

    def _unpermute(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Undoes what llama.cpp does to the rows of queries and keys: it pairs neighbours, the model pairs halves."""
        if ".attn_q." in name:
            heads = self.config.num_attention_heads
        elif ".attn_k." in name:
            heads = self.config.num_key_value_heads
        else:
            return rows
        if rows.shape[0] != heads * self.config.head_dim:
            raise ValueError(f"{rows.shape[0]} rows; expected {heads} heads of {self.config.head_dim}")
        return rows.view(heads, -1, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def _decode(rows: torch.Tensor, tensor: GgufTensor, dtype: torch.dtype, device: torch.device) -> Weight:
    """The weight of a tensor whose rows are `[N, bytes of a row]`; `dtype` is for what is dequantised."""
    kind = tensor.type.name
    if kind in DENSE:
        return rows.view(DENSE[kind]).view(tensor.shape)
    if kind in QUANTISED:
        return _blocks(rows, kind)
    weight = torch.empty(tensor.shape, dtype=dtype, device=device)
    for row in range(0, len(rows), ROWS_AT_A_TIME):
        some = slice(row, row + ROWS_AT_A_TIME)
        weight[some] = torch.from_numpy(dequantize(rows[some].numpy(), tensor.type))
    if not weight.isfinite().all():
        raise ValueError(f"dequantised it holds what {str(dtype).removeprefix('torch.')} does not: the file is broken")
    return weight


def _blocks(raw: torch.Tensor, kind: str) -> Int4Weight | Int8Weight:
    """Takes rows of blocks apart, exactly. `raw` is `[N, bytes of a row]`."""
    _, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    words = raw.view(torch.int16).view(raw.shape[0], -1, block_bytes // 2)  # [N, K / 32, block_bytes / 2]
    scale = words[..., 0].contiguous().view(torch.float16)
    if kind == "Q8_0":
        return Int8Weight(words[..., 1:].reshape(raw.shape[0], -1).view(torch.int8), scale)
    if kind == "Q4_1":
        minimum = words[..., 1].contiguous().view(torch.float16)
    else:
        minimum = -8 * scale  # a power of two: exact unless it overflows
    if not minimum.isfinite().all():
        raise ValueError("a scale is not finite, or beyond what fp16 holds: the file is broken")
    nibbles = words[..., -8:]
    q = torch.stack((nibbles & 0x0F0F, nibbles >> 4 & 0x0F0F), dim=2)  # [N, K / 32, 2, 8]: two weights a word
    return Int4Weight(q.view(raw.shape[0], -1).view(torch.uint8), scale, minimum)


def _by_expert(tensor: GgufTensor) -> Iterator[GgufTensor]:
    """The matrices of a tensor of several experts; any other as it is."""
    match = re.fullmatch(r"(blk\.\d+\.ffn_(?:gate|up|down))_exps\.weight", tensor.name)
    if match is None:
        yield tensor
        return
    if len(tensor.shape) != 3:
        raise ValueError(f"{tensor.name}: shape {tensor.shape}; expected three dimensions, the first of experts")
    size = tensor.num_bytes // tensor.shape[0]
    for i in range(tensor.shape[0]):
        name, start = f"{match[1]}.{i}.weight", tensor.start + i * size
        yield replace(tensor, name=name, shape=tensor.shape[1:], start=start, num_bytes=size)


def _hugging_face_name(name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)(?:\.(\d+))?\.(weight|bias)", name)
    if match is None or match[2] not in (NAMES if match[3] is None else EXPERT_NAMES):
        raise ValueError(f"{name}: a tensor that Llama, Mistral and Mixtral models do not have")
    layer = "" if match[1] is None else f"model.layers.{match[1]}."
    if match[3] is not None:
        return f"{layer}block_sparse_moe.experts.{match[3]}.{EXPERT_NAMES[match[2]]}.{match[4]}"
    return f"{layer}{NAMES[match[2]]}.{match[4]}"


def _check_type(tensor: GgufTensor) -> None:
    kind = tensor.type.name
    if kind not in (*DENSE, *QUANTISED, *DEQUANTISED):
        raise ValueError(f"{tensor.name}: type {kind}; supported: {', '.join((*DENSE, *QUANTISED, *DEQUANTISED))}")


def _notes(tensors: Mapping[str, GgufTensor]) -> list[str]:
    counts = Counter(t.type.name for t in tensors.values() if t.type.name not in (*DENSE, *QUANTISED))
    if not counts:
        return []
    kinds = ", ".join(f"{count} of type {kind}" for kind, count in sorted(counts.items()))
    return [
        f"dequantised to the dtype of the activations: {kinds} (of {len(tensors)} tensors); only "
        f"{', '.join(QUANTISED)} stay quantised"
    ]


class _Header:
    """A position in the file, which refuses to read past its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 4

    def unpack(self, layout: str) -> tuple:
        size = struct.calcsize(f"<{layout}")
        return struct.unpack(f"<{layout}", self.take(size))

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError(f"cut off or broken: the header wants {size} bytes at {self.at} of {len(self.data)}")
        self.at += size
        return self.data[self.at - size : self.at]

    def string(self) -> str:
        try:
            return self.take(self.unpack("Q")[0]).decode()
        except UnicodeDecodeError:
            raise ValueError(f"broken: the string before byte {self.at} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.unpack(SCALARS[kind])[0]
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"broken: a value of type {kind} before byte {self.at}; known are 0 to 12")
        kind, count = self.unpack("IQ")
        if kind in SCALARS:
            layout = np.dtype(SCALARS[kind]).newbyteorder("<")
            return np.frombuffer(self.take(count * layout.itemsize), layout).tolist()
        return [self.value(kind) for _ in range(count)]


def _read_header(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """The metadata, and the tensors by name; the data of each is known to lie inside the file."""
    header = _Header(data)
    version, tensor_count, key_count = header.unpack("IQQ")
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version} (or big-endian); supported: 2 and 3, little-endian")
    metadata = {}
    for _ in range(key_count):
        key, (kind,) = header.string(), header.unpack("I")
        metadata[key] = header.value(kind)
    entries = []
    for _ in range(tensor_count):
        name, (dims,) = header.string(), header.unpack("I")
        entries.append((name, header.unpack(f"{dims}Q")[::-1], *header.unpack("IQ")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment: {alignment!r}; expected a positive integer")
    data_start = -(-header.at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in entries:
        tensors[name] = _check_tensor(name, shape, kind, data_start + offset, len(data))
    return metadata, tensors


def _check_tensor(name: str, shape: tuple[int, ...], kind: int, start: int, file_size: int) -> GgufTensor:
    try:
        tensor_type = GGMLQuantizationType(kind)
    except ValueError:
        raise ValueError(f"{name}: type {kind} is not known to the installed gguf package") from None
    block, block_bytes = GGML_QUANT_SIZES[tensor_type]
    if not shape or 0 in shape or shape[-1] % block:
        raise ValueError(f"{name}: shape {shape}; expected rows of a multiple of {block} for type {tensor_type.name}")
    num_bytes = math.prod(shape) // block * block_bytes
    if start + num_bytes > file_size:
        raise ValueError(
            f"{name}: cut off: its data ends at byte {start + num_bytes}, but the file has {file_size}: fetch it again"
        )
    return GgufTensor(name, shape, tensor_type, start, num_bytes)
