"""Perplexity of a checkpoint, one layer at a time, so that it need not fit on the device."""

from collections.abc import Callable
from functools import partial

import torch

from octavo.engine.checkpoint import Checkpoint
from octavo.engine.devices import choose_dtype
from octavo.engine.layers import dequantize
from octavo.engine.quantize.forward import Forward, Stream, cut
from octavo.engine.quantize.source import half_weights, layer_names, layer_weights, outer_weights

LENGTH = 4096
"""Tokens that see each other, or the model's context where that is shorter."""


def sequences_of(checkpoint: Checkpoint, text: str) -> list[list[int]]:
    """A text as it is evaluated: cut into sequences.

    Raises:
        ValueError: a text of less than two tokens.
    """
    token_ids = checkpoint.tokenizer().encode(text)
    sequences = cut(token_ids, min(LENGTH, checkpoint.config.max_position_embeddings), len(token_ids))
    if not sequences:
        raise ValueError(f"evaluation: {len(token_ids)} tokens; expected a text of at least two")
    return sequences


@torch.inference_mode()
def layerwise_perplexity(
    checkpoint: Checkpoint,
    sequences: list[list[int]],
    device: torch.device,
    progress: Callable[[str], None] | None = None,
) -> float:
    """exp of the mean of -log p(token | those before it in its sequence), in the precision in which `LLM` computes.

    Args:
        checkpoint: in any format; its quantised layers run on the ops that serve them.
        sequences: token ids, two or more each; their first tokens are not predicted.
        device: which holds one layer at a time.
        progress: called with the name of each layer before it is computed.
    """
    config, cpu = checkpoint.config, torch.device("cpu")
    dtype = choose_dtype(config, device)
    outer = {name: dequantize(weight, cpu).to(dtype) for name, weight in outer_weights(checkpoint).items()}
    embedding = outer["model.embed_tokens.weight"]
    forward, stream = Forward(config, device, max(map(len, sequences))), Stream(sequences, embedding, device)
    for name in layer_names(checkpoint):
        if progress is not None:
            progress(name)
        halves = half_weights(config, name, layer_weights(checkpoint, name), device, dtype)
        stream.advance(partial(forward.layer, halves))
    head = outer.get("lm_head.weight", embedding).to(device)
    return stream.perplexity(outer["model.norm.weight"].to(device), head, config.rms_norm_eps)
