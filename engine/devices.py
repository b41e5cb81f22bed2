"""Where a model is computed, and in which dtype."""

import torch

from octavo.engine.config import ModelConfig


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device that a user means, by default the GPU where there is one.

    Raises:
        ValueError: a name that is none, or a GPU that is not there.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: {device!r}; expected cpu, cuda or cuda:<index>") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {device!r}, but this machine has {torch.cuda.device_count()} GPUs: choose cpu")
    return chosen


def choose_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """Of activations, where the user does not say: fp32 on a CPU, half precision on a GPU."""
    if device.type == "cpu":
        return torch.float32
    return config.dtype if config.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
