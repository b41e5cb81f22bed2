"""The models whose shapes are measured, and what is derived from them.

Numbers are those of each `config.json`.

Models share sizes (Llama-3-8B, Mistral-7B and a Mixtral-8x7B expert have the same layers), so the derived lists name
each size once; `models_of` says where a size comes from.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from octavo.bench.harness import Shape


@dataclass(frozen=True)
class Model:
    """A decoder's sizes.

    Attributes:
        experts, experts_per_token: 0 for a dense MLP.
        window: of sliding-window attention; None for full attention.
        gated: whether the MLP multiplies by a gate (two projections up, one down).
        layer_norms: full layer norms with bias in each layer; 0 for a model with two RMSNorms.
        tied: whether the output head is the embedding.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int = 0
    experts_per_token: int = 0
    window: int | None = None
    gated: bool = True
    layer_norms: int = 0
    tied: bool = False


LLAMA_3_8B = Model("Llama-3-8B", 4096, 14336, 32, 32, 8, 128, 128256)
LLAMA_2_70B = Model("Llama-2-70B", 8192, 28672, 80, 64, 8, 128, 32000)
MISTRAL_7B = Model("Mistral-7B", 4096, 14336, 32, 32, 8, 128, 32000, window=4096)
MIXTRAL_8X7B = Model("Mixtral-8x7B", 4096, 14336, 32, 32, 8, 128, 32000, experts=8, experts_per_token=2)
FALCON_7B = Model("Falcon-7B", 4544, 18176, 32, 71, 1, 64, 65024, gated=False, layer_norms=1, tied=True)
FALCON_40B = Model("Falcon-40B", 8192, 32768, 60, 128, 8, 64, 65024, gated=False, layer_norms=2, tied=True)
LLAMA_3_2_1B = Model("Llama-3.2-1B", 2048, 8192, 16, 32, 8, 64, 128256, tied=True)
PHI_3_MINI = Model("Phi-3-mini", 3072, 8192, 32, 32, 32, 96, 32064)
GEMMA_2_9B = Model("Gemma-2-9B", 3584, 14336, 42, 16, 8, 256, 256000, tied=True)
# Of mixtures of experts, the intermediate size is an expert's.
DEEPSEEK_V2_LITE = Model("DeepSeek-V2-Lite", 2048, 1408, 27, 16, 16, 192, 102400, experts=64, experts_per_token=6)
QWEN3_30B_A3B = Model("Qwen3-30B-A3B", 2048, 768, 48, 32, 4, 128, 151936, experts=128, experts_per_token=8)
DEEPSEEK_V3 = Model("DeepSeek-V3", 7168, 2048, 61, 128, 128, 192, 129280, experts=256, experts_per_token=8)
MODELS = (LLAMA_3_8B, LLAMA_2_70B, MISTRAL_7B, MIXTRAL_8X7B, FALCON_7B)
# Of these the attention alone is measured: other heads.
ATTENTION_ONLY = (FALCON_40B, LLAMA_3_2_1B, PHI_3_MINI, GEMMA_2_9B)
# And of these the experts.
EXPERTS_ONLY = (DEEPSEEK_V2_LITE, QWEN3_30B_A3B, DEEPSEEK_V3)

# One decode step of 1 to 1024 sequences, and a prefill; the GEMMs' largest is what a server's token budget allows.
TOKENS = (1, 16, 64, 256, 1024, 8192)
GEMM_TOKENS = (1, 16, 64, 256, 1024, 4096)
MOE_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
# Between the GEMMs', of two layers: whether a choice of tiles makes a cliff.
BETWEEN_TOKENS = (2, 3, 8, 32, 48, 96, 128, 192, 512)


def linears(model: Model) -> dict[str, tuple[int, int]]:
    """The linear layers of one decoder layer: name → (outputs N, inputs K); of one expert in a mixture."""
    attention = model.heads * model.head_dim
    up = "gate_up" if model.gated else "up"
    return {
        "qkv": (attention + 2 * model.kv_heads * model.head_dim, model.hidden),
        "o": (model.hidden, attention),
        up: (model.intermediate * (2 if model.gated else 1), model.hidden),
        "down": (model.hidden, model.intermediate),
    }


def parameters(model: Model) -> int:
    """All of a model's parameters, each counted once."""
    sizes = {name: n * k for name, (n, k) in linears(model).items()}
    attention = sizes["qkv"] + sizes["o"]
    mlp = sum(sizes.values()) - attention
    router = model.experts * model.hidden
    # A layer norm has a weight and a bias, as wide as two RMSNorms.
    norms = 2 * model.hidden * max(model.layer_norms, 1)
    final_norm = model.hidden * (2 if model.layer_norms else 1)
    embedding = model.vocab * model.hidden
    layer = attention + mlp * max(model.experts, 1) + router + norms
    return model.layers * layer + final_norm + embedding * (1 if model.tied else 2)


def distinct(values: Iterable[int]) -> list[int]:
    """Each value once, in the order of its first appearance."""
    return list(dict.fromkeys(values))


def hidden_sizes() -> list[int]:
    """The widths that a norm sees. Falcon's is a layer norm, and here the width that is no power of two."""
    return distinct(model.hidden for model in MODELS)


def gated_sizes() -> list[int]:
    """The widths of a gated activation's output."""
    return distinct(model.intermediate for model in MODELS if model.gated)


def intermediate_sizes() -> list[int]:
    """The widths of every MLP, gated or not."""
    return distinct(model.intermediate for model in MODELS)


def head_layouts() -> list[Shape]:
    """Query heads, KV heads and head size."""
    return _each_once({"heads": m.heads, "kv_heads": m.kv_heads, "D": m.head_dim} for m in MODELS)


def attention_heads() -> list[Shape]:
    """Query heads and head size: what attention returns for a token."""
    return _each_once({"heads": m.heads, "D": m.head_dim} for m in MODELS)


def kv_layouts() -> list[Shape]:
    """KV heads and head size: what a cache is made of."""
    return _each_once({"kv_heads": m.kv_heads, "D": m.head_dim} for m in MODELS)


def linear_shapes(models: Iterable[Model]) -> list[Shape]:
    """N and K of the models' linear layers."""
    return _each_once({"N": n, "K": k} for model in models for n, k in linears(model).values())


def gemm_shapes() -> list[Shape]:
    """M, N and K of the layers of Llama-3-8B and Llama-2-70B, with more numbers of tokens for two of them."""
    every = [{"M": m} | layer for layer in linear_shapes((LLAMA_3_8B, LLAMA_2_70B)) for m in GEMM_TOKENS]
    two = [linears(LLAMA_2_70B)["o"], linears(LLAMA_3_8B)["down"]]
    return every + [{"M": m, "N": n, "K": k} for n, k in two for m in BETWEEN_TOKENS]


def models_of(shape: Mapping[str, int]) -> list[str]:
    """The names of the models that a benchmark's shape comes from: all that its model dimensions fit.

    Token counts, contexts and page sizes belong to no model; a window of 0 fits every model.
    """
    return [model.name for model in (*MODELS, *ATTENTION_ONLY, *EXPERTS_ONLY) if _fits(model, shape)]


def _fits(model: Model, shape: Mapping[str, int]) -> bool:
    facts = {
        "hidden": model.hidden,
        "intermediate": model.intermediate,
        "heads": model.heads,
        "kv_heads": model.kv_heads,
        "D": model.head_dim,
        "vocab": model.vocab,
        "E": model.experts,
        "top_k": model.experts_per_token,
    }
    known = facts.keys() & shape.keys()
    if "N" in shape and "K" in shape:
        if (shape["N"], shape["K"]) not in linears(model).values():
            return False
    elif not known:
        return False
    return all(shape[name] == facts[name] for name in known) and shape.get("window", 0) in (0, model.window)


def _each_once(shapes: Iterable[Shape]) -> list[Shape]:
    return list({tuple(shape.items()): shape for shape in shapes}.values())
