"""A layer of experts in one call: rows sorted by expert, two products by experts with SiLU × gate between, the sum.

    y[t] = Σⱼ weights[t, j] · w2[e] · (silu(w1[e][:I] · x[t]) · (w1[e][I:] · x[t])),    e = topk_ids[t, j]

Five kernels: `sort_by_expert`, which has three where there are many pairs of a token and an expert; one that gathers
rows and describes tiles; the products, gate and up in one; and the weighted sum. What an expert makes of a row is added
up in the order of a token's experts, without atomics, so that results have the same bits each time.
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
from octavo.kernels.moe.combine import combine
from octavo.kernels.moe.grouped import grouped, may_copy
from octavo.kernels.moe.grouped_linear import check_weight
from octavo.kernels.moe.grouped_tiles import choose_tiles, rows_of
from octavo.kernels.moe.schedule import gather_and_plan
from octavo.kernels.moe.sort import check_pairs, sort_by_expert
from octavo.kernels.registry import register
from octavo.kernels.replay import replayed
from octavo.kernels.tiles import device_properties
from octavo.reference import moe as reference


def _fused_moe_cuda(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
) -> torch.Tensor:
    (tokens, hidden), (experts, _, intermediate), top_k = x.shape, w2.shape, topk_ids.shape[1]
    out = empty((tokens, hidden), x.dtype, x.device)
    pairs = tokens * top_k
    if pairs == 0:
        return out
    properties = device_properties(x.device)
    copied = may_copy(properties, w1, w2)
    tile = rows_of(pairs, experts, copied=copied)
    itemsize = x.element_size()
    sizes = pairs, experts, 2 * intermediate, hidden, tile, properties
    first = choose_tiles(*sizes, gated=True, copied=copied, itemsize=itemsize)
    sizes = pairs, experts, hidden, intermediate, tile, properties
    second = choose_tiles(*sizes, gated=False, copied=copied, itemsize=itemsize)
    order, offsets, positions = sort_by_expert(topk_ids, experts, expert_map)
    rows, plan = gather_and_plan(x, order, offsets, top_k, tile)
    between = empty((pairs, intermediate), x.dtype, x.device)
    grouped(between, rows, w1, None, plan, first, gated=True)
    parts = empty((second.parts, pairs, hidden), second.parts_dtype(x.dtype), x.device)
    grouped(parts, between, w2, None, plan, second, gated=False, planned_before=True)
    combine(out, parts, positions, topk_weights)
    return out


def _fused_moe_fake(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty(x.shape)


_fused_moe = register(
    "fused_moe(Tensor x, Tensor w1, Tensor w2, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map) -> Tensor",
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
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """Feed-forward layer of a mixture of experts: each token's weighted sum of what its experts make of it.

    `y[t] = Σⱼ topk_weights[t, j] · w2[e] · (silu(w1[e][:I] · x[t]) · (w1[e][I:] · x[t]))` with `e = topk_ids[t, j]`

    Args:
        x: `[T, H]`, fp16, bf16 or fp32; last dimension contiguous.
        w1: `[E, 2 · I, H]`, x's dtype, contiguous: of each expert the rows of gate, then those of up. E: 1 to 512.
        w2: `[E, H, I]`, x's dtype, contiguous.
        topk_weights: `[T, k]`, fp32, last dimension contiguous, as `octavo.moe_route` returns them.
        topk_ids: `[T, k]`, int32 or int64, last dimension contiguous. Ids out of range are left out.
        expert_map: None, or `[all experts]`, int32, contiguous: the number on this device (of E) of each expert that
            topk_ids may name, or -1 for one that is elsewhere, whose share is left out (expert parallelism).

    Returns:
        `[T, H]`, contiguous, in x's dtype. Sums are fp32; what lies between the two products is rounded to x's dtype,
        and with many tokens so is what each expert makes of one.

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
    check_weight("w2", w2, x, "[experts, hidden, intermediate]")
    experts, _, intermediate = w2.shape
    check_shape("w2", w2, (experts, hidden, intermediate), "[experts, hidden, intermediate], hidden as in x")
    if intermediate == 0:
        raise ValueError(f"w2: shape {tuple(w2.shape)}; expected at least one intermediate element")
    check_weight("w1", w1, x, "[experts, gate and up, hidden]")
    check_shape("w1", w1, (experts, 2 * intermediate, hidden), "[experts, gate and up, hidden], as w2")
    check_pairs(topk_ids, x, experts, expert_map)
    check_dtype("topk_weights", topk_weights, (torch.float32,))
    check_shape("topk_weights", topk_weights, topk_ids.shape, "[tokens, top_k], as topk_ids")
    check_last_dim_contiguous("topk_weights", topk_weights)
    check_device("topk_weights", topk_weights, "x", x)
    return _fused_moe(x, w1, w2, topk_weights, topk_ids, expert_map)
