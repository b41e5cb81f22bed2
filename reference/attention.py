"""The paged KV cache and attention over it, in plain torch: a page gather and a softmax for each sequence."""

import torch

from octavo.reference.norm import rms_norm
from octavo.reference.rope import cos_and_sin, turned


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    key_scale_cache: torch.Tensor | None,
    value_scale_cache: torch.Tensor | None,
) -> None:
    pages, page_size = key_cache.shape[:2]
    slots = slot_mapping.tolist()
    for token, slot in enumerate(slots):
        if not -1 <= slot < pages * page_size:
            raise ValueError(
                f"slot_mapping: slot {slot} of token {token}; expected -1 (skip) or 0 to {pages * page_size - 1}, "
                f"as the cache has {pages} pages of {page_size}"
            )
    if -1 in slots:
        kept = slot_mapping >= 0
        key, value, slot_mapping = key[kept], value[kept], slot_mapping[kept]
    at = slot_mapping // page_size, slot_mapping % page_size
    _put(key_cache, at, key, k_scale, key_scale_cache)
    _put(value_cache, at, value, v_scale, value_scale_cache)


def _put(
    cache: torch.Tensor,
    at: tuple[torch.Tensor, torch.Tensor],
    x: torch.Tensor,
    scale: torch.Tensor | None,
    scale_cache: torch.Tensor | None,
) -> None:
    """Writes x, `[tokens, kv_heads, head_size]`, into slots of a cache, in the cache's format."""
    if scale_cache is not None:
        scale = x.float().abs().amax(-1) / 127
        scale_cache[at] = scale
    if cache.dtype.itemsize == 1:
        x = x.float() if scale is None else x.float() / scale.unsqueeze(-1)
        most = 127 if scale_cache is not None else torch.finfo(cache.dtype).max
        x = x.clamp(-most, most)
        if scale_cache is not None:
            x = x.round().nan_to_num(0.0)
    cache[at] = x if x.dtype == cache.dtype else x.to(cache.dtype)


def rotary_embedding_write_kv(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    q_norm_weight: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    interleaved: bool,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    key_scale_cache: torch.Tensor | None,
    value_scale_cache: torch.Tensor | None,
) -> None:
    cos, sin = cos_and_sin(positions, cos_sin_cache)
    q, k = query.float(), key.float()
    if q_norm_weight is not None:
        q = rms_norm(q, q_norm_weight, eps, weight_offset)
    if k_norm_weight is not None:
        k = rms_norm(k, k_norm_weight, eps, weight_offset)
    # One rotation of all heads takes a CPU little more time than one of the query's.
    q, k = turned(torch.cat((q, k), 1), cos, sin, interleaved).split((q.shape[1], k.shape[1]), 1)
    scales = k_scale, v_scale, key_scale_cache, value_scale_cache
    write_kv(k, value, key_cache, value_cache, slot_mapping, *scales)
    query.copy_(q)


def plan_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    causal: bool,
    window_size: int | None,
    rolling: bool,
    alibi: bool,
) -> torch.Tensor:
    """Nothing is shared out here, so there is nothing to plan."""
    return query.new_empty((0, 0), dtype=torch.int32)


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    scale: float,
    causal: bool,
    window_size: int | None,
    softcap: float,
    return_lse: bool,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    key_scale_cache: torch.Tensor | None,
    value_scale_cache: torch.Tensor | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    rolling: bool,
    batch_invariant: bool,
    plan: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, heads, _ = query.shape
    out = query.new_zeros(query.shape)
    lse = query.new_full((tokens, heads) if return_lse else (0,), -torch.inf, dtype=torch.float32)
    if sinks is not None and return_lse:
        lse[:] = sinks
    starts = cu_seqlens_q.tolist()
    if starts[0] != 0 or starts[-1] > tokens or starts != sorted(starts):
        raise ValueError(f"cu_seqlens_q: {starts}; expected 0 first, then no decrease and at most {tokens} (tokens)")
    for b, seq_len in enumerate(seq_lens.tolist()):
        end = starts[b + 1]
        # A causal query before the sequence's first key has nothing to attend to.
        start = max(starts[b], end - seq_len) if causal else starts[b]
        if start >= end or seq_len <= 0:
            continue
        step = 1 if batch_invariant else end - start  # a matrix product's bits depend on how many rows it has
        for i in range(start, end, step):
            position = seq_len - (end - i)
            last_key = position + step if causal else seq_len
            first_key = 0 if window_size is None else max(0, position - window_size + 1)
            at = block_table[b], first_key, last_key, rolling, f"block_table[{b}]"
            k, v = (
                _read(cache, scale, scale_cache, *at)
                for cache, scale, scale_cache in (
                    (key_cache, k_scale, key_scale_cache),
                    (value_cache, v_scale, value_scale_cache),
                )
            )
            options = scale, causal, window_size, softcap, sinks, alibi_slopes, return_lse
            o, sums = _attend(query[i : i + step], k, v, position - first_key, *options)
            out[i : i + step] = o
            if sums is not None:
                lse[i : i + step] = sums
    return out, lse


def _read(
    cache: torch.Tensor,
    scale: torch.Tensor | None,
    scale_cache: torch.Tensor | None,
    table: torch.Tensor,
    start: int,
    end: int,
    rolling: bool,
    name: str,
) -> torch.Tensor:
    """The keys or values of positions `start` to `end` of one sequence, in fp32: `[Hkv, end - start, D]`."""
    x = _gather(cache, table, start, end, rolling, name)
    if scale_cache is not None:
        x = x * _gather(scale_cache, table, start, end, rolling, name)[..., None]
    return x if scale is None else x * scale.view(-1, 1, 1)


def _gather(cache: torch.Tensor, table: torch.Tensor, start: int, end: int, rolling: bool, name: str) -> torch.Tensor:
    """The slots of positions `start` to `end` of one sequence, in fp32: `[Hkv, end - start, …]`."""
    page_size = cache.shape[1]
    first_page, last_page = start // page_size, (end - 1) // page_size
    pages = table.shape[0]
    if rolling and end - start > pages * page_size:
        raise ValueError(f"{name}: {pages} pages of {page_size} slots are too few for the {end - start} keys in sight")
    if not rolling and last_page >= pages:
        raise ValueError(f"{name}: {pages} pages of {page_size} slots are too few for seq_lens = {end}")
    if rolling:
        used = table[torch.arange(first_page, last_page + 1, device=table.device) % pages]
    else:
        used = table[first_page : last_page + 1]
    ids = used.tolist()
    wrong = [page for page in ids if not 0 <= page < cache.shape[0]]
    if wrong:
        raise ValueError(f"{name}: page id {wrong[0]}; expected 0 to {cache.shape[0] - 1}, as the cache has that many")
    # Neighbouring pages, the usual case, need no copy; for others, index_select takes a fifth of cache[used]'s time.
    in_order = ids == list(range(ids[0], ids[0] + len(ids)))
    held = cache[ids[0] : ids[-1] + 1] if in_order else cache.index_select(0, used)
    slots = held.flatten(0, 1)[start - first_page * page_size : end - first_page * page_size]
    return slots.transpose(0, 1).float()


def _attend(
    query: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    position: int,
    scale: float,
    causal: bool,
    window_size: int | None,
    softcap: float,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of queries from `position` on, the keys' count being from 0; the heads of a KV head are one matrix."""
    n, heads, d = query.shape
    kv_heads, seq_len, _ = k.shape
    q = query.view(n, kv_heads, heads // kv_heads, d).permute(1, 2, 0, 3).reshape(kv_heads, -1, d).float()
    plain = not softcap and sinks is None and alibi_slopes is None
    if n == 1 and plain and not return_lse:  # a decode token sees every key that was gathered
        out = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale)
        return out.reshape(1, heads, d), None
    scores = torch.bmm(q * scale, k.transpose(1, 2))  # [Hkv, G·n, L]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    positions = torch.arange(position, position + n, device=q.device)[:, None]
    key = torch.arange(seq_len, device=q.device)
    if alibi_slopes is not None:
        bias = alibi_slopes.view(-1, 1, 1) * (positions - key).abs()
        scores -= bias.view(kv_heads, -1, seq_len)
    if n > 1 and (causal or window_size is not None):
        visible = key <= positions if causal else torch.ones_like(key <= positions)
        if window_size is not None:
            visible &= key > positions - window_size
        scores.unflatten(1, (-1, n)).masked_fill_(~visible, -torch.inf)
    if sinks is not None:  # one more column, whose value is zero
        sink = sinks.float().view(kv_heads, -1, 1).expand(-1, -1, n).reshape(kv_heads, -1, 1)
        scores = torch.cat((scores, sink), -1)
    out = torch.bmm(scores.softmax(-1)[..., :seq_len], v).view(heads, n, d).transpose(0, 1)
    sums = scores.logsumexp(-1).view(heads, n).t() if return_lse else None
    return out, sums


def merge_attention_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    out = torch.zeros(out_a.shape, dtype=torch.float32, device=out_a.device)
    for part, part_lse in ((out_a, lse_a), (out_b, lse_b)):
        empty = part_lse == -torch.inf
        weight = torch.exp(part_lse - lse).masked_fill(empty, 0.0)
        out += weight[..., None] * part.float().masked_fill(empty[..., None], 0.0)
    return out.to(out_a.dtype), lse
