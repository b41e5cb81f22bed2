"""octavo: Triton kernels for LLM inference behind a small functional API.

Every function takes and returns torch tensors, is registered as a torch op (`torch.ops.octavo.*`), and therefore works
under `torch.compile`, CUDA graphs and `torch.inference_mode`: on NVIDIA and AMD GPUs through Triton, on any other device
through its reference. The engine that composes them is `octavo.engine`.
"""

from octavo.kernels.norm import add_rms_norm, rms_norm

__version__ = "0.1.0"

__all__ = [
    "add_rms_norm",
    "rms_norm",
]
