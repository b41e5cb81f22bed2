"""A layer of experts in one call: rows sorted by expert, two products by experts with SiLU × gate between, the sum.

    y[t] = Σⱼ weights[t, j] · w2[e] · (silu(w1[e][:I] · x[t]) · (w1[e][I:] · x[t])),    e = topk_ids[t, j]

With few pairs of a token and an expert four kernels: one that sorts, gathers rows and describes tiles; the products,
gate and up in one; and the weighted sum. With more pairs sorting is one of its own, or three. Weights of 8 bits take
two more, which quantise tokens, and what lies between the products, by row; in blocks, with many rows, the first
product does the latter itself (4096 tokens of Mixtral: 3019 µs on an H100 for 3099). What an expert makes of a row is
added up in the order of a token's experts, without atomics, so that results have the same bits each time.
https://arxiv.org/abs/2401.04088 (Mixtral)
"""

import torch

from octavo.kernels.checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    check_shape,
)
from octavo.kernels.launch import empty
from octavo.kernels.moe.arrange import MOST_PAIRS, arrange
from octavo.kernels.moe.combine import combine
from octavo.kernels.moe.fused_moe_check import BYTES, check_weights
from octavo.kernels.moe.grouped import grouped, may_copy
from octavo.kernels.moe.grouped_linear import most_rows
from octavo.kernels.moe.grouped_tiles import (
    Scales,
    Tiles,
    choose_int4,
    choose_int8,
    choose_tiles,
    rows_of,
    rows_of_plain,
    rows_of_tall,
)
from octavo.kernels.moe.schedule import gather_and_plan
from octavo.kernels.moe.sort import check_pairs, sort_by_expert
from octavo.kernels.quant.int4_tiles import groups_of_step
from octavo.kernels.quant.quantize import _quantize_cuda
from octavo.kernels.quant.rounding import check_supported
from octavo.kernels.registry import register
from octavo.kernels.replay import replayed
from octavo.kernels.tiles import device_properties, next_power_of_2
from octavo.reference import moe as reference
from octavo.reference.w8a8 import BLOCK


def _intermediate(w2: torch.Tensor, w1_scale: torch.Tensor | None) -> int:
    """How many numbers lie between the products; the packed inputs of int4 weights do not tell."""
    return w1_scale.shape[-1] // 2 if w2.dtype == torch.int16 and w1_scale is not None else w2.shape[-1]


def _choose(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    pairs: int,
    intermediate: int,
    w1_scale: torch.Tensor | None,
    w2_scale: torch.Tensor | None,
    weights_only: bool,
    with_minimum: bool,
) -> tuple[int, Tiles, Tiles]:
    """Rows of a tile, and the tiles of both products."""
    properties, experts, hidden = device_properties(x.device), w1.shape[0], x.shape[1]
    up, down = (pairs, experts, 2 * intermediate, hidden), (pairs, experts, hidden, intermediate)
    if weights_only and w1_scale is not None and w2_scale is not None:
        copied = may_copy(properties, w1, w2) and x.dtype != torch.float32
        sizes = hidden // w1_scale.shape[1], intermediate // w2_scale.shape[1]
        most = most_rows(copied, (hidden, sizes[0]), (intermediate, sizes[1]))
        tile = rows_of(pairs, experts, copied=copied, most=most)
        itemsize, (of_up, of_down) = x.element_size(), sizes
        first = choose_int8(*up, tile, properties, gated=True, copied=copied, itemsize=itemsize, group_size=of_up)
        second = choose_int8(*down, tile, properties, gated=False, copied=copied, itemsize=itemsize, group_size=of_down)
        return tile, first, second
    if w1.dtype == torch.int16 and w1_scale is not None and w2_scale is not None:
        copied = may_copy(properties, w1, w2) and x.dtype != torch.float32 and intermediate % 64 == 0
        # Scales of four groups a step take registers, and so do minima.
        sizes = hidden // w1_scale.shape[1], intermediate // w2_scale.shape[1]
        most = 64 if copied and not with_minimum and max(map(groups_of_step, sizes)) <= 2 else 32
        most = 16 if with_minimum and x.dtype == torch.float32 else most
        tile = rows_of(pairs, experts, copied=copied, most=most)
        if copied:
            tile = rows_of_tall(pairs, experts, packed=True) or tile
        first = choose_int4(*up, tile, properties, gated=True, copied=copied)
        return tile, first, choose_int4(*down, tile, properties, gated=False, copied=copied)
    copied, blocks, itemsize = may_copy(properties, w1, w2), _in_blocks(w1, w1_scale), w1.element_size()
    tile = rows_of_plain(pairs, experts, copied=copied, blocks=blocks)
    first = choose_tiles(*up, tile, properties, gated=True, copied=copied, itemsize=itemsize, blocks=blocks)
    second = choose_tiles(*down, tile, properties, gated=False, copied=copied, itemsize=itemsize, blocks=blocks)
    return tile, first, second


def _in_blocks(weight: torch.Tensor, scale: torch.Tensor | None) -> bool:
    """Whether there is a scale for each 128 × 128 weights."""
    return weight.dtype in BYTES and scale is not None and scale.dim() == 3


def _fused_moe_cuda(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    w1_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
    w1_minimum: torch.Tensor | None = None,
    w2_minimum: torch.Tensor | None = None,
    weights_only: bool = False,
) -> torch.Tensor:
    (tokens, hidden), (_, top_k) = x.shape, topk_ids.shape
    out = empty((tokens, hidden), x.dtype, x.device)
    pairs, experts = tokens * top_k, w1.shape[0]
    if pairs == 0:  # a launch that starts nothing, for `octavo.kernels.replay` to repeat
        combine(out, empty((1, 0, hidden), x.dtype, x.device), topk_ids, topk_weights)
        return out
    intermediate = _intermediate(w2, w1_scale)
    likely = next_power_of_2(tokens) * top_k  # choices change at powers of two tokens, so that a warm-up meets all
    with_minimum = w1_minimum is not None or w2_minimum is not None
    sizes = likely, intermediate, w1_scale, w2_scale
    tile, first, second = _choose(x, w1, w2, *sizes, weights_only and w1.dtype == torch.int8, with_minimum)
    x_scale = between_scale = None
    quantized = w1.dtype in BYTES and not weights_only
    if quantized:
        check_supported("w1", w1.dtype, x.device, "quantise to int8")
        granularity = "group" if _in_blocks(w1, w1_scale) else "token"
        x, x_scale = _quantize_cuda(x, None, granularity, BLOCK, w1.dtype)
    if likely <= MOST_PAIRS:
        plan_of = tile, first.tail, likely
        rows, row_scales, plan, positions = arrange(x, topk_ids, experts, expert_map, *plan_of, x_scale)
    else:
        order, offsets, positions = sort_by_expert(topk_ids, experts, expert_map)
        rows, row_scales, plan = gather_and_plan(x, order, offsets, top_k, tile, first.tail, x_scale)
    fused = quantized and granularity == "group" and first.kernel == "many"
    between = empty((pairs, intermediate), w2.dtype if fused else out.dtype, x.device)
    if fused:
        between_scale = empty((pairs, intermediate // BLOCK), torch.float32, x.device)
    scales = Scales(row_scales, w1_scale, w1_minimum)
    grouped(between, rows, w1, None, plan, first, gated=True, scales=scales, out_scale=between_scale)
    if quantized and not fused:
        between, between_scale = _quantize_cuda(between, None, granularity, BLOCK, w2.dtype)
    parts = empty((second.parts, pairs, hidden), second.parts_dtype(out.dtype), x.device)
    scales = Scales(between_scale, w2_scale, w2_minimum)
    grouped(parts, between, w2, None, plan, second, gated=False, scales=scales, planned_before=True)
    combine(out, parts, positions, topk_weights)
    return out


def _fused_moe_fake(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    w1_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
    w1_minimum: torch.Tensor | None = None,
    w2_minimum: torch.Tensor | None = None,
    weights_only: bool = False,
) -> torch.Tensor:
    return x.new_empty(x.shape)


_fused_moe = register(
    "fused_moe(Tensor x, Tensor w1, Tensor w2, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, "
    "Tensor? w1_scale=None, Tensor? w2_scale=None, Tensor? w1_minimum=None, Tensor? w2_minimum=None, "
    "bool weights_only=False) -> Tensor",
    reference=reference.fused_moe,
    launcher=_fused_moe_cuda,
    fake=_fused_moe_fake,
)


@replayed
def fused_moe(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    w1_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
    w1_minimum: torch.Tensor | None = None,
    w2_minimum: torch.Tensor | None = None,
    weights_only: bool = False,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """Feed-forward layer of a mixture of experts: each token's weighted sum of what its experts make of it.

    `y[t] = Σⱼ topk_weights[t, j] · w2[e] · (silu(w1[e][:I] · x[t]) · (w1[e][I:] · x[t]))` with `e = topk_ids[t, j]`

    Args:
        x: `[T, H]`, fp16, bf16 or fp32; last dimension contiguous.
        w1: `[E, 2 · I, H]`, x's dtype, int8 or float8_e4m3fn, contiguous: of each expert the rows of gate, then those
            of up. E: 1 to 512. Or int4: `[E, ceil(2 · I / 64), ceil(H / 128), 64, 32]`, int16, what `octavo.int4_pack`
            makes of each expert's.
        w2: `[E, H, I]`, w1's dtype, contiguous; or int4: `[E, ceil(H / 64), ceil(I / 128), 64, 32]`.
        topk_weights: `[T, k]`, fp32, last dimension contiguous, as `octavo.moe_route` returns them.
        topk_ids: `[T, k]`, int32 or int64, last dimension contiguous; -1 for none. Ids out of range are left out, too,
            and an error under `OCTAVO_DEBUG=1` alone (`octavo.kernels.debug`).
        w1_scale: None beside weights of x's dtype. Beside int8 or float8_e4m3fn `[E, 2 · I]`, a scale an output, or
            `[E]`, one an expert; fp32, contiguous: then x is quantised too, by token, and so is what lies between the
            products. Beside float8_e4m3fn also `[E, ceil(2 · I / 128), H / 128]`, one for 128 × 128 weights: then by
            groups of 128. Beside int4, and int8 with `weights_only`, `[E, H / group size, 2 · I]`, fp16, bf16 or fp32,
            contiguous, with groups of a multiple of 32 inputs, up to all: `w = (q - 8) · scale`, as in
            `octavo.int4_linear`, and `w = q · scale`, as in `octavo.int8_linear`.
        w2_scale: the same of w2: `[E, H]`, `[E]`, or `[E, ceil(H / 128), I / 128]`; `[E, I / group size, H]`.
        w1_minimum: None, or beside int4 the value of q = 0, of w1_scale's shape, fp16, bf16 or fp32, contiguous:
            `w = q · scale + minimum`; −zero · scale for a zero point.
        w2_minimum: the same of w2; one may be None.
        weights_only: whether int8 weights stand beside x as it is (W8A16), with scales by groups, instead of x being
            quantised too (W8A8). int4 weights always do.
        expert_map: None, or `[all experts]`, int32, contiguous: the number on this device (of E) of each expert that
            topk_ids may name, or -1 for one that is elsewhere, whose share is left out (expert parallelism).

    Returns:
        `[T, H]`, contiguous, in x's dtype. Sums are fp32; what lies between the two products is rounded to x's dtype
        (not where the first quantises it), and with many tokens so is what each expert makes of one. Weights of 4 bits
        and those alone of 8 are not rounded, but in Hopper's kernel, to x's dtype, with minima, groups that are no
        multiple of 128, or many rows.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, stride or device that does not fit.

    Safe in a CUDA graph, whatever the ids are when it is replayed. Deterministic; a token's bits may depend on how many
    other tokens there are. https://arxiv.org/abs/2401.04088
    """
    check_dtype("x", x, FLOATS)
    check_ndim("x", x, 2, "[tokens, hidden]")
    check_last_dim_contiguous("x", x)
    hidden = x.shape[1]
    if hidden == 0:
        raise ValueError(f"x: shape {tuple(x.shape)}; expected at least one element a token")
    check_dtype("w1", w1, (x.dtype, *BYTES, torch.int16))
    check_device("w1", w1, "x", x)
    experts = w1.shape[0] if w1.dim() else 0
    check_weights(x, w1, w2, w1_scale, w2_scale, w1_minimum, w2_minimum, weights_only)
    check_pairs(topk_ids, x, experts, expert_map)
    check_dtype("topk_weights", topk_weights, (torch.float32,))
    check_shape("topk_weights", topk_weights, topk_ids.shape, "[tokens, top_k], as topk_ids")
    check_last_dim_contiguous("topk_weights", topk_weights)
    check_device("topk_weights", topk_weights, "x", x)
    scales = w1_scale, w2_scale, w1_minimum, w2_minimum
    return _fused_moe(x, w1, w2, topk_weights, topk_ids, expert_map, *scales, weights_only)
