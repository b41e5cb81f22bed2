"""The calls of octavo's ops that a decoder of the Llama family makes, as `warmup` wants them.

A model is known by its configuration and the format of its weights. Each call is made for several numbers of tokens,
because tile choices depend on that: 1, 2, 4, … up to the largest batch, and one more than each.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from octavo.kernels.activation import gelu_and_mul, silu_and_mul
from octavo.kernels.activation_quantize import silu_and_mul_quantize
from octavo.kernels.attention.paged_attention import paged_attention
from octavo.kernels.attention.plan_attention import plan_attention
from octavo.kernels.attention.rope_write_kv import rotary_embedding_write_kv
from octavo.kernels.attention.write_kv import write_kv
from octavo.kernels.checks import FLOATS
from octavo.kernels.linear import linear
from octavo.kernels.linear_few import MOST_TOKENS
from octavo.kernels.moe.fused_moe import fused_moe
from octavo.kernels.moe.route import moe_route
from octavo.kernels.norm import add_rms_norm, rms_norm
from octavo.kernels.norm_quantize import add_rms_norm_quantize, rms_norm_quantize
from octavo.kernels.quant.int4 import int4_linear
from octavo.kernels.quant.int8 import int8_linear
from octavo.kernels.quant.packing import packed_shape
from octavo.kernels.quant.quantize import quantize_fp8, quantize_int8
from octavo.kernels.quant.w8a8_linear import fp8_linear, int8_int8_linear
from octavo.kernels.rope import rotary_embedding

QUANTISED = {"int8_int8": torch.int8, "fp8": torch.float8_e4m3fn, "fp8_blocks": torch.float8_e4m3fn}
WEIGHTS = ("dense", "int4", "int8", "int8_int8", "fp8", "fp8_blocks")
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": silu_and_mul,
    "gelu": gelu_and_mul,
    "gelu_pytorch_tanh": partial(gelu_and_mul, approximate="tanh"),
}
Call = Callable[[], Any]


def model_calls(
    config: Any,
    *,
    dtype: torch.dtype = torch.bfloat16,
    weights: str = "dense",
    group_size: int = 128,
    page_size: int = 16,
    max_num_batched_tokens: int = 8192,
    index_dtype: torch.dtype = torch.int64,
) -> list[Call]:
    """Lists the calls of octavo's ops that a Llama, Mistral, Mixtral or Qwen3-MoE model makes, for `warmup`.

    `octavo.warmup(octavo.model_calls(transformers.AutoConfig.from_pretrained("mistralai/Mistral-7B-v0.1")))`

    Args:
        config: a Hugging Face configuration, octavo.engine's `ModelConfig`, or a dictionary with the same names:
            hidden_size, intermediate_size, num_attention_heads; optional num_key_value_heads, head_dim, hidden_act,
            sliding_window; of a mixture of experts num_local_experts or num_experts, num_experts_per_tok,
            norm_topk_prob, and moe_intermediate_size where experts have another size than intermediate_size.
        dtype: of activations, cache and norm weights.
        weights: "dense" (the products of many tokens are torch's), "int4" (scales without a minimum and with
            one, of experts also one in fp32, as the engine has zero points), "int8"; or with activations quantised by
            token, "int8_int8" and "fp8", and in groups of 128, "fp8_blocks".
        group_size: of int4 and int8 weights.
        page_size: tokens a page of the KV cache.
        max_num_batched_tokens: tokens in one step at most.
        index_dtype: of positions and slots, int32 or int64.

    Returns:
        Functions without arguments, each calling one op on meta tensors.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a key that config lacks, or a value that is not supported.
    """
    if dtype not in FLOATS:
        raise TypeError(f"dtype: {dtype}; expected float16, bfloat16 or float32")
    if weights not in WEIGHTS:
        raise ValueError(f"weights: {weights!r}; expected one of {', '.join(WEIGHTS)}")
    if max_num_batched_tokens < 1:
        raise ValueError(f"max_num_batched_tokens: {max_num_batched_tokens}; expected at least 1")
    activation = _get(config, "hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"hidden_act: {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    hidden, intermediate, heads = (
        _get(config, key) for key in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    experts = _get(config, "num_local_experts", 0) or _get(config, "num_experts", 0)
    if experts:
        if activation != "silu":
            raise ValueError(f"hidden_act: {activation!r}; expected silu, which is that of octavo's experts")
        intermediate = _get(config, "moe_intermediate_size", intermediate)
    kv_heads = _get(config, "num_key_value_heads", heads)
    head_dim = _get(config, "head_dim", hidden // heads)
    # Gate and up are one layer, which ends with SiLU × gate wherever outputs can be interleaved.
    ends = weights not in ("int8", "fp8_blocks") and activation == "silu" and intermediate % 8 == 0
    linears: set[tuple[int, int, str | None]] = {
        ((heads + 2 * kv_heads) * head_dim, hidden, None),
        (hidden, heads * head_dim, None),
        (2 * intermediate, hidden, "silu_and_mul" if ends else None),
        (hidden, intermediate, None),
    }
    calls: list[Call] = []
    for tokens in token_counts(max_num_batched_tokens):
        calls += [
            partial(_norms, tokens, hidden, dtype),
            partial(_activation, ACTIVATIONS[activation], tokens, intermediate, dtype),
            partial(_rope_and_cache, tokens, heads, kv_heads, head_dim, page_size, dtype, index_dtype),
        ]
        if experts:
            routing = experts, _get(config, "num_experts_per_tok"), _get(config, "norm_topk_prob", True)
            calls.append(partial(_experts, tokens, hidden, intermediate, *routing, dtype, weights, group_size))
        for max_seqlen_q in token_counts(tokens):
            sizes = tokens, max_seqlen_q, heads, kv_heads, head_dim, page_size
            calls.append(partial(_attention, *sizes, _get(config, "sliding_window", None), dtype))
        if tokens <= MOST_TOKENS:  # what has dense weights, the head and a router among them
            dense = linears if weights == "dense" else set()
            dense |= {(n, hidden, None) for n in (experts, _get(config, "vocab_size", 0)) if n}
            calls += [partial(_linear, tokens, n, k, end, dtype) for n, k, end in sorted(dense, key=str)]
        if weights in QUANTISED:
            calls.append(partial(_quantising, weights, tokens, hidden, intermediate, dtype))
        if weights != "dense":
            kept: dict[str, Callable[..., None]] = {"int4": _int4, "int8": _int8}
            linear = kept.get(weights, partial(_w8a8, weights))
            calls += [partial(linear, tokens, n, k, group_size, dtype, end) for n, k, end in sorted(linears, key=str)]
    return calls


_REQUIRED = object()


def _get(config: Any, key: str, default: Any = _REQUIRED) -> Any:
    value = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
    if value is None and default is _REQUIRED:
        raise ValueError(f"config: {key} is missing; expected a decoder's configuration such as Llama's")
    return default if value is None else value


def token_counts(most: int) -> list[int]:
    """Numbers of tokens to warm up for: both sides of every power of two, which is where tile choices change.

    Args:
        most: the largest, which is among them; at least 1.

    Returns:
        The numbers in order: 1, 2, 3, 4, 5, 8, 9, …, most.

    Raises:
        ValueError: `most` is below 1.
    """
    if most < 1:
        raise ValueError(f"most: {most}; expected at least 1")
    powers = [1 << i for i in range(most.bit_length())]
    return sorted({n for p in powers for n in (p, p + 1) if n <= most} | {most})


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _norms(tokens: int, hidden: int, dtype: torch.dtype) -> None:
    x, weight = _empty(tokens, hidden, dtype=dtype), _empty(hidden, dtype=dtype)
    rms_norm(x, weight)
    add_rms_norm(x, torch.empty_like(x), weight)


def _quantising(weights: str, tokens: int, hidden: int, intermediate: int, dtype: torch.dtype) -> None:
    """What quantises for the layer that follows."""
    x, gate_up = _empty(tokens, hidden, dtype=dtype), _empty(tokens, 2 * intermediate, dtype=dtype)
    q_dtype, group_size = QUANTISED[weights], 128 if weights == "fp8_blocks" else None
    rms_norm_quantize(x, _empty(hidden, dtype=dtype), q_dtype, group_size=group_size)
    add_rms_norm_quantize(x, torch.empty_like(x), _empty(hidden, dtype=dtype), q_dtype, group_size=group_size)
    silu_and_mul_quantize(gate_up, q_dtype, group_size=group_size)


def _linear(tokens: int, n: int, k: int, activation: str | None, dtype: torch.dtype) -> None:
    weight = _empty(n, k, dtype=dtype)
    linear(_empty(tokens, k, dtype=dtype), weight, activation=activation, prefetch_weight=True)


def _activation(activation: Callable[[torch.Tensor], Any], tokens: int, intermediate: int, dtype: torch.dtype) -> None:
    activation(_empty(tokens, 2 * intermediate, dtype=dtype))


def _rope_and_cache(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
    index_dtype: torch.dtype,
) -> None:
    qkv = _empty(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    query, key, value = qkv.split([heads, kv_heads, kv_heads], dim=1)
    index = _empty(tokens, dtype=index_dtype)
    cache = _empty(16, page_size, kv_heads, head_dim, dtype=dtype)
    other = torch.empty_like(cache)
    for table_dtype in {torch.float32, dtype}:
        table = _empty(16, head_dim, dtype=table_dtype)
        rotary_embedding(query, key, index, table)
        rotary_embedding_write_kv(query, key, value, index, table, cache, other, index)
    write_kv(key, value, cache, other, index)


def _attention(
    tokens: int,
    max_seqlen_q: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    window_size: int | None,
    dtype: torch.dtype,
) -> None:
    query = _empty(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)[:, :heads]
    cache = _empty(16, page_size, kv_heads, head_dim, dtype=dtype)
    other = torch.empty_like(cache)
    for sequences in {max(tokens // max_seqlen_q, 1), tokens}:  # as few as there may be, and as many
        table, seq_lens, cu_seqlens = (
            _empty(*shape, dtype=torch.int32) for shape in ((sequences, 16), (sequences,), (sequences + 1,))
        )
        lengths: dict[str, Any] = dict(max_seqlen_q=max_seqlen_q, window_size=window_size)
        plan = plan_attention(query, cache, table, seq_lens, cu_seqlens, **lengths)
        for used in (None, plan):
            paged_attention(query, cache, other, table, seq_lens, cu_seqlens, **lengths, plan=used)


def _experts(
    tokens: int,
    hidden: int,
    intermediate: int,
    experts: int,
    top_k: int,
    renormalize: bool,
    dtype: torch.dtype,
    weights: str,
    group_size: int,
) -> None:
    x, logits = _empty(tokens, hidden, dtype=dtype), _empty(tokens, experts, dtype=dtype)
    topk_weights, topk_ids = moe_route(logits, top_k, renormalize=renormalize)
    kept = {"dense": dtype, "int4": torch.int16, "int8": torch.int8, "int8_int8": torch.int8}
    both: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for n, k in ((2 * intermediate, hidden), (hidden, intermediate)):
        scale = None
        if weights in ("int4", "int8"):
            scale = _empty(experts, k // group_size, n, dtype=dtype)
        elif weights == "fp8_blocks":
            scale = _empty(experts, -(-n // 128), k // 128, dtype=torch.float32)
        elif weights != "dense":
            scale = _empty(experts, n, dtype=torch.float32)
        shape = packed_shape(n, k) if weights == "int4" else (n, k)
        both.append((_empty(experts, *shape, dtype=kept.get(weights, torch.float8_e4m3fn)), scale))
    (w1, w1_scale), (w2, w2_scale) = both
    given: dict[str, Any] = dict(w1_scale=w1_scale, w2_scale=w2_scale, weights_only=weights == "int8")
    fused_moe(x, w1, w2, topk_weights, topk_ids, **given)
    if weights == "int4" and w1_scale is not None and w2_scale is not None:
        for of_minima in {dtype, torch.float32}:
            minima: dict[str, Any] = dict(w1_minimum=w1_scale.to(of_minima), w2_minimum=w2_scale.to(of_minima))
            fused_moe(x, w1, w2, topk_weights, topk_ids, **given, **minima)


def _int4(tokens: int, n: int, k: int, group_size: int, dtype: torch.dtype, activation: str | None) -> None:
    x, packed = _empty(tokens, k, dtype=dtype), _empty(*packed_shape(n, k), dtype=torch.int16)
    scale = _empty(k // group_size, n, dtype=dtype)
    for minimum in (None, torch.empty_like(scale)):
        int4_linear(x, packed, scale, minimum, group_size=group_size, activation=activation)


def _int8(tokens: int, n: int, k: int, group_size: int, dtype: torch.dtype, _: None) -> None:
    weight, scale = _empty(n, k, dtype=torch.int8), _empty(k // group_size, n, dtype=dtype)
    int8_linear(_empty(tokens, k, dtype=dtype), weight, scale, group_size=group_size)


def _w8a8(weights: str, tokens: int, n: int, k: int, _: int, dtype: torch.dtype, activation: str | None) -> None:
    x = _empty(tokens, k, dtype=dtype)
    if weights == "int8_int8":
        q, x_scale = quantize_int8(x)
        weight, scale = _empty(n, k, dtype=torch.int8), _empty(n, dtype=torch.float32)
        int8_int8_linear(q, weight, x_scale, scale, out_dtype=dtype, activation=activation)
        return
    blocks = weights == "fp8_blocks"
    q, x_scale = quantize_fp8(x, granularity="group" if blocks else "token")
    weight = _empty(n, k, dtype=torch.float8_e4m3fn)
    scale = _empty(*((-(-n // 128), k // 128) if blocks else (n,)), dtype=torch.float32)
    fp8_linear(q, weight, x_scale, scale, out_dtype=dtype, activation=activation)
