"""A minimal engine for Llama, Mistral and Mixtral models, composed of octavo's public ops.

Reading order: config and checkpoint (what a model is), model (the forward pass), sequence, block_manager and scheduler
(who runs next), runner (one step on the device), llm (the front door), cli. Apart from those: transformers_attention,
for transformers' own models.
"""

from octavo.engine.llm import LLM, Completion
from octavo.engine.sequence import SamplingParams
from octavo.engine.transformers_attention import register_transformers_attention

__all__ = ["LLM", "Completion", "SamplingParams", "register_transformers_attention"]
