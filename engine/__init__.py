"""A minimal engine for Llama, Mistral and Mixtral models, composed of octavo's public ops.

Reading order: config and checkpoint (what a model is), model (the forward pass), params and sequence (a request),
block_manager and scheduler (who runs next), runner and sampler (one step on the device), core and outputs (steps
overlapped, tokens made text), llm and async_llm (the front doors), cli. Apart from those: transformers_attention, for
transformers' own models.
"""

from octavo.engine.async_llm import AsyncLLM
from octavo.engine.llm import LLM
from octavo.engine.options import EngineOptions
from octavo.engine.outputs import Completion, CompletionOutput
from octavo.engine.params import SamplingParams
from octavo.engine.scheduler import QueueFullError
from octavo.engine.transformers_attention import register_transformers_attention

__all__ = [
    "LLM",
    "AsyncLLM",
    "Completion",
    "CompletionOutput",
    "EngineOptions",
    "QueueFullError",
    "SamplingParams",
    "register_transformers_attention",
]
