"""How much memory steps take beside the weights, and how many pages of cache fit into what is left."""

from typing import Any

import torch

from octavo.engine.config import ModelConfig
from octavo.engine.kv_cache import KVCache
from octavo.engine.model import Decoder
from octavo.engine.runner import ModelRunner
from octavo.engine.sampler import Mode

CPU_CACHE_BYTES = 1 << 30
"""What the cache takes of a CPU's memory."""


def activation_bytes(config: ModelConfig, dtype: torch.dtype, tokens: int, sequences: int) -> int:
    """What a step of so many tokens takes at most, by its largest tensors: those of an MLP, or the logits.

    With 8-bit activations, and with experts, there are more of them: a third is added for those, and 64 MiB for what
    cuBLAS keeps for itself.
    """
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    of_mlp = (3 * config.intermediate_size + config.hidden_size) * max(config.num_experts_per_tok, 1)
    of_token = 4 * config.hidden_size + max(heads * config.head_dim, of_mlp)
    logits = sequences * config.vocab_size * (dtype.itemsize + 1)  # and what sampling leaves of them
    return int((tokens * of_token * dtype.itemsize + logits) * 4 / 3) + 2**26


def measured_activations(model: Decoder, **limits: Any) -> int:
    """The same, of a model on a GPU, by running the largest step over a cache of one page.

    Args:
        limits: what ModelRunner takes, but for num_pages.
    """
    runner = ModelRunner(model, num_pages=1, **limits | {"enforce_eager": True})
    assert runner.sizes is not None
    shape = runner.sizes.every()[0]
    torch.cuda.synchronize(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    with runner._on_stream():
        runner._prepare(shape)
        runner._compute(shape, Mode.DRAWN)
        torch.cuda.synchronize(model.device)
    return torch.cuda.max_memory_allocated(model.device) - before


def pages_that_fit(
    model: Decoder, page_size: int, cache_dtype: torch.dtype | None, share: float, tokens: int, sequences: int
) -> int:
    """Pages that the memory has room for which weights and steps leave; at least one.

    Args:
        share: of the GPU's memory that may be used in all.
        tokens, sequences: of a step, at most.
    """
    page = KVCache.page_bytes(model.config, page_size, cache_dtype or model.dtype)
    room = CPU_CACHE_BYTES
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(model.device)
        steps = 2 * activation_bytes(model.config, model.dtype, tokens, sequences)  # launched, and in graphs
        room = int(free - (1 - share) * total - steps)
    return max(room // page, 1)
