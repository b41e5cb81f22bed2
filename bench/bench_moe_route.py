"""A mixture's router: bound by latency, top_k rounds of finding the largest of a token's logits.

Without groups, softmax and renormalised weights (Mixtral, Qwen3); a shape's `groups` are DeepSeek-V3's: sigmoid, a
correction bias, the better half of the groups.
"""

from collections.abc import Callable
from typing import Any

import torch

import octavo
from octavo.bench import experts
from octavo.bench.harness import Inputs, Provider, Shape
from octavo.bench.providers import compiled
from octavo.bench.shapes import DEEPSEEK_V3, TOKENS

OP = "moe_route"
DTYPES = (torch.bfloat16,)
FACTOR = 2.5


def shapes() -> list[Shape]:
    routers = [(m.experts, m.experts_per_token, 0) for m in experts.LAYERS]
    routers.append((DEEPSEEK_V3.experts, DEEPSEEK_V3.experts_per_token, 8))
    return [{"T": t, "E": e, "top_k": k, "groups": groups} for e, k, groups in routers for t in TOKENS]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    """A bias moves an expert by a few places; scores with it are a few thousand numbers, hardly two of them alike."""
    logits = experts.draw_logits(shape, dtype, device, generator)
    steps = torch.randint(-4, 4, (shape["E"],), generator=generator, device=device)
    return {"logits": logits, "bias": (2 * steps + 1) / 128, "top_k": shape["top_k"], "groups": shape["groups"]}


def exact(inputs: Inputs) -> torch.Tensor:
    """The weight of every expert `[tokens, experts]`, 0 of those that are not chosen."""
    logits = inputs["logits"].double()
    if inputs["groups"]:
        weights, ids = _in_groups(logits, inputs["bias"].double(), inputs["top_k"], inputs["groups"])
    else:
        weights, ids = _plain(logits, inputs["top_k"])
    return torch.zeros_like(logits).scatter_(1, ids, weights)


def observe(result: tuple[torch.Tensor, torch.Tensor], inputs: Inputs) -> torch.Tensor:
    """The same of a provider, in whatever order it has the experts; what is chosen twice, or is none, shows."""
    weights, ids = result[0], result[1].long()
    valid = (ids >= 0) & (ids < inputs["logits"].shape[1])
    table = torch.zeros(inputs["logits"].shape, dtype=weights.dtype, device=weights.device)
    return table.scatter_add_(1, ids.where(valid, 0), weights.where(valid, torch.nan))


def flops(shape: Shape) -> int:
    """A comparison of each logit a round."""
    return shape["T"] * shape["E"] * shape["top_k"]


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    """Logits in, a weight and an id out; a bias."""
    bias = 4 * shape["E"] if shape["groups"] else 0
    return shape["T"] * (shape["E"] * dtype.itemsize + 8 * shape["top_k"]) + bias


def _plain(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = logits.topk(top_k, -1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return chosen.values.softmax(-1, dtype=wide), chosen.indices


def _in_groups(logits: torch.Tensor, bias: torch.Tensor, top_k: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
    choice = scores + bias
    of_group = choice.unflatten(-1, (groups, -1)).topk(2, -1).values.sum(-1)
    kept = torch.zeros_like(of_group).scatter_(1, of_group.topk(groups // 2, -1).indices, 1.0)
    choice = choice.masked_fill(kept.repeat_interleave(logits.shape[1] // groups, 1) == 0, -torch.inf)
    ids = choice.topk(top_k, -1).indices
    weights = scores.gather(1, ids)
    return weights / weights.sum(-1, keepdim=True) * FACTOR, ids


def _octavo(inputs: Inputs) -> Callable[[], Any]:
    logits, bias, top_k, groups = (inputs[name] for name in ("logits", "bias", "top_k", "groups"))
    if not groups:
        return lambda: octavo.moe_route(logits, top_k)
    return lambda: octavo.moe_route(
        logits,
        top_k,
        scoring_func="sigmoid",
        correction_bias=bias,
        num_expert_group=groups,
        topk_group=groups // 2,
        routed_scaling_factor=FACTOR,
    )


def _formula(inputs: Inputs) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    logits, bias, top_k, groups = (inputs[name] for name in ("logits", "bias", "top_k", "groups"))
    return (_in_groups, (logits, bias, top_k, groups)) if groups else (_plain, (logits, top_k))


def _torch(inputs: Inputs) -> Callable[[], Any]:
    function, args = _formula(inputs)
    return lambda: function(*args)


def _compiled(inputs: Inputs) -> Callable[[], Any]:
    function, args = _formula(inputs)
    return compiled(function, *args)


def _vllm(inputs: Inputs) -> Callable[[], Any]:
    logits, bias, top_k, groups = (inputs[name] for name in ("logits", "bias", "top_k", "groups"))
    if groups:
        import vllm._custom_ops as ops

        return lambda: ops.grouped_topk(logits, groups, groups // 2, top_k, True, FACTOR, bias, 1)
    from vllm.model_executor.layers.fused_moe import fused_topk

    x = logits  # of which it wants to know the number of tokens
    return lambda: fused_topk(x, logits, top_k, renormalize=True)[:2]


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch": Provider(_torch, devices=("cpu", "cuda"), package="torch"),
    "torch.compile": Provider(_compiled, package="torch"),
    "vllm": Provider(_vllm, "vllm", package="vllm"),
}
