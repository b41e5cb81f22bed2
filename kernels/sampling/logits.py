"""A row's settings, and its logits as sampling sees them: bias, penalties and mask applied while they are loaded.

The edited logits are computed anew wherever they are needed. Writing them down would cost 4 bytes a token; what they
are computed from is 1/8 byte a token for a mask and 2 or 4 for the counts of penalties.
"""

import triton
import triton.language as tl

GREEDY_BELOW = tl.constexpr(1e-5)
STAGES = tl.constexpr(3)  # tiles of a loop over them that are on their way while one is computed
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def setting(ptr, row, DEFAULT: tl.constexpr):
    """A row's entry as fp32, or the default where nothing was given."""
    if ptr is None:
        return tl.full([], DEFAULT, tl.float32)
    else:
        return tl.load(ptr + row).to(tl.float32)


@triton.jit
def top_k_setting(top_k_ptr, row, V):
    """How many tokens top-k keeps; 0 where it keeps all."""
    if top_k_ptr is None:
        return tl.full([], 0, tl.int32)
    else:
        k = tl.load(top_k_ptr + row)
        return tl.where((k > 0) & (k < V), k, 0)


@triton.jit
def temperature_setting(temperature_ptr, seeds_ptr, row):
    """The row's temperature, whether it is greedy, and what its logits are multiplied with."""
    temperature = setting(temperature_ptr, row, 1.0)
    if seeds_ptr is None:
        greedy = temperature == temperature
    else:
        greedy = temperature < GREEDY_BELOW
    # A temperature that is negative (greedy here) or NaN makes the row's result -1, whatever is computed meanwhile.
    return temperature, greedy, tl.where(greedy, 1.0, tl.div_rn(1.0, tl.where(greedy, 1.0, temperature)))


@triton.jit
def load_raw(logits_ptr, row, token, V, stride_logits_row):
    """The model's own logits as fp32, -inf beyond the vocabulary."""
    return tl.load(logits_ptr + row.to(tl.int64) * stride_logits_row + token, mask=token < V, other=-float("inf")).to(
        tl.float32
    )


@triton.jit
def _is_set(mask_ptr, row, token, known, stride_mask_row):
    words = tl.load(mask_ptr + row.to(tl.int64) * stride_mask_row + (token >> 5), mask=known, other=0)
    return ((words >> (token & 31)) & 1) != 0


@triton.jit
def edit(x, row, token, first, last, V, edits):
    """Bias, then penalties, then the mask, in vLLM's order; `first` ≤ token < `last`."""
    (
        repetition_ptr,
        presence_ptr,
        frequency_ptr,
        counts_ptr,
        prompt_ptr,
        bias_ids_ptr,
        bias_values_ptr,
        allowed_ptr,
        biases,
        stride_counts_row,
        stride_prompt_row,
        stride_bias_ids_row,
        stride_bias_values_row,
        stride_allowed_row,
    ) = edits
    if bias_ids_ptr is not None:
        bias_ids_ptr += row.to(tl.int64) * stride_bias_ids_row
        bias_values_ptr += row.to(tl.int64) * stride_bias_values_row
        for i in range(biases):
            biased = tl.load(bias_ids_ptr + i)
            if (biased >= first) & (biased < last):
                x = tl.where(token == biased, x + tl.load(bias_values_ptr + i).to(tl.float32), x)
    if counts_ptr is not None:
        repetition = setting(repetition_ptr, row, 1.0)
        presence = setting(presence_ptr, row, 0.0)
        frequency = setting(frequency_ptr, row, 0.0)
        # Where all of them are off, nothing is read, and nothing changes. Not a branch: that would end the prefetching
        # of a loop around this.
        on = tl.where((repetition != 1.0) | (presence != 0.0) | (frequency != 0.0), 1, 0)
        known = (token < V) & (on == 1)  # an integer between: the interpreter can't spread a comparison of floats
        counts = tl.load(counts_ptr + row.to(tl.int64) * stride_counts_row + token, mask=known, other=0)
        if repetition_ptr is not None:
            seen = counts > 0
            if prompt_ptr is not None:
                seen = seen | _is_set(prompt_ptr, row, token, known, stride_prompt_row)
            x = tl.where(seen, tl.where(x > 0.0, x * tl.div_rn(1.0, repetition), x * repetition), x)
        x = x - frequency * counts.to(tl.float32)
        x = x - tl.where(counts > 0, presence, 0.0)
    if allowed_ptr is not None:
        # A NaN stays one: it is to be reported, not masked.
        x = tl.where(_is_set(allowed_ptr, row, token, token < V, stride_allowed_row) | (x != x), x, -float("inf"))
    return x
