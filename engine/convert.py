"""GGUF to a folder of safetensors and back, where nothing is lost: every weight keeps its value and its precision.

| GGUF | safetensors |
| --- | --- |
| F32, F16, BF16 | the same dtype; vectors and routers, which a GGUF has in F32, in the model's where that holds them |
| Q4_0 | compressed-tensors "pack-quantized", 4 bits, symmetric, groups of 32 |
| Q8_0 | compressed-tensors "int-quantized", 8 bits, groups of 32 |
| Q4_1 | (to GGUF only) 4 bits with zero points whose product with the scale fp16 holds |

What has no such form is refused by name before anything is written, and what was written is opened and compared.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from octavo.engine.checkpoint import Checkpoint, Int4Weight, Int8Weight, Weight, open_checkpoint
from octavo.engine.loader import check_index

SHARD_BYTES = 2 << 30  # of safetensors, which are held in memory until they are written
KEPT_BY_BOTH = ("Q4_0", "Q8_0")


def convert(source: Path, target: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Converts a `.gguf` file to a folder, or a folder with safetensors to a `.gguf` file.

    Args:
        source: a GGUF, or a folder as Hugging Face lays it out.
        target: a folder, or a path that ends in `.gguf`; neither may exist.
        progress: called with (bytes read so far, bytes in all).

    Raises:
        FileNotFoundError: no such source.
        FileExistsError: the target is there.
        ValueError: the source is broken or not supported, or something in it has no equal in the other format.
    """
    to_gguf = target.suffix == ".gguf"
    if to_gguf != source.is_dir():
        raise ValueError(
            f"{source} to {target}: expected a .gguf file and a folder to make of it, or a folder and a .gguf file"
        )
    if target.exists():
        raise FileExistsError(f"{target}: exists; choose another target, or delete it")
    checkpoint = open_checkpoint(source)
    check_index(checkpoint)
    partial = target.with_name(f".{target.name}.partial{target.suffix}")
    try:
        if to_gguf:
            from octavo.engine.gguf_writer import write_gguf

            write_gguf(checkpoint, partial, progress)
        else:
            partial.mkdir(parents=True)
            write_folder(checkpoint, partial, progress)
        _compare(checkpoint, open_checkpoint(partial))
        partial.rename(target)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)


def _compare(source: Checkpoint, made: Checkpoint) -> None:
    """Raises where what was written says something else of the model than its source does."""
    mine, theirs = source.config, made.config
    lost = set(mine.eos_token_ids).difference(theirs.eos_token_ids)
    if lost:
        raise ValueError(f"{source.path}: eos_token_id {min(lost)} has no place in the other format")
    for name in vars(mine).keys() - {"architecture", "eos_token_ids", "dtype"}:
        before, after = getattr(mine, name), getattr(theirs, name)
        if isinstance(before, float):
            before, after = (torch.tensor(x, dtype=torch.float32).item() for x in (before, after))  # as a GGUF has it
        if before != after:
            raise ValueError(
                f"{source.path}: {name}: {before!r} has no equal in the other format (it became {after!r})"
            )


@dataclass
class _Shards:
    """Files of safetensors, written as they fill up."""

    folder: Path
    pending: dict[str, torch.Tensor]
    weight_map: dict[str, str]
    num_bytes: int = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.pending[name] = tensor.contiguous()
        self.num_bytes += tensor.numel() * tensor.element_size()
        if self.num_bytes >= SHARD_BYTES:
            self.write()

    def write(self) -> None:
        from safetensors.torch import save_file

        if self.pending:
            file = f"model-{len(set(self.weight_map.values())) + 1:05d}.safetensors"
            save_file(self.pending, self.folder / file, metadata={"format": "pt"})
            self.weight_map |= dict.fromkeys(self.pending, file)
            self.pending, self.num_bytes = {}, 0

    def finish(self) -> None:
        self.write()
        files = set(self.weight_map.values())
        if len(files) == 1:
            (self.folder / files.pop()).rename(self.folder / "model.safetensors")
        else:
            index = {"metadata": {}, "weight_map": self.weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_folder(checkpoint: Checkpoint, folder: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Writes config.json, safetensors and the tokenizer of a GGUF.

    Raises:
        ValueError: a tensor of a type that safetensors have no equal of, or of two quantised types.
    """
    from octavo.engine.gguf_file import DENSE, GgufCheckpoint

    assert isinstance(checkpoint, GgufCheckpoint)
    kinds: dict[str, str] = {}
    for tensor in checkpoint.table.values():
        kind = tensor.type.name
        if kind in DENSE:
            continue
        if kind not in KEPT_BY_BOTH:
            raise ValueError(
                f"{checkpoint.path}: {tensor.name}: type {kind} has no equal in safetensors; convertible without loss: "
                f"{', '.join((*DENSE, *KEPT_BY_BOTH))}"
            )
        kinds.setdefault(kind, tensor.name)
    if len(kinds) > 1:
        (kind, name), (other, other_name) = list(kinds.items())[:2]
        raise ValueError(
            f"{checkpoint.path}: {name} is of type {kind}, {other_name} of {other}: convertible are models of one "
            "quantised type"
        )
    config = checkpoint.config.to_hf()
    if kinds:
        config["quantization_config"] = _quantization_config(next(iter(kinds)))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shards, done = _Shards(folder, {}, {}), [0]
    for name, weight in checkpoint.tensors(progress=_counting(done, progress, checkpoint.num_bytes)):
        for suffix, part in _parts(name, weight, checkpoint.config.dtype):
            shards.add(f"{name.removesuffix('weight')}{suffix}" if name.endswith(".weight") else name, part)
    shards.finish()
    checkpoint.tokenizer().save(folder)


def _counting(done: list[int], progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    report = progress

    def count(num_bytes: int) -> None:
        done[0] += num_bytes
        report(done[0], total)

    return count


def _quantization_config(kind: str) -> dict[str, Any]:
    bits, form = (4, "pack-quantized") if kind == "Q4_0" else (8, "int-quantized")
    weights = dict(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=32)
    group = dict(targets=["Linear", "Embedding"], weights=weights, input_activations=None, format=form)
    return dict(
        quant_method="compressed-tensors",
        quantization_status="compressed",
        format=form,
        config_groups={"group_0": group},
        ignore=[],
    )


def _parts(name: str, weight: Weight, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a weight by suffix."""
    if isinstance(weight, Int4Weight):
        yield "weight_packed", pack_int4(weight.q)
        yield "weight_scale", weight.scale
        yield "weight_shape", torch.tensor(weight.q.shape)
    elif isinstance(weight, Int8Weight):
        yield "weight", weight.q
        yield "weight_scale", weight.scale
    else:
        assert isinstance(weight, torch.Tensor)
        narrow = weight.to(dtype)
        wide = weight.dim() == 1 or name.endswith(".gate.weight")
        exact = wide and torch.equal(narrow.to(weight.dtype), weight)
        yield "weight", narrow if exact else weight


def pack_int4(q: torch.Tensor) -> torch.Tensor:
    """`[N, K]` codes of four bits as `[N, K / 8]` int32, the first in the lowest bits."""
    words = q.unflatten(1, (-1, 8)).long()
    words = sum((words[..., i] << 4 * i for i in range(8)), torch.zeros_like(words[..., 0]))
    return words.to(torch.int32)  # keeps the low 32 bits
