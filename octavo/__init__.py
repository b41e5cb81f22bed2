"""octavo: Triton kernels for LLM inference behind a small functional API.

Every function takes and returns torch tensors, is registered as a torch op (`torch.ops.octavo.*`), and therefore works
under `torch.compile`, CUDA graphs and `torch.inference_mode`: on GPUs through Triton, on any other device through its
reference. The engine that composes them is `octavo.engine`.
"""

from octavo.kernels.norm import add_rms_norm, rms_norm
from octavo.kernels.layer_norm import layer_norm
from octavo.kernels.activation import gelu_and_mul, relu2, silu_and_mul
from octavo.kernels.rope import rotary_embedding
from octavo.kernels.rope_table import rotary_cos_sin_cache
from octavo.kernels.attention.write_kv import write_kv
from octavo.kernels.attention.rope_write_kv import rotary_embedding_write_kv
from octavo.kernels.attention.paged_attention import paged_attention
from octavo.kernels.attention.plan_attention import plan_attention
from octavo.kernels.attention.merge import merge_attention_states
from octavo.kernels.attention.cascade import cascade_attention
from octavo.kernels.attention.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from octavo.kernels.linear import linear
from octavo.kernels.gemv import gemv
from octavo.kernels.quant.packing import int4_pack, int4_unpack
from octavo.kernels.quant.epilogue import interleave_gate_up
from octavo.kernels.quant.int4 import int4_linear
from octavo.kernels.quant.int8 import int8_linear
from octavo.kernels.quant.w8a8_linear import fp8_linear, int8_int8_linear
from octavo.kernels.quant.w4a8_linear import int4_int8_linear
from octavo.kernels.quant.quantize import quantize_fp8, quantize_int8
from octavo.kernels.norm_quantize import add_rms_norm_quantize, rms_norm_quantize
from octavo.kernels.activation_quantize import gelu_and_mul_quantize, silu_and_mul_quantize
from octavo.kernels.moe.route import moe_route
from octavo.kernels.moe.permute import moe_permute, moe_unpermute
from octavo.kernels.moe.grouped_linear import grouped_linear
from octavo.kernels.moe.fused_moe import fused_moe
from octavo.kernels.sampling.sample import sample
from octavo.kernels.registry import backends
from octavo.kernels.warmup import WarmupReport, warmup
from octavo.kernels.model_calls import model_calls, token_counts
from octavo.kernels.compilation import compile_count

__version__ = "0.1.0"

__all__ = [
    "rms_norm",
    "add_rms_norm",
    "layer_norm",
    "silu_and_mul",
    "gelu_and_mul",
    "relu2",
    "rotary_embedding",
    "rotary_cos_sin_cache",
    "write_kv",
    "rotary_embedding_write_kv",
    "paged_attention",
    "plan_attention",
    "merge_attention_states",
    "cascade_attention",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "linear",
    "gemv",
    "int4_linear",
    "int4_pack",
    "int4_unpack",
    "int8_linear",
    "int8_int8_linear",
    "int4_int8_linear",
    "fp8_linear",
    "interleave_gate_up",
    "quantize_int8",
    "quantize_fp8",
    "rms_norm_quantize",
    "add_rms_norm_quantize",
    "silu_and_mul_quantize",
    "gelu_and_mul_quantize",
    "moe_route",
    "moe_permute",
    "moe_unpermute",
    "grouped_linear",
    "fused_moe",
    "sample",
    "backends",
    "warmup",
    "WarmupReport",
    "model_calls",
    "token_counts",
    "compile_count",
]
