"""Weights on a disk: one interface over Hugging Face's folders and GGUF files."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from octavo.engine.config import ModelConfig
from octavo.engine.tensor_files import PickleFile, Reader, SafetensorsFile, TensorFile

if TYPE_CHECKING:
    from octavo.engine.tokenizer import Tokenizer

GROUP_SIZE = 32
"""Weights that share a scale: the block of every GGUF format that stays quantised."""


@dataclass(frozen=True)
class Activations:
    """How the inputs of a layer become numbers of its weights' dtype (W8A8).

    By `scale`, one fp32 element found beforehand, where it is there; else by scales computed as they come: of each
    token, of each 128 inputs of a token ("group"), or of all ("tensor").
    """

    granularity: Literal["token", "group", "tensor"]
    scale: torch.Tensor | None = None


@dataclass(frozen=True)
class Int4Weight:
    """weight = q · scale + minimum, or (q − 8) · scale without one, over groups along the input dimension.

    `q` is `[N, K]` uint8 with values 0 to 15, `scale` and `minimum` are `[N, K / group_size]`, fp16, bf16 or fp32.
    With an `order` (`[K]`, int64), column i of `q` belongs to input order[i].
    """

    q: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None
    group_size: int = GROUP_SIZE
    order: torch.Tensor | None = None


@dataclass(frozen=True)
class Int8Weight:
    """weight = q · scale, over groups along the input dimension.

    `q` is `[N, K]` int8, `scale` is `[N, K / group_size]`, fp16, bf16 or fp32. With `activations` a group is a row.
    """

    q: torch.Tensor
    scale: torch.Tensor
    group_size: int = GROUP_SIZE
    activations: Activations | None = None


@dataclass(frozen=True)
class Fp8Weight:
    """weight = q · scale, over blocks of `block` outputs and inputs, the last of which may be cut short.

    `q` is `[N, K]` float8_e4m3fn, `scale` is `[ceil(N / block[0]), ceil(K / block[1])]`, fp16, bf16 or fp32.
    """

    q: torch.Tensor
    scale: torch.Tensor
    block: tuple[int, int]
    activations: Activations | None = None


Weight = torch.Tensor | Int4Weight | Int8Weight | Fp8Weight

CPU = torch.device("cpu")
DENSE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Entry:
    """What is known of a weight before it is read: its file, and its shape, None where only its data tell that."""

    path: Path
    shape: tuple[int, ...] | None


class Checkpoint(Protocol):
    """An open checkpoint: its configuration is read and its files are known to be whole, its weights are not read yet.

    `num_bytes` is what `tensors` will read, `notes` holds what the user should know about this checkpoint, `path` is
    the file or folder, and `index` names everything that `tensors` will yield.
    """

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def num_bytes(self) -> int: ...

    @property
    def notes(self) -> list[str]: ...

    @property
    def index(self) -> Mapping[str, Entry]: ...

    def tensors(
        self,
        device: torch.device = CPU,
        dtype: torch.dtype | None = None,
        progress: Callable[[int], None] | None = None,
        *,
        prefix: str = "",
    ) -> Iterator[tuple[str, Weight]]:
        """Reads one weight at a time, under Hugging Face's names, laid out for NeoX rotary pairing.

        Args:
            device: where they are to be.
            dtype: of weights in formats that octavo's layers do not compute with, which are dequantised in fp32 and
                rounded once; by default the configuration's.
            progress: called with the number of bytes of each piece that was read; `num_bytes` in all.
            prefix: of the names wanted; nothing else is read.

        Raises:
            ValueError: a weight whose tensors do not fit each other; names it and its file.
        """
        ...

    def tokenizer(self) -> "Tokenizer":
        """Builds the tokenizer that came with the weights."""
        ...


def open_checkpoint(path: str | os.PathLike[str], allow_pickle: bool = False) -> Checkpoint:
    """Opens a folder with config.json and safetensors, or a `.gguf` file.

    Args:
        path: the folder or file.
        allow_pickle: read pytorch_model.bin where a folder has no safetensors, by `torch.load(weights_only=True)`.

    Raises:
        FileNotFoundError: the path or one of the files that belong to it does not exist.
        ValueError: a file that is cut off, broken, or holds what is not supported; it names the file, and the tensor or
            key.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_dir():
        return FolderCheckpoint(path, allow_pickle)
    if path.suffix == ".gguf":
        from octavo.engine.gguf_file import GgufCheckpoint

        return GgufCheckpoint(path)
    raise ValueError(f"{path}: expected a folder with config.json and safetensors, or a .gguf file")


class FolderCheckpoint:
    """A folder as Hugging Face lays it out: config.json, one or more files of weights, and the tokenizer's files.

    Args:
        path: where they lie. Weights are in `model.safetensors`, or in the shards that `model.safetensors.index.json`
            lists.
        allow_pickle: read `pytorch_model.bin`, or its shards, where there are no safetensors.

    Raises:
        FileNotFoundError: config.json, the weights or a shard is missing.
        ValueError: a file that is cut off or broken, a tensor that is not where the index says, pickled weights, or a
            configuration that is not supported.
    """

    def __init__(self, path: Path, allow_pickle: bool = False) -> None:
        self.path = path
        self.notes: list[str] = []
        config = read_json(path / "config.json")
        generation = path / "generation_config.json"
        try:
            self.config = ModelConfig.from_hf(config, read_json(generation) if generation.exists() else None)
        except ValueError as error:
            raise ValueError(f"{path / 'config.json'}: {error}") from None
        quantization = config.get("quantization_config") or config.get("compression_config")
        self._format = None
        if quantization:
            from octavo.engine.packed_formats import packed_format

            try:
                self._format, self.notes = packed_format(quantization)
            except ValueError as error:
                raise ValueError(f"{path / 'config.json'}: {error}") from None
        self._where = _locate(path, allow_pickle)
        self.num_bytes = sum(file.tensors[name].num_bytes for name, file in self._where.items())
        self._layers = self._quantised_layers()
        self.index = self._index()

    def tensors(
        self,
        device: torch.device = CPU,
        dtype: torch.dtype | None = None,
        progress: Callable[[int], None] | None = None,
        *,
        prefix: str = "",
    ) -> Iterator[tuple[str, Weight]]:
        """Reads one tensor at a time, or those of one quantised layer; see `Checkpoint`."""
        reader, before = Reader(device, progress), None
        for name, file in self._where.items():
            if not name.startswith(prefix):
                continue
            if before is not None and before is not file:
                before.close()
            before = file
            module, suffix = self._split(name)
            parts = self._layers.get(module, {})
            if self._is_stray_bias(name):
                if file.read(name, reader).any():
                    raise ValueError(f"{file.path}: {name}: not zero, though the configuration has no bias there")
            elif suffix not in parts:
                yield name, file.read(name, reader)
            elif suffix == min(parts):
                yield f"{module}.weight", self._layer(module, parts, reader, dtype or self.config.dtype)

    def _split(self, name: str) -> tuple[str, str]:
        """The module that a tensor belongs to, and which of its tensors it is."""
        suffixes = () if self._format is None else self._format.suffixes
        for suffix in sorted(suffixes, key=len, reverse=True):
            if name.endswith(f".{suffix}"):
                return name[: -len(suffix) - 1], suffix
        module, _, suffix = name.rpartition(".")
        return module, suffix

    def _quantised_layers(self) -> dict[str, dict[str, TensorFile]]:
        """Of each quantised layer, its tensors' suffixes and the files that they are in."""
        if self._format is None:
            return {}
        layers: dict[str, dict[str, TensorFile]] = {}
        suffixes = self._format.suffixes
        for name, file in self._where.items():
            module, suffix = self._split(name)
            if suffix in suffixes:
                layers.setdefault(module, {})[suffix] = file
        layers = {module: parts for module, parts in layers.items() if parts.keys() != {"weight"}}
        for module, parts in layers.items():
            try:
                self._format.of(module).check(module, parts)
            except ValueError as error:
                raise ValueError(f"{parts[min(parts)].path}: {error}") from None
        return layers

    def _index(self) -> dict[str, Entry]:
        index = {}
        for name, file in self._where.items():
            module, suffix = self._split(name)
            stored, parts = file.tensors[name], self._layers.get(module, {})
            if suffix not in parts and not self._is_stray_bias(name):
                if stored.dtype not in DENSE_DTYPES:
                    raise ValueError(
                        f"{file.path}: {name}: dtype {_name(stored.dtype)}; supported: "
                        f"{', '.join(map(_name, DENSE_DTYPES))}, or what the quantization_config of config.json says"
                    )
                index[name] = Entry(file.path, stored.shape)
            elif parts and suffix == min(parts):
                assert self._format is not None
                shapes = {s: parts[s].tensors[f"{module}.{s}"].shape for s in parts}
                try:
                    index[f"{module}.weight"] = Entry(file.path, self._format.of(module).shape(shapes))
                except ValueError as error:
                    raise ValueError(f"{file.path}: {module}.{error}") from None
        return index

    def _is_stray_bias(self, name: str) -> bool:
        """Whether it is a bias of a quantised layer that has none: AutoGPTQ writes one of zeros to every layer."""
        module, _, suffix = name.rpartition(".")
        if suffix != "bias" or module not in self._layers:
            return False
        if ".mlp." in module:
            return not self.config.mlp_bias
        has = self.config.attention_bias or (self.config.qkv_bias and not module.endswith(".o_proj"))
        return not (has and ".self_attn." in module)

    def _layer(self, module: str, parts: dict[str, TensorFile], reader: Reader, dtype: torch.dtype) -> Weight:
        assert self._format is not None
        read = {suffix: file.read(f"{module}.{suffix}", reader) for suffix, file in parts.items()}
        try:
            return self._format.of(module).weight(module, read, dtype)
        except ValueError as error:
            raise ValueError(f"{parts[min(parts)].path}: {error}") from None

    def tokenizer(self) -> "Tokenizer":
        """Builds the tokenizer of the folder."""
        from octavo.engine.tokenizer import Tokenizer

        return Tokenizer.from_folder(self.path, self.config.eos_token_ids)


def _locate(folder: Path, allow_pickle: bool) -> dict[str, TensorFile]:
    """The file of every tensor that is to be read, in the order in which they are to be read."""
    kinds: list[tuple[str, Callable[[Path], TensorFile]]] = [("model.safetensors", SafetensorsFile)]
    if allow_pickle:
        kinds.append(("pytorch_model.bin", PickleFile))
    for whole, open_file in kinds:
        if (folder / whole).exists():
            file = open_file(folder / whole)
            return dict.fromkeys(file.tensors, file)
        if (folder / f"{whole}.index.json").exists():
            return _locate_shards(folder / f"{whole}.index.json", open_file)
    pickles = [p.name for pattern in ("*.bin", "*.pth", "*.pt") for p in sorted(folder.glob(pattern))]
    if pickles and not allow_pickle:
        raise ValueError(
            f"{folder}: has pickled weights only ({pickles[0]}), and loading those can run code: choose a revision "
            "that has safetensors, or convert them with transformers' save_pretrained(folder); --allow-pickle "
            "(allow_pickle=True) reads pytorch_model.bin, and of it tensors alone"
        )
    ggufs = sorted(folder.glob("*.gguf"))
    advice = f": to use the GGUF, give its file, {ggufs[0]}" if ggufs else ""
    whole = kinds[-1][0]
    raise FileNotFoundError(f"{folder}: neither {whole} nor {whole}.index.json is there{advice}")


def _locate_shards(index_path: Path, open_file: Callable[[Path], TensorFile]) -> dict[str, TensorFile]:
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{index_path}: weight_map: {str(weight_map)[:80]}; expected a dictionary, tensor → file")
    names: dict[str, list[str]] = {}
    for name, file_name in weight_map.items():
        names.setdefault(file_name, []).append(name)
    where: dict[str, TensorFile] = {}
    for file_name, wanted in names.items():
        path = index_path.parent / file_name
        if not path.exists():
            raise FileNotFoundError(f"{path}: missing, but {index_path.name} says that it holds {wanted[0]}")
        file = open_file(path)
        absent = set(wanted).difference(file.tensors)
        if absent:
            raise ValueError(f"{path}: has no tensor {min(absent)}, though {index_path.name} says so")
        where |= {name: file for name in file.tensors if name in weight_map and weight_map[name] == file_name}
    return where


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
