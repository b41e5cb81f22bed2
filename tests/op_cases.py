"""Calls of every op, for the tests of how calls reach the GPU."""

import torch

import octavo
from octavo.kernels.attention import plan_attention
from octavo.kernels.quant.packing import packed_shape


def cases(tokens: int, dtype=torch.bfloat16) -> dict:
    """Name -> (function, tensors by name, other arguments), fresh tensors each time."""

    def new(*shape, dtype=dtype):
        return torch.zeros(shape, dtype=dtype)

    def ones(*shape):
        return torch.ones(shape, dtype=torch.float32)

    heads, kv_heads, d, page = 8, 2, 64, 16
    qkv = new(tokens, heads + 2 * kv_heads, d)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    kv = new(9, 2, page, kv_heads, d)
    index = torch.zeros(tokens, dtype=torch.int64)
    attention = dict(
        query=q,
        key_cache=kv[:, 0],
        value_cache=kv[:, 1],
        block_table=torch.zeros(3, 4, dtype=torch.int32),
        seq_lens=torch.zeros(3, dtype=torch.int32),
        cu_seqlens_q=torch.zeros(4, dtype=torch.int32),
    )
    shape = plan_attention.shape_of(q, attention["key_cache"], 1, alibi=False)
    plan = torch.zeros(shape, dtype=torch.int32)
    step = dict(query=q, key=k, value=v, positions=index, cos_sin_cache=new(32, d), slot_mapping=index.clone())
    float8, int8_kv = (
        {name: new(9, page, kv_heads, d, dtype=dtype) for name in ("key_cache", "value_cache")}
        for dtype in (torch.float8_e5m2, torch.int8)
    )
    int8_kv |= {name: new(9, page, kv_heads, dtype=torch.float32) for name in ("key_scale_cache", "value_scale_cache")}
    vocab = 1000
    row, bits = new(tokens, dtype=torch.float32), new(tokens, -(-vocab // 32), dtype=torch.int32)
    drawing = dict(
        temperature=row,
        top_k=new(tokens, dtype=torch.int32),
        top_p=row.clone(),
        min_p=row.clone(),
        seeds=index.clone(),
        positions=index.clone(),
    )
    editing = dict(
        repetition_penalty=row.clone(),
        presence_penalty=row.clone(),
        frequency_penalty=row.clone(),
        output_counts=new(tokens, vocab, dtype=torch.int32),
        prompt_mask=bits,
        bias_ids=new(tokens, 3, dtype=torch.int64),
        bias_values=new(tokens, 3, dtype=torch.float32),
        allowed_mask=bits.clone(),
    )
    int4 = dict(x=new(tokens, 128), packed=new(2, 1, 64, 32, dtype=torch.int16), scale=new(1, 80))
    one = torch.ones(1)
    scales = dict(x_scale=ones(tokens, 1), weight_scale=ones(80))
    w8a8 = {
        dtype: dict(x=new(tokens, 256, dtype=dtype), weight=new(80, 256, dtype=dtype), **scales)
        for dtype in (torch.int8, torch.float8_e4m3fn)
    }
    asymmetric = dict(x_zero=new(tokens, 1, dtype=torch.int32), weight_sum=new(80, dtype=torch.int32))
    int4_int8 = int4 | dict(scale=new(2, 80), x=new(tokens, 128, dtype=torch.int8), x_scale=ones(tokens, 1))
    int8 = dict(x=new(tokens, 128), weight=new(80, 128, dtype=torch.int8), scale=new(1, 80))
    offsets, ids = torch.zeros(5, dtype=torch.int32), new(tokens, 2, dtype=torch.int32)
    grouped = dict(x=new(tokens, 128), weight=new(4, 80, 128), offsets=offsets)
    moe = dict(x=new(tokens, 128), w1=new(4, 160, 128), w2=new(4, 128, 80), topk_weights=ones(tokens, 2), topk_ids=ids)
    int4_moe = dict(
        w1=new(4, *packed_shape(128, 128), dtype=torch.int16),
        w2=new(4, *packed_shape(128, 64), dtype=torch.int16),
        w1_scale=new(4, 1, 128),
        w2_scale=new(4, 1, 128),
    )
    int8_alone = dict(w1=new(4, 128, 128, dtype=torch.int8), w2=new(4, 128, 64, dtype=torch.int8))
    int8_moe = dict(w1=new(4, 160, 128, dtype=torch.int8), w2=new(4, 128, 80, dtype=torch.int8))
    return {
        "rms_norm": (octavo.rms_norm, dict(x=new(tokens, 512), weight=new(512)), dict(eps=1e-5)),
        "rms_norm of heads": (octavo.rms_norm, dict(x=k, weight=new(d)), {}),
        "add_rms_norm": (
            octavo.add_rms_norm,
            dict(x=new(tokens, 512), residual=new(tokens, 512), weight=new(512, dtype=torch.float32)),
            dict(weight_offset=1.0),
        ),
        "layer_norm": (octavo.layer_norm, dict(x=new(tokens, 512), weight=new(512), bias=new(512)), {}),
        "layer_norm without bias": (
            octavo.layer_norm,
            dict(x=new(tokens, 512), weight=new(512), bias=None),
            dict(weight_offset=1.0),
        ),
        "silu_and_mul": (octavo.silu_and_mul, dict(x=new(tokens, 1024)), {}),
        "gelu_and_mul": (octavo.gelu_and_mul, dict(x=new(tokens, 1024)), dict(approximate="tanh")),
        "relu2": (octavo.relu2, dict(x=new(tokens, 1000)), {}),
        "rotary_embedding": (
            octavo.rotary_embedding,
            dict(query=q, key=k, positions=index, cos_sin_cache=new(32, d)),
            {},
        ),
        "rotary_embedding of query": (
            octavo.rotary_embedding,
            dict(query=q, key=None, positions=index, cos_sin_cache=new(32, d)),
            dict(interleaved=True),
        ),
        "linear": (octavo.linear, dict(x=new(tokens, 256), weight=new(80, 256), bias=new(80)), {}),
        "linear with an activation": (
            octavo.linear,
            dict(x=new(tokens, 256), weight=new(80, 256), bias=None),
            dict(activation="silu_and_mul", prefetch_weight=True),
        ),
        "gemv": (octavo.gemv, dict(x=new(tokens, 256), weight=new(80, 256), bias=new(80)), {}),
        "gemv with an activation": (
            octavo.gemv,
            dict(x=new(tokens, 256), weight=new(80, 256), bias=None),
            dict(activation="silu_and_mul"),
        ),
        "write_kv": (
            octavo.write_kv,
            dict(key=k, value=v, key_cache=kv[:, 0], value_cache=kv[:, 1], slot_mapping=index),
            {},
        ),
        "write_kv in float8": (
            octavo.write_kv,
            dict(key=k, value=v, slot_mapping=index, k_scale=ones(1), v_scale=ones(kv_heads), **float8),
            {},
        ),
        "write_kv in int8": (octavo.write_kv, dict(key=k, value=v, slot_mapping=index, **int8_kv), {}),
        "rotary_embedding_write_kv": (
            octavo.rotary_embedding_write_kv,
            step | dict(key_cache=kv[:, 0], value_cache=kv[:, 1]),
            {},
        ),
        "rotary_embedding_write_kv with norms, in int8": (
            octavo.rotary_embedding_write_kv,
            step | int8_kv | dict(q_norm_weight=new(d), k_norm_weight=new(d)),
            dict(weight_offset=1.0),
        ),
        "paged_attention": (octavo.paged_attention, attention, dict(max_seqlen_q=1)),
        "plan_attention": (
            octavo.plan_attention,
            {name: attention[name] for name in ("query", "key_cache", "block_table", "seq_lens", "cu_seqlens_q")},
            dict(max_seqlen_q=1),
        ),
        "paged_attention with plan": (octavo.paged_attention, attention | dict(plan=plan), dict(max_seqlen_q=1)),
        "paged_attention with lse": (octavo.paged_attention, attention, dict(max_seqlen_q=1, return_lse=True)),
        "paged_attention with window": (octavo.paged_attention, attention, dict(max_seqlen_q=1, window_size=7)),
        "paged_attention of chunks": (octavo.paged_attention, attention, dict(max_seqlen_q=512, window_size=7)),
        "paged_attention batch-invariant": (
            octavo.paged_attention,
            attention,
            dict(max_seqlen_q=1, window_size=7, batch_invariant=True),
        ),
        "paged_attention of float8": (
            octavo.paged_attention,
            attention | float8 | dict(k_scale=ones(1), v_scale=ones(kv_heads)),
            dict(max_seqlen_q=1),
        ),
        "paged_attention with alibi": (
            octavo.paged_attention,
            attention | dict(alibi_slopes=ones(heads)),
            dict(max_seqlen_q=1),
        ),
        "paged_attention with sinks": (
            octavo.paged_attention,
            attention | dict(sinks=new(heads)),
            dict(max_seqlen_q=1, window_size=7),
        ),
        "paged_attention of a ring": (
            octavo.paged_attention,
            attention,
            dict(max_seqlen_q=1, window_size=9, rolling=True),
        ),
        "paged_attention of int8": (octavo.paged_attention, attention | int8_kv, dict(max_seqlen_q=1, window_size=7)),
        "merge_attention_states": (
            octavo.merge_attention_states,
            dict(out_a=new(tokens, heads, d), lse_a=ones(tokens, heads), out_b=q, lse_b=ones(heads, tokens).t()),
            {},
        ),
        "int4_linear": (octavo.int4_linear, int4, dict(group_size=128)),
        "int4_linear with minimum": (
            octavo.int4_linear,
            int4 | dict(minimum=new(1, 80), bias=new(80)),
            dict(group_size=128),
        ),
        "int4_linear with silu_and_mul and residual": (
            octavo.int4_linear,
            int4 | dict(residual=new(tokens, 40)),
            dict(group_size=128, activation="silu_and_mul"),
        ),
        "int8_linear": (octavo.int8_linear, int8, dict(group_size=128)),
        "int8_int8_linear": (octavo.int8_int8_linear, w8a8[torch.int8], {}),
        "int8_int8_linear with everything": (
            octavo.int8_int8_linear,
            w8a8[torch.int8] | asymmetric | dict(bias=new(80)),
            dict(out_dtype=torch.float16),
        ),
        "fp8_linear": (octavo.fp8_linear, w8a8[torch.float8_e4m3fn], {}),
        "fp8_linear with silu_and_mul and residual": (
            octavo.fp8_linear,
            w8a8[torch.float8_e4m3fn] | dict(residual=new(tokens, 40)),
            dict(activation="silu_and_mul", out_dtype=new(1).dtype),
        ),
        "fp8_linear in blocks": (
            octavo.fp8_linear,
            w8a8[torch.float8_e4m3fn] | dict(x_scale=ones(tokens, 2), weight_scale=ones(1, 2)),
            dict(fast_accum=False),
        ),
        "int4_int8_linear": (octavo.int4_int8_linear, int4_int8, dict(group_size=64)),
        "int4_int8_linear with minimum": (
            octavo.int4_int8_linear,
            int4_int8 | dict(minimum=new(2, 80), bias=new(80)),
            dict(group_size=64, out_dtype=torch.float16),
        ),
        "quantize_int8": (octavo.quantize_int8, dict(x=new(tokens, 512), scale=None), {}),
        "quantize_int8 by scale": (octavo.quantize_int8, dict(x=new(tokens, 512), scale=one), {}),
        "rms_norm_quantize": (
            octavo.rms_norm_quantize,
            dict(x=new(tokens, 512), weight=new(512), scale=None),
            dict(dtype=torch.int8, group_size=128),
        ),
        "rms_norm_quantize by scale": (
            octavo.rms_norm_quantize,
            dict(x=new(tokens, 512), weight=new(512), scale=one),
            dict(dtype=torch.float8_e4m3fn),
        ),
        "add_rms_norm_quantize": (
            octavo.add_rms_norm_quantize,
            dict(x=new(tokens, 512), residual=new(tokens, 512), weight=new(512), scale=None),
            dict(dtype=torch.float8_e4m3fn),
        ),
        "silu_and_mul_quantize": (
            octavo.silu_and_mul_quantize,
            dict(x=new(tokens, 1024), scale=None),
            dict(dtype=torch.float8_e4m3fn),
        ),
        "gelu_and_mul_quantize": (
            octavo.gelu_and_mul_quantize,
            dict(x=new(tokens, 1024), scale=one),
            dict(dtype=torch.int8, approximate="tanh"),
        ),
        "quantize_fp8": (octavo.quantize_fp8, dict(x=new(tokens, 512), scale=None), dict(granularity="group")),
        "quantize_fp8 by tensor": (
            octavo.quantize_fp8,
            dict(x=new(tokens, 512), scale=None),
            dict(granularity="tensor", dtype=torch.float8_e5m2),
        ),
        "moe_route": (octavo.moe_route, dict(router_logits=new(tokens, 60)), dict(top_k=4)),
        "moe_route in groups": (
            octavo.moe_route,
            dict(router_logits=new(tokens, 64), correction_bias=ones(64)),
            dict(
                top_k=6,
                scoring_func="sigmoid",
                num_expert_group=8,
                topk_group=3,
                routed_scaling_factor=2.5,
                num_shared_experts=1,
            ),
        ),
        "moe_permute": (
            octavo.moe_permute,
            dict(x=new(tokens, 512), topk_ids=new(tokens, 2, dtype=torch.int32)),
            dict(num_experts=8),
        ),
        "moe_permute of many pairs": (
            octavo.moe_permute,
            dict(
                x=new(tokens, 64),
                topk_ids=new(tokens, 5000, dtype=torch.int64),
                expert_map=new(60, dtype=torch.int32),
            ),
            dict(num_experts=8),
        ),
        "moe_unpermute": (
            octavo.moe_unpermute,
            dict(y=new(2 * tokens, 512), positions=new(tokens, 2, dtype=torch.int32), topk_weights=ones(tokens, 2)),
            {},
        ),
        "grouped_linear": (octavo.grouped_linear, grouped, {}),
        "grouped_linear with bias": (octavo.grouped_linear, grouped | dict(bias=new(4, 80)), {}),
        "grouped_linear of int8": (
            octavo.grouped_linear,
            grouped | dict(weight=new(4, 80, 128, dtype=torch.int8), scale=new(4, 1, 80)),
            {},
        ),
        "fused_moe": (octavo.fused_moe, moe, {}),
        "fused_moe of some experts": (octavo.fused_moe, moe | dict(expert_map=offsets), {}),
        "fused_moe of int8": (octavo.fused_moe, moe | int8_moe | dict(w1_scale=ones(4, 160), w2_scale=ones(4)), {}),
        "fused_moe of int4": (octavo.fused_moe, moe | int4_moe, {}),
        "fused_moe of int4 with minima": (
            octavo.fused_moe,
            moe | int4_moe | dict(w1_minimum=new(4, 1, 128), w2_minimum=new(4, 1, 128)),
            {},
        ),
        "fused_moe of int8 alone": (
            octavo.fused_moe,
            moe | int8_alone | dict(w1_scale=new(4, 1, 128), w2_scale=new(4, 1, 128)),
            dict(weights_only=True),
        ),
        "sample greedily": (octavo.sample, dict(logits=new(tokens, vocab)), {}),
        "sample": (octavo.sample, dict(logits=new(tokens, vocab), **drawing), {}),
        "sample with everything": (
            octavo.sample,
            dict(logits=new(tokens, vocab, dtype=torch.float32), **drawing, **editing),
            dict(num_logprobs=3),
        ),
        "int8_linear with bias": (octavo.int8_linear, int8 | dict(bias=new(80)), dict(group_size=128)),
    }


def serve(tokens: int) -> None:
    """A layer of a model with int4 weights (hidden 512, 8 and 2 heads of 64), decoding and in chunks."""

    def new(*shape, dtype=torch.bfloat16):
        return torch.zeros(shape, dtype=dtype)

    def linear(x, n):
        scale = new(x.shape[1] // 128, n)
        packed = new(-(-n // 64), x.shape[1] // 128, 64, 32, dtype=torch.int16)
        return octavo.int4_linear(x, packed, scale, group_size=128)

    residual = new(tokens, 512)
    x = octavo.rms_norm(residual, new(512))
    q, k, v = linear(x, 768).view(tokens, 12, 64).split([8, 2, 2], dim=1)
    index = new(tokens, dtype=torch.int64)
    octavo.rotary_embedding(q, k, index, new(131, 64, dtype=torch.float32))
    cache = new(2, 40, 16, 2, 64)
    octavo.write_kv(k, v, cache[0], cache[1], index)
    octavo.rotary_embedding_write_kv(q, k, v, index, new(131, 64, dtype=torch.float32), cache[0], cache[1], index)
    for length in (1, tokens):
        b = tokens // length
        table, lens, cu = new(b, 5, dtype=torch.int32), new(b, dtype=torch.int32), new(b + 1, dtype=torch.int32)
        plan = octavo.plan_attention(q, cache[0], table, lens, cu, max_seqlen_q=length)
        octavo.paged_attention(q, cache[0], cache[1], table, lens, cu, max_seqlen_q=length, plan=plan)
        out = octavo.paged_attention(q, cache[0], cache[1], table, lens, cu, max_seqlen_q=length)
    x = octavo.add_rms_norm(linear(out.flatten(1), 512), residual, new(512))
    octavo.add_rms_norm(linear(octavo.silu_and_mul(linear(x, 1024)), 512), residual, new(512))
