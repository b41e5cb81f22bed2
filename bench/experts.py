"""What the benchmarks of mixtures of experts share: shapes, routing, sorting by expert, the exact product by expert.

Logits of a token are all different, so that the same experts are right for everybody, in whatever order. A shape's
`busy` experts are those that tokens may go to: as many as there are, all but one, or as many as each token has, so that
all tokens go to the same ones.
"""

from collections.abc import Callable, Sequence

import torch

from octavo.bench.harness import Shape
from octavo.bench.providers import full_fp32, wide_dtype
from octavo.bench.shapes import DEEPSEEK_V2_LITE, MIXTRAL_8X7B, MOE_TOKENS, QWEN3_30B_A3B, Model

LAYERS = (MIXTRAL_8X7B, DEEPSEEK_V2_LITE, QWEN3_30B_A3B)
UNEVEN_TOKENS = (16, 256, 4096)


def layers() -> list[Shape]:
    """Layers of experts at every number of tokens, at some of them with uneven routing."""
    even = [(model, tokens, model.experts) for model in LAYERS for tokens in MOE_TOKENS]
    uneven = [
        (model, tokens, busy)
        for model in LAYERS
        for busy in (model.experts_per_token, model.experts - 1)
        for tokens in UNEVEN_TOKENS
    ]
    return [
        {"T": tokens, "E": m.experts, "busy": busy, "top_k": m.experts_per_token}
        | {"hidden": m.hidden, "intermediate": m.intermediate}
        for m, tokens, busy in even + uneven
    ]


def rows_of(models: Sequence[Model], tokens: Sequence[int]) -> list[Shape]:
    """Tokens that each go to some experts, as they are sorted and brought back."""
    sizes = [{"E": m.experts, "top_k": m.experts_per_token, "hidden": m.hidden} for m in models]
    return [{"T": count} | size for size in sizes for count in tokens]


def draw_logits(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """`[tokens, experts]`: in each row multiples of 1/128 that bf16 holds, in any order, times a power of two."""
    order = torch.rand(shape["T"], shape["E"], generator=generator, device=device).argsort(-1)
    scale = torch.randint(-1, 2, (shape["T"], 1), generator=generator, device=device).exp2()
    return ((2 * order + 1 - shape["E"] // 2 * 2) * scale / 128).to(dtype)


def draw_routing(
    shape: Shape, busy: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Logits, and the experts `[tokens, top_k]` int32 that they choose, with their renormalised weights, fp32."""
    logits = draw_logits(shape, dtype, device, generator)
    logits[:, busy:] -= 16  # below all others
    chosen = logits.float().topk(shape["top_k"], -1)
    weights = chosen.values.softmax(-1)
    return {"logits": logits, "topk_weights": weights, "topk_ids": chosen.indices.int()}


def hit(shape: Shape) -> float:
    """How many experts get a token, on average over the draws."""
    busy = shape["busy"]
    return busy * (1 - (1 - shape["top_k"] / busy) ** shape["T"])


def by_expert(ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """With torch: the pairs of token and expert in the order of a stable sort, and where each expert's end, int32."""
    ordered, order = ids.flatten().sort(stable=True)
    every = torch.arange(experts, dtype=ids.dtype, device=ids.device)
    return order, torch.searchsorted(ordered, every, right=True, out_int32=True)


def combined(y: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """With torch: sorted rows back at their tokens, and added up by weight."""
    rows = torch.empty_like(y)
    rows[order] = y
    return torch.bmm(weights.to(y.dtype)[:, None], rows.view(*weights.shape, -1))[:, 0]


def exact_products(
    x: torch.Tensor, ends: torch.Tensor, product: Callable[[int, torch.Tensor], torch.Tensor], width: int
) -> torch.Tensor:
    """`product(expert, its rows of x)` one expert after the other, in fp64 on a CPU, in fp32 on a GPU."""
    dtype = wide_dtype(x.device)
    out = torch.zeros(len(x), width, dtype=dtype, device=x.device)
    start = 0
    with full_fp32():
        for expert, end in enumerate(ends.tolist()):
            if start < end:
                out[start:end] = product(expert, x[start:end].to(dtype))
            start = end
    return out
