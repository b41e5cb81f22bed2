"""A call of `octavo.paged_attention` as its op takes it, for tests that call the op or its reference."""

TENSORS = ("query", "key_cache", "value_cache", "block_table", "seq_lens", "cu_seqlens_q")
EXTRAS = ("k_scale", "v_scale", "key_scale_cache", "value_scale_cache", "sinks", "alibi_slopes")


def op_args(
    args,
    max_seqlen_q,
    scale=None,
    causal=True,
    window_size=None,
    softcap=0.0,
    return_lse=False,
    rolling=False,
    batch_invariant=False,
    plan=None,
    **options,
):
    """A call's arguments as the op itself takes them, all of them and in order."""
    scale = args["query"].shape[2] ** -0.5 if scale is None else scale
    given = args | options
    numbers = max_seqlen_q, scale, causal, window_size, softcap, return_lse
    flags = rolling, batch_invariant, plan
    return *(given[name] for name in TENSORS), *numbers, *(given.get(name) for name in EXTRAS), *flags
