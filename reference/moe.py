"""Mixture of experts in plain torch: routing, sorting pairs of token and expert, products by expert, and all in one.

Products and sums are fp32 and rounded once at the end, but for what lies between the two products of an expert: it is
rounded to x's dtype, as every engine does.
"""

from itertools import pairwise

import torch

from octavo.reference.quant import dequantize_int4, dequantize_int8
from octavo.reference.quantize import quantize_rows
from octavo.reference.w8a8 import BLOCK


def moe_route(
    router_logits: torch.Tensor,
    top_k: int,
    scoring_func: str,
    renormalize: bool,
    correction_bias: torch.Tensor | None,
    num_expert_group: int | None,
    topk_group: int | None,
    routed_scaling_factor: float,
    num_shared_experts: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    x = router_logits.float()
    tokens, experts = x.shape
    scores = x.sigmoid() if scoring_func == "sigmoid" else x.softmax(-1)
    # Both rise with the logit, so that without a bias the logits choose, however the exponential rounds.
    choice = x if correction_bias is None else scores + correction_bias
    choice = choice.masked_fill(choice.isnan(), -torch.inf)
    order = choice.sort(dim=-1, descending=True, stable=True).indices
    if num_expert_group is not None and topk_group is not None:
        size = experts // num_expert_group
        groups = choice.view(tokens, num_expert_group, size)
        best = groups.amax(-1) if correction_bias is None else groups.topk(min(2, size)).values.sum(-1)
        best = best.masked_fill(best.isnan(), -torch.inf)
        kept = best.sort(dim=-1, descending=True, stable=True).indices[:, :topk_group]
        left_out = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False).repeat_interleave(size, 1)
        order = order.gather(1, left_out.gather(1, order).int().sort(dim=-1, stable=True).indices)
    ids = order[:, :top_k]
    if not renormalize:
        weights = scores.gather(1, ids)
    elif scoring_func == "sigmoid":
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    else:
        weights = x.gather(1, ids).softmax(-1)
    weights = (weights * routed_scaling_factor).masked_fill(x.isnan().any(-1, keepdim=True), torch.nan)
    shared = torch.arange(experts, experts + num_shared_experts, device=x.device).expand(tokens, -1)
    weights = torch.cat([weights, weights.new_ones(tokens, num_shared_experts)], 1)
    return weights, torch.cat([ids, shared], 1).int()


def sort_by_expert(
    topk_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = topk_ids.long()
    if expert_map is not None:
        known = (ids >= 0) & (ids < len(expert_map))
        ids = expert_map.long()[ids.where(known, 0)].where(known, -1)
    ids = ids.where((ids >= 0) & (ids < num_experts), num_experts).flatten()  # those of no expert here come last
    order = ids.argsort(stable=True)
    counts = torch.bincount(ids, minlength=num_experts + 1)[:num_experts]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    positions = torch.empty_like(order)
    positions[order] = torch.arange(len(order), device=order.device)
    positions = positions.where(ids < num_experts, -1).view(topk_ids.shape)
    return order.int(), offsets.int(), positions.int()


def moe_permute(
    x: torch.Tensor, topk_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    order, offsets, positions = sort_by_expert(topk_ids, num_experts, expert_map)
    permuted = x[order.long() // topk_ids.shape[1]]
    permuted[int(offsets[-1]) :].zero_()
    return permuted, offsets, positions


def moe_unpermute(y: torch.Tensor, positions: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(len(positions), y.shape[1], dtype=torch.float32, device=y.device)
    for at, weight in zip(positions.long().unbind(1), topk_weights.unbind(1), strict=True):
        here = (at >= 0).nonzero()[:, 0]
        out[here] += weight[here, None] * y[at[here]].float()
    return out.to(y.dtype)


def _products(
    x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """fp32 `[S, N]`: each row times the weight of its expert."""
    out = torch.zeros(len(x), weight.shape[1], dtype=torch.float32, device=x.device)
    ends = offsets.clamp(0, len(x)).tolist()
    for expert, (start, end) in enumerate(pairwise(ends)):
        if start < end:
            out[start:end] = x[start:end].float() @ weight[expert].float().t()
            if bias is not None:
                out[start:end] += bias[expert].float()
    return out


def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    if scale is not None:
        weight = torch.stack([dequantize_int8(w, s, w.shape[1] // len(s)) for w, s in zip(weight, scale, strict=True)])
    return _products(x, weight, offsets, bias).to(x.dtype)


def _quantized_products(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """Of rows that are quantised as the weights are; sums of integers are exact."""
    if scale.dim() == 3:  # of blocks: sums are not of integers then
        q, x_scale = quantize_rows(x, weight.dtype, None, BLOCK)
        scale = scale.repeat_interleave(BLOCK, 1)[:, : weight.shape[1]].repeat_interleave(BLOCK, 2)
        return _products(q.float() * x_scale.repeat_interleave(BLOCK, 1), weight.float() * scale, offsets)
    q, x_scale = quantize_rows(x, weight.dtype, None, None)
    out = torch.zeros(len(x), weight.shape[1], dtype=torch.float32, device=x.device)
    for expert, (start, end) in enumerate(pairwise(offsets.tolist())):
        sums = q[start:end].double() @ weight[expert].double().t()
        out[start:end] = sums.float() * x_scale[start:end] * scale[expert]
    return out


def fused_moe(
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
    rows, offsets, positions = moe_permute(x, topk_ids, len(w1), expert_map)

    def products(
        rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, minimum: torch.Tensor | None
    ) -> torch.Tensor:
        if scale is None:
            return _products(rows, weight, offsets)
        if weight.dtype != torch.int16 and not weights_only:
            return _quantized_products(rows, weight, scale, offsets)
        size = rows.shape[1] // scale.shape[1]
        if weight.dtype == torch.int8:
            dense = [dequantize_int8(w, s, size) for w, s in zip(weight, scale, strict=True)]
        else:
            minima = [None] * len(scale) if minimum is None else minimum
            dense = [dequantize_int4(w, s, m, size) for w, s, m in zip(weight, scale, minima, strict=True)]
        return _products(rows, torch.stack(dense), offsets)

    gate, up = products(rows, w1, w1_scale, w1_minimum).chunk(2, -1)
    hidden = (torch.nn.functional.silu(gate) * up).to(x.dtype)
    return moe_unpermute(products(hidden, w2, w2_scale, w2_minimum), positions, topk_weights).to(x.dtype)
