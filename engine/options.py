"""How large the engine is. No torch here."""

from dataclasses import dataclass

CACHE_DTYPES = ("fp8", "fp8_e5m2", "int8")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What `LLM` takes beside the model.

    Args:
        max_model_len: longest context in tokens; by default the model's own.
        cache_tokens: tokens that the KV cache holds; by default what fits into the GPU's memory that weights and steps
            leave, or into 1 GiB of a CPU's, and never more than `max_num_seqs` full contexts.
        gpu_memory_utilization: the share of the GPU's memory that may be used in all.
        kv_cache_dtype: "fp8" (e4m3), "fp8_e5m2" or "int8", which take half the memory; by default that of activations.
            Float8 is scaled by what the checkpoint has for it, if anything (k_scale, v_scale), or by 1; int8 has a
            scale for each token's head, found as it comes.
        page_size: tokens a page of the cache.
        max_num_seqs: requests in one batch at most.
        max_num_batched_tokens: tokens in one step at most; longer prompts are computed in chunks.
        max_waiting: requests that may wait; more are refused. None for no limit.
        enable_prefix_caching: keep what was computed of earlier requests, for later ones that begin alike. Not for
            models with a sliding window shorter than the context, whose pages are written over.
        enforce_eager: launch every kernel of a step from Python, for debugging, in place of CUDA graphs.

    Raises:
        TypeError: there is no such option.
        ValueError: an option out of range.
    """

    max_model_len: int | None = None
    cache_tokens: int | None = None
    page_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_waiting: int | None = None
    enable_prefix_caching: bool = True
    gpu_memory_utilization: float = 0.9
    kv_cache_dtype: str | None = None
    enforce_eager: bool = False

    def __post_init__(self) -> None:
        sizes = ("max_model_len", "cache_tokens", "page_size", "max_num_seqs", "max_num_batched_tokens", "max_waiting")
        for name in sizes:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value}; expected at least 1")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization: {self.gpu_memory_utilization}; expected more than 0, at most 1")
        if self.kv_cache_dtype not in (None, *CACHE_DTYPES):
            raise ValueError(
                f"kv_cache_dtype: {self.kv_cache_dtype!r}; expected one of {', '.join(CACHE_DTYPES)}, or None"
            )
