"""The folder that `octavo quantize` fills: a part a finished layer while it works, then a checkpoint.

    DST/.parts/state.json            the settings: a run that goes on must have the same
    DST/.parts/model.layers.3.safetensors
    DST/config.json, model*.safetensors, tokenizer files, quantize_report.json

Files appear whole or not at all (written beside their place and renamed), config.json once the weights are there.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

PARTS = ".parts"
TOKENIZER_FILES = (
    "tokenizer*",
    "*.model",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.jinja",
    "generation_config.json",
)


class Folder:
    """DST, begun or gone on with.

    Args:
        path: where; made where it does not exist.
        state: what decides the result, as JSON has it.

    Raises:
        ValueError: other files are there, a finished checkpoint for one; or parts of a run with other settings, and it
            names the first that differs.
    """

    def __init__(self, path: Path, state: dict[str, Any]) -> None:
        self.path, self.parts = path, path / PARTS
        begun = self.parts / "state.json"
        if begun.exists():
            self._compare(json.loads(begun.read_text(encoding="utf-8")), state)
            return
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(f"{path}: there already, and not empty: choose another folder, or remove it")
        self.parts.mkdir(parents=True)
        write_json(begun, state)

    def _compare(self, begun: dict[str, Any], state: dict[str, Any]) -> None:
        for key in dict.fromkeys([*begun, *state]):
            if begun.get(key) != state.get(key):
                raise ValueError(
                    f"{self.path}: begun with {key} {begun.get(key)!r}, now {state.get(key)!r}: give the same to go "
                    "on, or remove the folder to begin anew"
                )

    def has(self, name: str) -> bool:
        """Whether a part is finished."""
        return self._part(name).exists()

    def write(self, name: str, tensors: dict[str, torch.Tensor], report: list[dict[str, Any]]) -> None:
        """Finishes a part: its tensors and what is to be reported of them, in one file."""
        save_whole(tensors, self._part(name), {"report": json.dumps(report)})

    def read(self, name: str) -> dict[str, torch.Tensor]:
        with safe_open(self._part(name), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dictionary)

    def report(self, name: str) -> list[dict[str, Any]]:
        with safe_open(self._part(name), framework="pt") as file:
            return json.loads(file.metadata()["report"])

    def assemble(self, names: list[str], shard_bytes: int) -> int:
        """Joins the parts, in this order, into model.safetensors or shards and their index; returns their bytes."""
        groups: list[list[str]] = []
        room = 0
        for name in names:
            size = self._part(name).stat().st_size
            if not groups or size > room:
                groups.append([])
                room = shard_bytes
            groups[-1].append(name)
            room -= size
        total = 0
        weight_map: dict[str, str] = {}
        for i, group in enumerate(groups, 1):
            file = "model.safetensors" if len(groups) == 1 else f"model-{i:05}-of-{len(groups):05}.safetensors"
            tensors = {key: tensor for name in group for key, tensor in self.read(name).items()}
            save_whole(tensors, self.path / file, {"format": "pt"})
            total += sum(tensor.nbytes for tensor in tensors.values())
            weight_map |= dict.fromkeys(tensors, file)
        if len(groups) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(self.path / "model.safetensors.index.json", index)
        return total

    def write_config(self, config: dict[str, Any]) -> None:
        """Makes a checkpoint of the folder."""
        write_json(self.path / "config.json", config)

    def finish(self, report: dict[str, Any]) -> None:
        """Writes the report; the parts go."""
        write_json(self.path / "quantize_report.json", report)
        shutil.rmtree(self.parts)

    def _part(self, name: str) -> Path:
        return self.parts / f"{name}.safetensors"


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies a Hugging Face folder's tokenizer files and generation_config.json."""
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def write_json(path: Path, content: dict[str, Any]) -> None:
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)


def save_whole(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    beside = path.with_name(f"{path.name}.tmp")
    save_file(tensors, beside, metadata=metadata)
    os.replace(beside, path)
