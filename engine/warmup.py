"""The steps that a model will be asked for, on meta tensors, so that `octavo.warmup` can compile for them ahead."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch

import octavo
from octavo.engine.config import ModelConfig
from octavo.engine.experts import ExpertLoop, MixtureOfExperts
from octavo.engine.model import AttentionMetadata, Decoder


def step_calls(
    model: Decoder, kv_cache: torch.Tensor, max_num_batched_tokens: int, max_num_seqs: int
) -> list[Callable[[], Any]]:
    """Functions that each do one step of a meta twin of `model`: decodes, and chunks of prompts, of many sizes.

    Layers whose tensors look the same are done once, and so are experts.
    """
    model = _distinct_layers(_meta(model))
    shape = (len(model.layers), *kv_cache.shape[1:])
    cache = torch.empty(shape, dtype=kv_cache.dtype, device="meta")
    calls: list[Callable[[], Any]] = []
    for tokens in octavo.token_counts(max_num_batched_tokens):
        # One sequence, a token each, and some that fill a tile of attention a little or well.
        for sequences in {1, tokens, tokens // 4, tokens // 16}:
            if sequences == 1 or 1 < sequences <= max_num_seqs:
                calls.append(partial(_step, model, cache, tokens, sequences))
    return calls


def _step(model: Decoder, kv_cache: torch.Tensor, tokens: int, sequences: int) -> None:
    def new(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    metadata = AttentionMetadata(
        positions=new(tokens, dtype=torch.int64),
        slot_mapping=new(tokens, dtype=torch.int64),
        block_table=new(sequences, 8),
        seq_lens=new(sequences),
        cu_seqlens_q=new(sequences + 1),
        max_seqlen_q=tokens // sequences,
    )
    hidden = model.hidden(new(tokens, dtype=torch.int64), kv_cache, metadata)
    _draws(model.logits(hidden))


def _draws(logits: torch.Tensor) -> None:
    """What `Sampler` may ask for: greedy alone, draws without filters and with them."""
    rows = logits.shape[0]
    octavo.sample(logits)

    def new(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(rows, dtype=dtype, device="meta")

    drawn: dict[str, Any] = {
        "temperature": new(torch.float32),
        "seeds": new(torch.int64),
        "positions": new(torch.int64),
    }
    octavo.sample(logits, **drawn)
    octavo.sample(logits, **drawn, top_k=new(torch.int32), top_p=new(torch.float32), min_p=new(torch.float32))


def _meta(value: Any) -> Any:
    """The same structure with meta tensors."""
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, tuple):
        return tuple(_meta(v) for v in value)
    if is_dataclass(value) and not isinstance(value, type | ModelConfig):
        return replace(value, **{f.name: _meta(getattr(value, f.name)) for f in fields(value)})
    return value


def _look(value: Any) -> Any:
    """What of a layer decides the kernels that it starts."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.stride()
    if isinstance(value, tuple):
        return tuple(_look(v) for v in value)
    if is_dataclass(value):
        return (type(value).__name__, *(_look(getattr(value, f.name)) for f in fields(value)))
    return value


def _distinct_layers(model: Decoder) -> Decoder:
    layers = {_look(layer): layer for layer in model.layers}.values()
    return replace(model, layers=tuple(replace(layer, mlp=_distinct_experts(layer.mlp)) for layer in layers))


def _distinct_experts(mlp: Any) -> Any:
    """Of experts that are computed one by one, each kind once, and with all tokens: smaller numbers are other steps."""
    if isinstance(mlp, MixtureOfExperts) and isinstance(mlp.experts, ExpertLoop):
        loop = mlp.experts
        experts = tuple({_look(expert): expert for expert in loop.experts}.values())
        return replace(mlp, experts=replace(loop, experts=experts))
    return mlp
