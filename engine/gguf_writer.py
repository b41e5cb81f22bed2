"""A GGUF of a Hugging Face folder, as llama.cpp's convert_hf_to_gguf.py lays it out: the other way of gguf_file.py.

Weights are read twice, so that none but the current one is in memory, or one matrix of a layer's experts, which a GGUF
has in one tensor: first to see of which type each is, and whether that type holds it exactly, then to write it.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFValueType, GGUFWriter
from gguf.constants import GGMLQuantizationType

from octavo.engine.checkpoint import Checkpoint, Int4Weight, Int8Weight, Weight
from octavo.engine.config import ModelConfig
from octavo.engine.gguf_file import EXPERT_NAMES, NAMES, ROPE_FACTORS
from octavo.engine.gguf_tokenizer import tokenizer_metadata

BLOCK = 32
GGUF_NAMES = {theirs: short for short, theirs in NAMES.items()}
EXPERT_GGUF_NAMES = {theirs: short for short, theirs in EXPERT_NAMES.items()}
TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_gguf(checkpoint: Checkpoint, path: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Writes the weights, the configuration and the tokenizer of a folder.

    Raises:
        ValueError: a weight that no type of a GGUF holds exactly, or a configuration or tokenizer that a GGUF has no
            keys for; names the file, and the tensor or key.
    """
    done = 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(done, 2 * checkpoint.num_bytes)

    config = checkpoint.config
    if config.qk_norm:
        raise ValueError(f"{checkpoint.path}: architectures: {config.architecture}; convertible to a GGUF: Llama's kin")
    tensors = _tensors(checkpoint)
    writer = GGUFWriter(path, "llama")
    try:
        for key, value in (_metadata(config) | tokenizer_metadata(checkpoint.tokenizer(), config)).items():
            if isinstance(value, float):
                kind = GGUFValueType.FLOAT32
            elif isinstance(value, int) and not isinstance(value, bool):
                kind = GGUFValueType.UINT32
            else:
                kind = GGUFValueType.get_type(value)
            writer.add_key_value(key, value, kind)
        factors = _rope_factors(config)
        if factors is not None:
            writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
        kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, weight in checkpoint.tensors(progress=count):
            try:
                kind_name, rows = encode(name, weight, config)
            except ValueError as error:
                raise ValueError(f"{checkpoint.index[name].path}: {name}: {error}") from None
            kinds[name] = kind_name, rows.shape if weight_is_matrix(weight) else rows.shape[:1]
        for name, parts in tensors.items():
            kind_name, shape = kinds[parts[0]]
            for part in parts[1:]:
                if kinds[part][0] != kind_name:
                    raise ValueError(
                        f"{parts[0]} becomes {kind_name}, {part} {kinds[part][0]}: convertible are experts of one type"
                    )
            dtype = np.dtype(np.float32) if len(shape) == 1 else np.dtype(np.uint8)
            shape = shape if len(parts) == 1 else (len(parts), *shape)
            num_bytes = math.prod(shape) * dtype.itemsize
            writer.add_tensor_info(name, shape, dtype, num_bytes, GGMLQuantizationType[kind_name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for parts in tensors.values():
            written = (_read(checkpoint, part, config, count) for part in parts)
            writer.write_tensor_data(next(written) if len(parts) == 1 else np.concatenate(list(written)))
    except ValueError as error:
        raise ValueError(str(error) if str(checkpoint.path) in str(error) else f"{checkpoint.path}: {error}") from None
    finally:
        writer.close()


def _tensors(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """The tensors of the GGUF: of most one of the checkpoint, of `ffn_gate_exps` and its like those of all experts."""
    tensors: dict[str, list[str]] = {}
    for name in checkpoint.index:
        match = re.fullmatch(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight", name)
        if match is None:
            tensors[gguf_name(name)] = [name]
            continue
        parts = tensors.setdefault(f"blk.{match[1]}.{EXPERT_GGUF_NAMES[match[3]]}_exps.weight", [])
        parts += [name]
        parts.sort(key=lambda part: int(part.split(".")[5]))
    return tensors


def _read(checkpoint: Checkpoint, name: str, config: ModelConfig, count: Callable[[int], None]) -> np.ndarray:
    """The rows of one tensor, as bytes."""
    for found, weight in checkpoint.tensors(progress=count, prefix=name.removesuffix("weight")):
        if found == name:
            return encode(name, weight, config)[1]
    raise AssertionError(name)


def weight_is_matrix(weight: Weight) -> bool:
    return not isinstance(weight, torch.Tensor) or weight.dim() == 2


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` → `blk.3.ffn_up.weight`."""
    module, _, kind = name.rpartition(".")
    layer = ""
    if module.startswith("model.layers."):
        _, _, index, module = module.split(".", 3)
        layer = f"blk.{index}."
    if module not in GGUF_NAMES:
        raise ValueError(f"{name}: a tensor that has no name in a GGUF of a Llama model")
    return f"{layer}{GGUF_NAMES[module]}.{kind}"


def encode(name: str, weight: Weight, config: ModelConfig) -> tuple[str, np.ndarray]:
    """The GGUF type of a weight and its rows as bytes, `[N, bytes of a row]`.

    Raises:
        ValueError: no type holds it exactly.
    """
    if isinstance(weight, torch.Tensor):
        if weight.dim() == 1 or name.endswith(".gate.weight"):  # a router, which llama.cpp wants in fp32 too
            weight = weight.float()
        if weight.dtype not in TYPES:
            raise ValueError(f"{weight.dtype} has no equal in a GGUF; convertible without loss: fp32, fp16, bf16")
        kind, rows = TYPES[weight.dtype], weight.contiguous().view(len(weight), -1).view(torch.uint8)
    elif isinstance(weight, Int4Weight):
        kind, rows = _int4(weight)
    elif isinstance(weight, Int8Weight):
        if weight.activations is not None:
            raise ValueError("layers whose activations are quantised too (W8A8) have no equal in a GGUF")
        kind, rows = (
            "Q8_0",
            torch.cat((_per_block(weight, weight.scale, "scale"), _in_blocks(weight.q)), dim=2).flatten(1),
        )
    else:
        raise ValueError(
            "fp8 has no equal in a GGUF; convertible without loss: fp32, fp16, bf16, int4 and int8 in groups"
        )
    return kind, np.ascontiguousarray(_permute(name, rows, config).numpy())


def _int4(weight: Int4Weight) -> tuple[str, torch.Tensor]:
    if weight.order is not None:
        raise ValueError("act-order (g_idx) has no equal in a GGUF, whose groups are neighbours")
    scale = _per_block(weight, weight.scale, "scale")
    blocks = weight.q.unflatten(1, (-1, 2, BLOCK // 2))  # byte i of a block holds elements i and i + 16
    packed = blocks[:, :, 0] | blocks[:, :, 1] << 4
    minimum = None if weight.minimum is None else weight.minimum.float()
    if minimum is None or torch.equal(minimum, -8 * weight.scale.float()):
        if not (-8 * weight.scale.half()).isfinite().all():
            raise ValueError("a scale that Q4_0 has no room for: eight times it is beyond fp16")
        return "Q4_0", torch.cat((scale, packed), dim=2).flatten(1)
    return "Q4_1", torch.cat((scale, _per_block(weight, minimum, "zero point times scale"), packed), dim=2).flatten(1)


def _in_blocks(q: torch.Tensor) -> torch.Tensor:
    return q.unflatten(1, (-1, BLOCK)).view(torch.uint8)


def _per_block(weight: Int4Weight | Int8Weight, values: torch.Tensor, what: str) -> torch.Tensor:
    """One fp16 number for each block of 32, as `[N, K / 32, 2]` bytes."""
    if weight.group_size % BLOCK:
        raise ValueError(f"groups of {weight.group_size} have no equal in a GGUF; convertible: multiples of {BLOCK}")
    half = values.half()
    if not torch.equal(half.to(values.dtype), values):
        raise ValueError(f"its {what} ({values.dtype}) is not exact in fp16, which a GGUF stores")
    half = half.repeat_interleave(weight.group_size // BLOCK, dim=1)
    return half.unsqueeze(2).view(torch.uint8)


def _permute(name: str, rows: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Orders the rows of queries and keys as llama.cpp pairs them: neighbours instead of halves."""
    if ".q_proj." in name:
        heads = config.num_attention_heads
    elif ".k_proj." in name:
        heads = config.num_key_value_heads
    else:
        return rows
    return rows.view(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def _metadata(config: ModelConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_theta),
        "llama.vocab_size": config.vocab_size,
    }
    if config.sliding_window is not None:
        keys["llama.attention.sliding_window"] = config.sliding_window
    if config.num_local_experts:
        keys |= {
            "llama.expert_count": config.num_local_experts,
            "llama.expert_used_count": config.num_experts_per_tok,
        }
    scaling = config.rope_scaling
    if scaling is not None and scaling["rope_type"] == "linear":
        keys |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": float(scaling["factor"])}
    elif scaling is not None and scaling["rope_type"] != "llama3":
        raise ValueError(f"rope_scaling: {scaling['rope_type']!r}; convertible to a GGUF: linear, llama3")
    return keys


def _rope_factors(config: ModelConfig) -> np.ndarray | None:
    """What llama3 scaling divides each frequency by: a tensor in a GGUF."""
    scaling = config.rope_scaling
    if scaling is None or scaling["rope_type"] != "llama3":
        return None
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    factors = []
    for i in range(0, config.head_dim, 2):
        turns = original / (2 * math.pi * config.rope_theta ** (i / config.head_dim))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, np.float32)
