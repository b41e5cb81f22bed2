"""Sampling the next token: bound by memory, the logits read once and one id a row written.

`k` is top-k (0: off), `p` top-p in percent (100: off). Peaked logits are as a language model's, a few tokens far above
the rest; flat ones leave top-p tens of thousands of tokens.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

import octavo
from octavo.bench.harness import Inputs, Provider, Shape
from octavo.bench.providers import compiled, drawn
from octavo.bench.shapes import LLAMA_2_70B, LLAMA_3_8B

OP = "sample"
DTYPES = (torch.float32,)
PEAKS = 32


def shapes() -> list[Shape]:
    return [
        {"B": batch, "vocab": model.vocab, "k": k, "p": p, "flat": flat}
        for model in (LLAMA_3_8B, LLAMA_2_70B)
        for k, p, flat in ((50, 90, 0), (50, 90, 1), (0, 90, 0), (0, 90, 1), (1000, 100, 1), (0, 100, 0))
        for batch in (1, 64, 256)
    ]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    batch, vocab = shape["B"], shape["vocab"]
    logits = torch.randn(batch, vocab, **drawn(torch.float32, device, generator))
    if not shape["flat"]:
        peaks = min(PEAKS, vocab // 2)
        at = torch.randint(vocab, (batch, peaks), generator=generator, device=device)
        logits = (2 * logits).scatter_add_(1, at, torch.linspace(16, 4, peaks, device=device).expand(batch, -1))
    seeds = torch.randint(2**62, (batch,), generator=generator, device=device)
    return {"logits": logits.to(dtype), "seeds": seeds, "k": shape["k"], "p": shape["p"] / 100}


def exact(inputs: Inputs) -> torch.Tensor:
    """Every row's token may be drawn."""
    return torch.ones(inputs["logits"].shape[0], dtype=torch.bool, device=inputs["logits"].device)


def observe(result: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Whether the filters keep each row's token; draws differ. Within 1e-4 of top-p's end either side is right."""
    logits, k, p = inputs["logits"], inputs["k"] or inputs["logits"].shape[1], inputs["p"]
    known = (result >= 0) & (result < logits.shape[1])
    kept = []
    for row, token in zip(logits, torch.where(known, result, 0).long().tolist(), strict=True):
        wide = row.double()
        mass = (wide - wide.max()).exp()
        above = wide > wide[token]
        of_top_k = torch.where(wide >= wide.topk(k).values[-1], mass, 0.0).sum()
        kept.append((above.sum() < k) & (torch.where(above, mass, 0.0).sum() < (p + 1e-4) * of_top_k))
    return known & torch.stack(kept)


def flops(shape: Shape) -> int:
    """Difference to the largest, scale, exponential, sum."""
    return 4 * shape["B"] * shape["vocab"]


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    """Besides the logits: temperature, top-k, top-p (4 bytes each), seed, position and token (8 each)."""
    return shape["B"] * (shape["vocab"] * dtype.itemsize + 3 * 4 + 3 * 8)


def _plain(logits: torch.Tensor, k: int, p: float) -> torch.Tensor:
    """As Hugging Face does it: sort, cut, draw."""
    ordered, ids = logits.float().sort(dim=-1, descending=True)
    if k:
        ordered = ordered.masked_fill(ordered < ordered[:, k - 1 : k], -torch.inf)
    probs = ordered.softmax(-1)
    if p < 1:
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= p, 0.0)
    drawn = (probs / torch.empty_like(probs).exponential_()).argmax(-1, keepdim=True)
    return ids.gather(1, drawn).squeeze(1)


def _settings(inputs: Inputs) -> dict[str, Any]:
    """The filters that are on, one value a row, as an engine has them."""
    rows, device = inputs["logits"].shape[0], inputs["logits"].device
    found: dict[str, Any] = {}
    if inputs["k"]:
        found["top_k"] = torch.full((rows,), inputs["k"], dtype=torch.int32, device=device)
    if inputs["p"] < 1:
        found["top_p"] = torch.full((rows,), inputs["p"], dtype=torch.float32, device=device)
    return found


def _octavo(inputs: Inputs) -> Callable[[], torch.Tensor]:
    logits, seeds, filters = inputs["logits"], inputs["seeds"], _settings(inputs)
    temperature = torch.ones(logits.shape[0], device=logits.device)
    positions = torch.zeros_like(seeds)
    return lambda: octavo.sample(logits, temperature=temperature, seeds=seeds, positions=positions, **filters)


def _torch(inputs: Inputs) -> Callable[[], torch.Tensor]:
    return lambda: _plain(inputs["logits"], inputs["k"], inputs["p"])


def _seeded(function: Callable[..., Any]) -> Callable[..., Any]:
    """With fixed random numbers where FlashInfer takes them: asking torch's generator for them can't be captured."""
    accepted = inspect.signature(function).parameters
    fixed = {"seed": 1, "offset": 0} if "seed" in accepted else {}
    return lambda *args: function(*args, **fixed)


def _flashinfer(inputs: Inputs) -> Callable[[], torch.Tensor]:
    from flashinfer import sampling

    logits, filters = inputs["logits"], tuple(_settings(inputs).values())
    by_filters = {
        (True, True): sampling.top_k_top_p_sampling_from_probs,
        (True, False): sampling.top_k_sampling_from_probs,
        (False, True): sampling.top_p_sampling_from_probs,
        (False, False): sampling.sampling_from_probs,
    }
    draw = _seeded(by_filters[inputs["k"] > 0, inputs["p"] < 1])
    return lambda: draw(sampling.softmax(logits), *filters)


def _flashinfer_logits(inputs: Inputs) -> Callable[[], torch.Tensor]:
    from flashinfer import sampling

    logits, k, p = inputs["logits"], inputs["k"], inputs["p"]
    if not k and p == 1:
        draw = _seeded(sampling.sampling_from_logits)
        return lambda: draw(logits)
    filters = _settings({**inputs, "k": k or logits.shape[1]})
    top_p = filters.get("top_p", torch.ones(logits.shape[0], device=logits.device))
    draw = _seeded(sampling.top_k_top_p_sampling_from_logits)
    return lambda: draw(logits, filters["top_k"], top_p)


def _vllm(inputs: Inputs) -> Callable[[], torch.Tensor]:
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p, random_sample

    logits, filters = inputs["logits"], _settings(inputs)
    k, p = filters.get("top_k"), filters.get("top_p")

    def call() -> torch.Tensor:
        return random_sample(apply_top_k_top_p(logits, k, p).softmax(dim=-1, dtype=torch.float32), {})

    return call


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch": Provider(_torch, devices=("cpu", "cuda"), package="torch"),
    "torch.compile": Provider(lambda i: compiled(_plain, i["logits"], i["k"], i["p"]), package="torch"),
    "flashinfer": Provider(_flashinfer, "flashinfer", package="flashinfer-python", note="softmax, then sampling"),
    "flashinfer (from logits)": Provider(_flashinfer_logits, "flashinfer", package="flashinfer-python"),
    "vllm": Provider(_vllm, "vllm", package="vllm", note="may mask its logits in place"),
}
