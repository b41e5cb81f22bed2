"""Routing: which experts a token goes to, and by which weights what they make of it is added up.

    scores = softmax(logits) or sigmoid(logits);  ids = top_k(scores + correction_bias);  weights = scores[ids]

Shazeer et al., "Outrageously large neural networks" (2017), https://arxiv.org/abs/1701.06538; groups of experts:
DeepSeek-V2 (2024), https://arxiv.org/abs/2405.04434; sigmoid and correction bias: DeepSeek-V3 (2024),
https://arxiv.org/abs/2412.19437.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.kernels.checks import (
    FLOATS,
    check_contiguous,
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    check_shape,
)
from octavo.kernels.launch import empty, launch
from octavo.kernels.moe.sort import MAX_EXPERTS
from octavo.kernels.registry import register
from octavo.kernels.replay import replayed
from octavo.kernels.tiles import cdiv, chains, let_next_start, next_power_of_2, wait_for_previous
from octavo.reference import moe as reference

SCORING_FUNCS = ("softmax", "sigmoid")


@dataclass(frozen=True)
class _Tiles:
    rows: int
    groups: int
    size: int
    """Of a group."""
    chosen: int


def choose_tiles(experts: int, groups: int, chosen: int) -> _Tiles:
    """What one warp does: a token, or as many as have 32 experts together.

    A warp finds the largest of what its threads hold in one instruction; half a warp takes four, and with several warps
    each of the top_k rounds would go through shared memory.
    """
    padded, size = next_power_of_2(groups), next_power_of_2(experts // groups)
    return _Tiles(max(32 // (padded * size), 1), padded, size, next_power_of_2(chosen))


ABSENT = tl.constexpr(-(2**31))
"""The key of what can't be chosen, below that of -inf."""


@triton.jit
def _key(x):
    """Integers in the order of the numbers, by which NaN is -inf and both zeros are one."""
    x = tl.where(x != x, float("-inf"), tl.where(x == 0.0, 0.0, x))
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _number(key):
    """What `_key` was made of."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _first_of(key, ids, best, AXIS: tl.constexpr):
    """The lowest id among those with the best key."""
    return tl.min(tl.where(key == best, ids, 0x7FFFFFFF), AXIS, keep_dims=True)


@triton.jit
def _best_of_all(key, ids):
    """The lowest id among those with a row's best key, `[ROWS, GROUPS, SIZE]` -> `[ROWS]`.

    An axis at a time: Triton 3.6 takes the wrong threads' numbers for the axis that a reshape makes of two. Groups
    first, which large ones have in registers.
    """
    best = tl.max(tl.max(key, 1), 1)[:, None, None]
    return tl.min(tl.min(tl.where(key == best, ids, 0x7FFFFFFF), 1), 1)


@triton.jit
def _without_groups(key, num_groups, topk_group, BY_TWO: tl.constexpr):
    """Keys `[ROWS, GROUPS, SIZE]`, with ABSENT where a group is not among the best topk_group.

    A group is as good as its best expert, or as the sum of its best two.
    """
    group = tl.arange(0, key.shape[1])[None, :, None]
    member = tl.arange(0, key.shape[2])[None, None, :]
    score = tl.max(key, 2, keep_dims=True)  # [ROWS, GROUPS, 1]
    if BY_TWO:
        rest = tl.where(member == _first_of(key, member, score, 2), ABSENT, key)
        second = tl.max(rest, 2, keep_dims=True)
        score = tl.where(second == ABSENT, score, _key(_number(score) + _number(second)))
    score = tl.where(group < num_groups, score, ABSENT)
    kept = group < tl.zeros_like(score)
    for _ in range(topk_group):
        chosen = group == _first_of(score, group, tl.max(score, 1, keep_dims=True), 1)
        kept |= chosen
        score = tl.where(chosen, ABSENT, score)
    return tl.where(kept, key, ABSENT)


@triton.jit(do_not_specialize=["tokens"])
def _route_kernel(
    # Bound by latency: top_k rounds of finding the largest of a token's logits, in one warp.
    weights_ptr,
    ids_ptr,
    logits_ptr,
    bias_ptr,
    tokens,
    num_groups,
    group_size,
    topk_group,
    top_k,
    num_shared,
    scaling_factor,
    stride_logits_token,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    CHOSEN: tl.constexpr,
    CHAINED: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    group = tl.arange(0, GROUPS)[:, None]
    member = tl.arange(0, SIZE)[None, :]
    id = group * group_size + member  # [GROUPS, SIZE]
    exists = (group < num_groups) & (member < group_size)
    # Rows past the last are the last again, and not stored.
    logits_ptr += tl.minimum(row, tokens - 1).to(tl.int64)[:, None] * stride_logits_token  # [ROWS, 1]
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    x = tl.load(logits_ptr[:, :, None] + id[None, :, :], mask=exists[None, :, :], other=float("-inf"))
    x = x.to(tl.float32)  # [ROWS, GROUPS, SIZE]
    wrong = tl.max(tl.max((x != x).to(tl.int32), 2), 1) != 0  # [ROWS]

    top = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if not SIGMOID and (bias_ptr is not None or not RENORMALIZE):
        top = tl.max(tl.max(x, 2), 1)
        total = tl.sum(tl.sum(tl.where(exists[None, :, :], tl.exp(x - top[:, None, None]), 0.0), 2), 1)
    choice = x
    if bias_ptr is not None:
        if SIGMOID:
            choice = 1 / (1 + tl.exp(-x))
        else:
            choice = tl.exp(x - top[:, None, None]) / total[:, None, None]
        choice += tl.load(bias_ptr + id, mask=exists, other=0.0)[None, :, :]
    key = tl.where(exists[None, :, :], _key(choice), ABSENT)
    if GROUPS > 1:
        key = _without_groups(key, num_groups, topk_group, bias_ptr is not None)

    place = tl.arange(0, CHOSEN)[None, :]
    chosen = (
        num_groups * group_size + place - top_k + tl.zeros([ROWS, CHOSEN], tl.int32)
    )  # past top_k, those that all tokens share
    for j in range(top_k):
        best = _best_of_all(key, id[None, :, :])  # [ROWS]
        chosen = tl.where(place == j, best[:, None], chosen)
        key = tl.where(id[None, :, :] == best[:, None, None], ABSENT, key)

    routed = place < top_k
    logit = tl.load(logits_ptr + chosen, mask=routed, other=float("-inf")).to(tl.float32)  # [ROWS, CHOSEN]
    if SIGMOID:
        weight = 1 / (1 + tl.exp(-logit))
        if RENORMALIZE:
            weight /= tl.sum(tl.where(routed, weight, 0.0), 1)[:, None] + 1e-20
    else:
        if RENORMALIZE:
            top = tl.max(logit, 1)
        weight = tl.exp(logit - top[:, None])
        if RENORMALIZE:
            total = tl.sum(tl.where(routed, weight, 0.0), 1)
        weight /= total[:, None]
    weight = tl.where(wrong[:, None], float("nan"), weight * scaling_factor)
    width = top_k + num_shared
    out = row.to(tl.int64)[:, None] * width + place
    mask = (row < tokens)[:, None] & (place < width)
    tl.store(weights_ptr + out, tl.where(routed, weight, 1.0), mask=mask)
    tl.store(ids_ptr + out, chosen, mask=mask)


def _moe_route_cuda(
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
    tokens, experts = router_logits.shape
    device, width = router_logits.device, top_k + num_shared_experts
    weights = empty((tokens, width), torch.float32, device)
    ids = empty((tokens, width), torch.int32, device)
    groups = num_expert_group or 1
    tiles = choose_tiles(experts, groups, width)
    launch(
        _route_kernel,
        (cdiv(tokens, tiles.rows),),
        weights,
        ids,
        router_logits,
        correction_bias,
        tokens,
        groups,
        experts // groups,
        topk_group or 1,
        top_k,
        num_shared_experts,
        routed_scaling_factor,
        router_logits.stride(0),
        device=device,
        num_warps=1,
        SIGMOID=scoring_func == "sigmoid",
        RENORMALIZE=renormalize,
        ROWS=tiles.rows,
        GROUPS=tiles.groups,
        SIZE=tiles.size,
        CHOSEN=tiles.chosen,
        CHAINED=chains(device),
    )
    return weights, ids


def _moe_route_fake(
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
    shape = router_logits.shape[0], top_k + num_shared_experts
    return router_logits.new_empty(shape, dtype=torch.float32), router_logits.new_empty(shape, dtype=torch.int32)


_moe_route = register(
    "moe_route(Tensor router_logits, int top_k, str scoring_func, bool renormalize, Tensor? correction_bias, "
    "int? num_expert_group, int? topk_group, float routed_scaling_factor, int num_shared_experts) -> (Tensor, Tensor)",
    reference=reference.moe_route,
    launcher=_moe_route_cuda,
    fake=_moe_route_fake,
)


def _check_groups(experts: int, top_k: int, num_expert_group: int | None, topk_group: int | None) -> None:
    if (num_expert_group is None) != (topk_group is None):
        raise ValueError(
            f"num_expert_group: {num_expert_group}, topk_group: {topk_group}; expected both, or neither for experts "
            "without groups"
        )
    if num_expert_group is None or topk_group is None:
        return
    if num_expert_group < 1 or experts % num_expert_group:
        raise ValueError(f"num_expert_group: {num_expert_group}; expected a divisor of the {experts} experts")
    if not 1 <= topk_group <= num_expert_group:
        raise ValueError(f"topk_group: {topk_group}; expected 1 to num_expert_group ({num_expert_group})")
    left = topk_group * (experts // num_expert_group)
    if top_k > left:
        raise ValueError(f"top_k: {top_k}; expected at most {left}, the experts of topk_group ({topk_group}) groups")


@replayed
def moe_route(
    router_logits: torch.Tensor,
    top_k: int,
    *,
    scoring_func: str = "softmax",
    renormalize: bool = True,
    correction_bias: torch.Tensor | None = None,
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    routed_scaling_factor: float = 1.0,
    num_shared_experts: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses the experts of each token, and their weights.

    `ids = top_k(score(logits) + correction_bias);  weights = score(logits)[ids] · routed_scaling_factor`

    Args:
        router_logits: `[tokens, experts]`, fp16, bf16 or fp32, up to 512 experts; last dimension contiguous, rows of
            any stride.
        top_k: how many experts a token has, beside the shared ones.
        scoring_func: "softmax", or "sigmoid" as in DeepSeek-V3.
        renormalize: whether the weights of a token are made to add up to routed_scaling_factor. With softmax that is
            the softmax of the chosen logits (Mixtral, Qwen3); without, the softmax of all comes first (Qwen2,
            DeepSeek-V2). Sigmoids are divided by their sum + 1e-20.
        correction_bias: `[experts]` fp32, contiguous: added to the scores where experts and groups are chosen, not to
            the weights.
        num_expert_group: into how many groups of neighbours the experts are divided, of which
        topk_group: that many have a token's experts: those whose best expert is best; with a correction_bias, those
            with the largest sum of their best two.
        routed_scaling_factor: what the weights are multiplied with in the end.
        num_shared_experts: experts that every token has besides: ids from `experts` on, weight 1, after the others.

    Returns:
        `topk_weights` `[tokens, top_k + num_shared_experts]` fp32, and `topk_ids`, of the same shape, int32. The best
        expert comes first, of equals (groups too) the lower id. Without a correction_bias logits are compared, which is
        exact; with one, scores in fp32.

        A row's ids are valid and distinct whatever its logits are: a NaN is chosen as -inf would be, and makes the
        row's routed weights NaN. So does +inf with softmax, as it makes softmax itself NaN.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: top_k larger than the number of experts (or of those in topk_group groups), groups that do not
            divide the experts, or a shape, stride or device that does not fit.

    One kernel; safe in a CUDA graph. A row's bits do not depend on the other rows. https://arxiv.org/abs/1701.06538,
    https://arxiv.org/abs/2405.04434, https://arxiv.org/abs/2412.19437
    """
    check_dtype("router_logits", router_logits, FLOATS)
    check_ndim("router_logits", router_logits, 2, "[tokens, experts]")
    check_last_dim_contiguous("router_logits", router_logits)
    experts = router_logits.shape[1]
    if not 1 <= experts <= MAX_EXPERTS:
        raise ValueError(f"router_logits: shape {tuple(router_logits.shape)}; expected 1 to {MAX_EXPERTS} experts")
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k: {top_k}; expected 1 to the number of experts ({experts})")
    if scoring_func not in SCORING_FUNCS:
        raise ValueError(f"scoring_func: {scoring_func!r}; expected one of {SCORING_FUNCS}")
    if correction_bias is not None:
        check_dtype("correction_bias", correction_bias, (torch.float32,))
        check_shape("correction_bias", correction_bias, (experts,), "[experts], as router_logits")
        check_contiguous("correction_bias", correction_bias)
        check_device("correction_bias", correction_bias, "router_logits", router_logits)
    _check_groups(experts, top_k, num_expert_group, topk_group)
    if num_shared_experts < 0:
        raise ValueError(f"num_shared_experts: {num_shared_experts}; expected a number of at least 0")
    return _moe_route(
        router_logits,
        top_k,
        scoring_func,
        renormalize,
        correction_bias,
        num_expert_group,
        topk_group,
        routed_scaling_factor,
        num_shared_experts,
    )
