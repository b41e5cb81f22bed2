"""How large the engine is. No torch here."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What `LLM` takes beside the model.

    Args:
        max_model_len: longest context in tokens; by default the model's own.
        cache_tokens: tokens that the KV cache holds; by default what fits in 80 % of the GPU's free memory, or 1 GiB
            on a CPU, and never more than `max_num_seqs` full contexts.
        page_size: tokens a page of the cache.
        max_num_seqs: requests in one batch at most.
        max_num_batched_tokens: tokens in one step at most; longer prompts are computed in chunks.
        max_waiting: requests that may wait; more are refused. None for no limit.
        enable_prefix_caching: keep what was computed of earlier requests, for later ones that begin alike. Not for
            models with a sliding window shorter than the context, whose pages are written over.

    Raises:
        TypeError: there is no such option.
        ValueError: an option out of range.
    """

    max_model_len: int | None = None
    cache_tokens: int | None = None
    page_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_waiting: int | None = None
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        sizes = ("max_model_len", "cache_tokens", "page_size", "max_num_seqs", "max_num_batched_tokens", "max_waiting")
        for name in sizes:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value}; expected at least 1")
