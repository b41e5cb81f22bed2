"""A GGUF of a Hugging Face folder, as llama.cpp's convert_hf_to_gguf.py lays it out: the other way of gguf_file.py.

Weights are read twice, so that none but the current one is in memory: first to see of which type each is, and whether
that type holds it exactly, then to write it.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFValueType, GGUFWriter
from gguf.constants import GGMLQuantizationType

from octavo.engine.checkpoint import Checkpoint, Int4Weight, Int8Weight, Weight
from octavo.engine.config import ModelConfig
from octavo.engine.gguf_file import NAMES, ROPE_FACTORS
from octavo.engine.gguf_tokenizer import tokenizer_metadata

BLOCK = 32
GGUF_NAMES = {theirs: short for short, theirs in NAMES.items()}
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
    if config.num_local_experts:
        raise ValueError(
            f"{checkpoint.path}: num_local_experts: {config.num_local_experts}; convertible to a GGUF: dense models"
        )
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
        for name, weight in checkpoint.tensors(progress=count):
            try:
                kind_name, rows = encode(name, weight, config)
            except ValueError as error:
                raise ValueError(f"{checkpoint.index[name].path}: {name}: {error}") from None
            kind_of = GGMLQuantizationType[kind_name]
            shape = rows.shape if weight_is_matrix(weight) else rows.shape[:1]
            dtype = np.dtype(np.uint8) if weight_is_matrix(weight) else np.dtype(np.float32)
            writer.add_tensor_info(gguf_name(name), shape, dtype, rows.nbytes, kind_of)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for name, weight in checkpoint.tensors(progress=count):
            writer.write_tensor_data(encode(name, weight, config)[1])
    except ValueError as error:
        raise ValueError(str(error) if str(checkpoint.path) in str(error) else f"{checkpoint.path}: {error}") from None
    finally:
        writer.close()


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
        if weight.dim() == 1:
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
