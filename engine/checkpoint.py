"""Weights on a disk: one interface over folders of safetensors and GGUF files."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from octavo.engine.config import ModelConfig

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


class Checkpoint(Protocol):
    """An open checkpoint: its configuration is read and its files are known to be whole, its weights are not read yet.

    `num_bytes` is what `tensors` will read, and `notes` holds what the user should know about this checkpoint.
    """

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def num_bytes(self) -> int: ...

    @property
    def notes(self) -> list[str]: ...

    def tensors(self, *, prefix: str = "") -> Iterator[tuple[str, Weight]]:
        """Reads one tensor at a time, on the CPU, under Hugging Face's names, laid out for NeoX rotary pairing.

        Args:
            prefix: of the names wanted; nothing else is read.
        """
        ...

    def tokenizer(self) -> "Tokenizer":
        """Builds the tokenizer that came with the weights."""
        ...


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a folder with config.json and safetensors, or a `.gguf` file.

    Raises:
        FileNotFoundError: the path or one of the files that belong to it does not exist.
        ValueError: a file that is cut off, broken, or holds what is not supported; it names the file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_dir():
        return SafetensorsCheckpoint(path)
    if path.suffix == ".gguf":
        from octavo.engine.gguf_file import GgufCheckpoint

        return GgufCheckpoint(path)
    raise ValueError(f"{path}: expected a folder with config.json and safetensors, or a .gguf file")


class SafetensorsCheckpoint:
    """A folder as Hugging Face lays it out: config.json, one or more safetensors files, and the tokenizer's files.

    Args:
        folder: where they lie. Weights are in `model.safetensors`, or in the shards that `model.safetensors.index.json`
            lists.

    Raises:
        FileNotFoundError: config.json, the weights or a shard is missing.
        ValueError: a file that is cut off or broken, a tensor that is not where the index says, pickled weights, or a
            configuration that is not supported.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.notes: list[str] = []
        config = read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        try:
            self.config = ModelConfig.from_hf(config, read_json(generation) if generation.exists() else None)
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from None
        quantization = config.get("quantization_config") or config.get("compression_config")
        self._format = None
        if quantization:
            from octavo.engine.packed_formats import packed_format

            try:
                self._format, self.notes = packed_format(quantization)
            except ValueError as error:
                raise ValueError(f"{folder / 'config.json'}: {error}") from None
        self._names = _locate(folder)
        self.num_bytes = sum(path.stat().st_size for path in self._names)

    def tensors(self, *, prefix: str = "") -> Iterator[tuple[str, Weight]]:
        """Reads one tensor at a time, or those of one quantised layer; see `Checkpoint`."""
        layers = self._quantised_layers()
        for path, names in self._names.items():
            wanted = [name for name in names if name.startswith(prefix)]
            if not wanted:
                continue
            with _open_safetensors(path) as shard:
                for name in wanted:
                    module, _, suffix = name.rpartition(".")
                    parts = layers.get(module, {})
                    if suffix == "bias" and parts and not self._has_bias(module):
                        bias = shard.get_tensor(name)
                        if bias.any():  # AutoGPTQ writes one of zeros to every layer
                            yield name, bias
                    elif suffix not in parts:
                        yield name, shard.get_tensor(name)
                    elif suffix == min(parts):
                        yield f"{module}.weight", self._layer(module, parts)

    def _quantised_layers(self) -> dict[str, dict[str, Path]]:
        """Of each quantised layer, its tensors' suffixes and the files that they are in."""
        if self._format is None:
            return {}
        layers: dict[str, dict[str, Path]] = {}
        suffixes = self._format.required | self._format.optional
        for path, names in self._names.items():
            for module, _, suffix in (name.rpartition(".") for name in names):
                if suffix in suffixes:
                    layers.setdefault(module, {})[suffix] = path
        return {module: parts for module, parts in layers.items() if parts.keys() != {"weight"}}

    def _has_bias(self, module: str) -> bool:
        return self.config.mlp_bias if ".mlp." in module else self.config.attention_bias and ".self_attn." in module

    def _layer(self, module: str, parts: dict[str, Path]) -> Weight:
        read: dict[str, torch.Tensor] = {}
        for path in sorted(set(parts.values())):
            with _open_safetensors(path) as shard:
                read |= {s: shard.get_tensor(f"{module}.{s}") for s, where in parts.items() if where == path}
        assert self._format is not None
        return self._format.weight(module, read)

    def tokenizer(self) -> "Tokenizer":
        """Builds the tokenizer of the folder."""
        from octavo.engine.tokenizer import Tokenizer

        return Tokenizer.from_folder(self.path, self.config.eos_token_ids)


def _locate(folder: Path) -> dict[Path, list[str]]:
    """The safetensors files and which tensors to read from each."""
    whole, index_path = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        with _open_safetensors(whole) as file:
            return {whole: list(file.keys())}
    if not index_path.exists():
        pickles = [p.name for pattern in ("*.bin", "*.pth", "*.pt") for p in sorted(folder.glob(pattern))]
        if pickles:
            raise ValueError(
                f"{folder}: has pickled weights only ({pickles[0]}), and loading those can run code: convert them with "
                "transformers' save_pretrained(folder), or choose a revision that has safetensors"
            )
        ggufs = sorted(folder.glob("*.gguf"))
        advice = f": to use the GGUF, give its file, {ggufs[0]}" if ggufs else ""
        raise FileNotFoundError(f"{folder}: neither {whole.name} nor {index_path.name} is there{advice}")
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{index_path}: weight_map: {str(weight_map)[:80]}; expected a dictionary, tensor → file")
    names: dict[Path, list[str]] = {}
    for name, file_name in weight_map.items():
        names.setdefault(folder / file_name, []).append(name)
    for path, wanted in names.items():
        if not path.exists():
            raise FileNotFoundError(f"{path}: missing, but {index_path.name} says that it holds {wanted[0]}")
        with _open_safetensors(path) as shard:
            absent = set(wanted).difference(shard.keys())
        if absent:
            raise ValueError(f"{path}: has no tensor {min(absent)}, though {index_path.name} says so")
    return names


def _open_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: cut off or broken ({error}): fetch it again") from None


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
