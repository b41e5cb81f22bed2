"""octavo's attention in the models of transformers: `attn_implementation="octavo"`.

transformers asks twice: once in a forward pass for a mask, which every layer is given then, and in each layer for the
attention. What a mask says is found out at the first, which costs a few synchronisations with the host, so that layers
need none: see `_mask`. Keys and values are attended to where they lie if they are all used, or padding is on the left,
or a static cache is not full, or what has no causal order (an encoder, cross-attention) has padding on the right. They
are copied by every layer for other padding; without a cache, where a model lays out keys otherwise than values; and
under torch.compile for batches of more than one, but for a static cache that is not full and has no padding.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from octavo import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

# The functions that transformers makes masks of, where `flash_attn_func` has them all: causal, window_size, sequences.
PATTERNS = {
    "and_masks",
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
    "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence",
}


def register_transformers_attention(name: str = "octavo") -> None:
    """Lets models of transformers attend with octavo: `from_pretrained(…, attn_implementation=name)`.

    Also models that are there already: `model.set_attn_implementation(name)`. For inference, with dynamic and static
    caches, grouped heads, sliding windows, softcap, sinks, padding anywhere, and packed sequences (`position_ids` that
    begin anew, in a batch of one, or `cu_seq_lens_q` and its kin).

    Args:
        name: what the implementation is called.

    Raises:
        ModuleNotFoundError: transformers is not installed: pip install 'octavo[engine]'.

    Later, models raise ValueError for what octavo's attention can't do: dropout, masks of other patterns than causal
    and windows into the past (chunks, blocks, a window on both sides, position biases), head sizes of values that are
    not those of keys. Under torch.compile the graph breaks where a model makes its masks.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(name, _attention)
    # It depends on values; a break in the graph for each kind of mask, and none in the layers. Here and not as a
    # decorator, which would import torch's compiler for everyone who imports the engine: 0.9 s.
    AttentionMaskInterface.register(name, torch.compiler.disable(_mask))


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str | None = None,
    **others: Any,
) -> torch.Tensor | None:
    """What `_attention` has to know of a batch's padding and packing, beside causality and window, which it is told.

    Returns:
        None: nothing.
        `[batch]` int32: how many keys of padding each row begins with.
        `[1, sequences + 1]` int32: where packed sequences begin, cu_seqlens.
        `[1, 1, batch]` int32: how many keys each row has, where there is room for more; `[2, 1, batch]`: and with how
            many of padding it begins.
        `[batch, keys]` bool: which keys are none of padding; there may be fewer than the cache has room for.

    A model may be given what this returned (generation makes masks for a static cache beforehand), and asks again then.
    """
    parts = dict(_parts(mask_function))
    if not parts.keys() <= PATTERNS:
        unknown = ", ".join(sorted(parts.keys() - PATTERNS))
        raise ValueError(f"mask_function: made of {unknown}; expected a causal mask, with or without a sliding window")
    if "packed_sequence_mask_function" in parts:
        closure = parts["packed_sequence_mask_function"].__closure__
        numbers = next(cell.cell_contents for cell in closure)  # [batch, tokens], of each token's sequence
        begins = numbers[:, 1:] != numbers[:, :-1]
        if begins.any():
            if batch_size != 1:
                raise ValueError(f"position_ids: packed sequences in a batch of {batch_size}; expected a batch of 1")
            starts = torch.nn.functional.pad(begins[0].nonzero()[:, 0] + 1, (1, 0))
            return torch.nn.functional.pad(starts, (0, 1), value=q_length).int()[None]
    causal = mask_function is None or "causal_mask_function" in parts
    # A cache may have room for more; what is attended to without an order, such as an encoder's states, is all there.
    keys = min(int(q_offset) + q_length - kv_offset, kv_length) if causal else kv_length
    lengths = None
    if keys < kv_length:
        lengths = torch.full((1, 1, batch_size), keys, dtype=torch.int32, device=device)
    if attention_mask is None:
        return lengths
    if attention_mask.dim() != 2:
        return attention_mask
    mask = attention_mask[:, : kv_offset + keys].bool()
    mask = torch.nn.functional.pad(mask[:, max(mask.shape[1] - keys, 0) :], (0, max(keys - mask.shape[1], 0)))
    if mask.all():
        return lengths
    if (mask[:, 1:] >= mask[:, :-1]).all():
        padding = (~mask).sum(1, dtype=torch.int32)
        return padding if lengths is None else torch.cat((lengths, padding[None, None]))
    if not causal and (mask[:, 1:] <= mask[:, :-1]).all():
        return mask.sum(1, dtype=torch.int32)[None, None]
    return mask


def _parts(function: Callable[..., Any] | None) -> Iterator[tuple[str, Any]]:
    """The names of the functions that transformers made a mask function of, and what they returned."""
    if function is not None:
        yield getattr(function, "__qualname__", repr(function)).split(".")[0], function
        for cell in getattr(function, "__closure__", None) or ():
            inside = cell.cell_contents
            for part in inside if isinstance(inside, tuple) else (inside,):
                if callable(part) and not isinstance(part, torch.Tensor):
                    yield from _parts(part)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of `[batch, heads, tokens, head_size]` as a layer asks for it: `[batch, tokens, heads, head_size]`."""
    if dropout:
        raise ValueError(f"dropout: {dropout}; expected 0.0: octavo is for inference, call model.eval()")
    if position_bias is not None:
        raise ValueError(f"position_bias: shape {tuple(position_bias.shape)}; expected None")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    options: dict[str, Any] = dict(softmax_scale=scaling, causal=causal, softcap=softcap or 0.0, s_aux=s_aux)
    if s_aux is not None and s_aux.dtype != torch.float32:
        options["s_aux"] = s_aux.to(q.dtype)
    if sliding_window is not None and k.shape[1] > sliding_window:
        options["window_size"] = (sliding_window - 1, sliding_window - 1)  # causal leaves out the right side
    if attention_mask is not None and attention_mask.dim() == 2 and attention_mask.dtype == torch.int32:
        cu_seq_lens_q = cu_seq_lens_k = attention_mask[0]
        max_length_q, max_length_k = q.shape[1], k.shape[1]
    if cu_seq_lens_q is not None:
        q_rows, k_rows, v_rows = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        options |= dict(cu_seqlens_q=cu_seq_lens_q, max_seqlen_q=max_length_q)
        options |= dict(cu_seqlens_k=cu_seq_lens_k, max_seqlen_k=max_length_k)
        out = flash_attn_varlen_func(q_rows, k_rows, v_rows, **options)
        out = out.view(q.shape)
    elif attention_mask is None:
        out = flash_attn_func(q, k, v, **options)
    elif attention_mask.dim() == 1:
        out = flash_attn_with_kvcache(q, k, v, cache_leftpad=attention_mask, **options)
    elif attention_mask.dim() == 3 and attention_mask.dtype == torch.int32:
        padding = attention_mask[1, 0] if attention_mask.shape[0] == 2 else None
        out = flash_attn_with_kvcache(q, k, v, cache_seqlens=attention_mask[0, 0], cache_leftpad=padding, **options)
    elif attention_mask.dim() == 2:
        out = _of_padded(q, k, v, attention_mask.bool(), options)
    else:
        raise ValueError(f"attention_mask: shape {tuple(attention_mask.shape)}; expected [batch, keys], or None")
    return out, None


def _of_padded(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    """Attention where padding is anywhere: all of it is brought to the beginning.

    That copies, but needs no synchronisation with the host, as leaving the padding out would. Queries are moved too
    where they have an order: they are the last of the keys.
    """
    keys = mask.shape[1]

    def sorted_by(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        return x.take_along_dim(order[:, :, None, None], 1)

    order = mask.byte().argsort(stable=True, dim=1)
    k, v = sorted_by(k[:, :keys], order), sorted_by(v[:, :keys], order)
    padding = (~mask).sum(1, dtype=torch.int32)
    if not options["causal"]:
        return flash_attn_with_kvcache(q, k, v, cache_leftpad=padding, **options)
    of_queries = torch.nn.functional.pad(mask, (q.shape[1] - keys, 0))  # the mask's last, or more than it has
    order_of_queries = of_queries.byte().argsort(stable=True, dim=1)
    out = flash_attn_with_kvcache(sorted_by(q, order_of_queries), k, v, cache_leftpad=padding, **options)
    return sorted_by(out, order_of_queries.argsort(1))
