"""The steps that a model will be asked for, on meta tensors, so that `octavo.warmup` can compile for them ahead."""

from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch

import octavo
from octavo.engine.config import ModelConfig
from octavo.engine.experts import ExpertLoop, MixtureOfExperts
from octavo.engine.inputs import Shape
from octavo.engine.kv_cache import KVCache
from octavo.engine.model import AttentionMetadata, Decoder


def step_calls(
    model: Decoder, cache: KVCache, shapes: Iterable[Shape], width: int, rolling: bool = False
) -> list[Callable[[], Any]]:
    """Functions that each do one step of a meta twin of `model`, for all the shapes that steps have.

    Layers whose tensors look the same are done once, and so are experts.

    Args:
        width: pages of a row of the table.
        rolling: whether rows are rings.
    """
    model = distinct_layers(_meta(model))
    data, scales = (None if x is None else x[:1].to("meta") for x in (cache.data, cache.scales))
    layers = len(model.layers), *(-1,) * 4
    assert data is not None
    cache = KVCache(data.expand(*layers, -1), None if scales is None else scales.expand(layers))
    calls: list[Callable[[], Any]] = []
    most = 1
    for shape in shapes:
        calls.append(partial(_step, model, cache, shape, width, rolling))
        most = max(most, shape.tokens)
    loops = [layer.mlp.experts for layer in model.layers if isinstance(layer.mlp, MixtureOfExperts)]
    experts = [expert for loop in loops if isinstance(loop, ExpertLoop) for expert in loop.experts]
    for expert in experts:  # which get any number of tokens
        for tokens in octavo.token_counts(most):
            x = torch.empty(tokens, model.config.hidden_size, dtype=model.dtype, device="meta")
            calls.append(partial(expert, x))
    return calls


def _step(model: Decoder, cache: KVCache, shape: Shape, width: int, rolling: bool) -> None:
    def new(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    metadata = AttentionMetadata(
        positions=new(shape.tokens),
        slot_mapping=new(shape.tokens, dtype=torch.int64),
        block_table=new(shape.sequences, width),
        seq_lens=new(shape.sequences),
        cu_seqlens_q=new(shape.sequences + 1),
        max_seqlen_q=shape.max_seqlen_q,
        rolling=rolling,
    )
    hidden = model.hidden(new(shape.tokens, dtype=torch.int64), cache, metadata)
    _draws(model.head(hidden[: shape.sequences]))


def _draws(logits: torch.Tensor) -> None:
    """What the runner may ask for: greedy alone, draws, and draws with biases, penalties and log-probabilities."""
    rows, vocab = logits.shape
    octavo.sample(logits)

    def new(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(rows, *size, dtype=dtype, device="meta")

    drawn: dict[str, Any] = dict.fromkeys(("temperature", "top_p", "min_p"), new())
    drawn |= dict.fromkeys(("seeds", "positions"), new(dtype=torch.int64)) | {"top_k": new(dtype=torch.int32)}
    octavo.sample(logits, **drawn)
    biased = drawn | {"bias_ids": new(16, dtype=torch.int32), "bias_values": new(16)}
    penalised = biased | dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), new())
    penalised |= {
        "output_counts": new(vocab, dtype=torch.int32),
        "prompt_mask": new(-(-vocab // 32), dtype=torch.int32),
    }
    for edited in (biased, penalised):
        octavo.sample(logits, **edited)
        octavo.sample(logits, **edited, num_logprobs=min(4, vocab))


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


def distinct_layers(model: Decoder) -> Decoder:
    """The model with one layer of each kind, and the first again, so that each follows another as it does in all."""
    layers = list({_look(layer): layer for layer in model.layers}.values())
    if len(model.layers) > 1:
        layers.append(layers[0])
    return replace(model, layers=tuple(replace(layer, mlp=_distinct_experts(layer.mlp)) for layer in layers))


def _distinct_experts(mlp: Any) -> Any:
    """Of experts that are computed one by one, each kind once, and with all tokens: smaller numbers are other steps."""
    if isinstance(mlp, MixtureOfExperts) and isinstance(mlp.experts, ExpertLoop):
        loop = mlp.experts
        experts = tuple({_look(expert): expert for expert in loop.experts}.values())
        return replace(mlp, experts=replace(loop, experts=experts))
    return mlp
