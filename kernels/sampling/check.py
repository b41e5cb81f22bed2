"""What `sample` accepts; values that lie on the device are not looked at, since that would take a synchronisation."""

import torch

from octavo.kernels.checks import (
    FLOATS,
    INTS,
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    check_shape,
)
from octavo.kernels.tiles import cdiv


def check_sample(
    logits: torch.Tensor,
    temperature: torch.Tensor | None,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    seeds: torch.Tensor | None,
    positions: torch.Tensor | None,
    repetition_penalty: torch.Tensor | None,
    presence_penalty: torch.Tensor | None,
    frequency_penalty: torch.Tensor | None,
    output_counts: torch.Tensor | None,
    prompt_mask: torch.Tensor | None,
    bias_ids: torch.Tensor | None,
    bias_values: torch.Tensor | None,
    allowed_mask: torch.Tensor | None,
    num_logprobs: int | None,
) -> None:
    """Raises TypeError or ValueError unless the arguments of `sample` fit together."""
    check_dtype("logits", logits, FLOATS)
    check_ndim("logits", logits, 2, "[rows, vocab]")
    check_last_dim_contiguous("logits", logits)
    rows, vocab = logits.shape
    if not 0 < vocab < 2**31 - 2**16:
        raise ValueError(f"logits: vocab {vocab}; expected at least 1 and less than 2**31 - 2**16 tokens")
    row = (rows,), "[rows], as many as logits has"
    each = (rows, vocab), "[rows, vocab], the shape of logits"
    bits = (rows, cdiv(vocab, 32)), "[rows, ceil(vocab / 32)], a bit a token"
    bias = (rows, bias_ids.shape[-1] if isinstance(bias_ids, torch.Tensor) and bias_ids.dim() else 0), "[rows, biases]"
    for name, x, dtypes, (shape, layout) in (
        ("temperature", temperature, (torch.float32,), row),
        ("top_k", top_k, (torch.int32,), row),
        ("top_p", top_p, (torch.float32,), row),
        ("min_p", min_p, (torch.float32,), row),
        ("seeds", seeds, (torch.int64,), row),
        ("positions", positions, (torch.int64,), row),
        ("repetition_penalty", repetition_penalty, (torch.float32,), row),
        ("presence_penalty", presence_penalty, (torch.float32,), row),
        ("frequency_penalty", frequency_penalty, (torch.float32,), row),
        ("output_counts", output_counts, (torch.int32, torch.int16), each),
        ("prompt_mask", prompt_mask, (torch.int32,), bits),
        ("bias_ids", bias_ids, INTS, bias),
        ("bias_values", bias_values, (torch.float32,), bias),
        ("allowed_mask", allowed_mask, (torch.int32,), bits),
    ):
        if x is not None:
            check_dtype(name, x, dtypes)
            check_shape(name, x, shape, layout)
            check_last_dim_contiguous(name, x)
            check_device(name, x, "logits", logits)
    _check_needs("positions", positions, seeds=seeds)
    _check_needs("seeds", seeds, positions=positions, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    _check_needs(
        "output_counts",
        output_counts,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
    )
    _check_needs("repetition_penalty", repetition_penalty, prompt_mask=prompt_mask)
    _check_needs("bias_values", bias_values, bias_ids=bias_ids)
    _check_needs("bias_ids", bias_ids, bias_values=bias_values)
    if num_logprobs is not None and not 0 <= num_logprobs <= vocab:
        raise ValueError(f"num_logprobs: {num_logprobs}; expected 0 to {vocab}, the size of the vocabulary, or None")


def _check_needs(name: str, x: torch.Tensor | None, **given: torch.Tensor | None) -> None:
    """Raises ValueError where something was given that needs the absent `x`."""
    if x is None:
        for other, value in given.items():
            if value is not None:
                raise ValueError(f"{name}: None; expected a tensor, since {other} is given and needs it")
