"""How much memory steps take beside the weights, and how many pages of cache fit into what is left."""

import torch

from octavo.engine.config import ModelConfig
from octavo.engine.kv_cache import KVCache
from octavo.engine.model import Decoder

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
