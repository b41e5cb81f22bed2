"""Experts whose weights have 8 or 4 bits, for `bench_fused_moe`: shapes, what is drawn, the exact layer, vLLM's.

A shape's `bits` are 8 or 4. Of 8: `fp8` is 1 for e4m3 and 0 for int8, `block` is 128 where 128 × 128 weights share a
scale and 0 where an output has one; what the products multiply is quantised by token, or by groups of 128, inside the
timing. Of 4: `group` inputs share a scale, and activations stay as they are.
"""

from collections.abc import Callable

import torch

import octavo
from octavo.bench.harness import Inputs, Shape, Unsupported
from octavo.bench.providers import pack_words
from octavo.bench.shapes import MIXTRAL_8X7B

BLOCK = GROUP = 128
TOKENS = (1, 16, 64, 1024, 4096)
SCHEMES: tuple[Shape, ...] = (
    {"bits": 4, "group": GROUP},
    {"bits": 8, "fp8": 0, "block": 0},
    {"bits": 8, "fp8": 1, "block": 0},
    {"bits": 8, "fp8": 1, "block": BLOCK},
)
FIELDS = ("bits", "fp8", "block", "group")


def shapes() -> list[Shape]:
    m = MIXTRAL_8X7B
    layer = {"E": m.experts, "busy": m.experts, "top_k": m.experts_per_token}
    layer |= {"hidden": m.hidden, "intermediate": m.intermediate}
    return [{"T": tokens} | layer | scheme for scheme in SCHEMES for tokens in TOKENS]


def draw(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    """Both weights `[E, N, K]`, one number an element (from -8 of 4 bits), and scales that keep outputs near 1."""
    count, hidden, intermediate = shape["E"], shape["hidden"], shape["intermediate"]
    sizes = {"w1": (2 * intermediate, hidden), "w2": (hidden, intermediate)}
    made: Inputs = {name: shape.get(name, 0) for name in FIELDS}
    for name, (n, k) in sizes.items():
        if shape["bits"] == 4:
            q = torch.randint(-8, 8, (count, n, k), generator=generator, device=device, dtype=torch.int8)
            size, kind, spread = [count, k // shape["group"], n], dtype, 4.6
        elif shape["fp8"]:
            q = torch.empty(count, n, k, device=device, dtype=torch.float8_e4m3fn)
            for expert in q:
                expert.copy_((torch.randn(n, k, generator=generator, device=device) * 100).clamp_(-448, 448))
            block = shape["block"]
            size = [count, -(-n // block), k // block] if block else [count, n]
            kind, spread = torch.float32, 100.0
        else:
            q = torch.randint(-127, 128, (count, n, k), generator=generator, device=device, dtype=torch.int8)
            size, kind, spread = [count, n], torch.float32, 73.0
        scale = (torch.rand(size, generator=generator, device=device) + 0.5) / (spread * k**0.5)
        made |= {name: q, f"{name}_scale": scale.to(kind)}
    return made


def dequantised(inputs: Inputs, name: str, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """A weight `[N, K]` of one expert."""
    q, scale = inputs[name][expert].to(dtype), inputs[f"{name}_scale"][expert].to(dtype)
    if inputs["bits"] == 4:
        return q * scale.t().repeat_interleave(inputs["group"], 1)
    if inputs["block"]:
        n, k = q.shape
        return q * scale.repeat_interleave(inputs["block"], 0)[:n].repeat_interleave(inputs["block"], 1)[:, :k]
    return q * scale[:, None]


def requantised(x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Activations as the products have them: rounded to what 8 bits and a scale of their own hold."""
    if inputs["bits"] == 4:
        return x
    parts = x.unflatten(-1, (-1, inputs["block"] or x.shape[-1]))
    scale = parts.abs().amax(-1, keepdim=True) / (448.0 if inputs["fp8"] else 127.0)
    q = parts / torch.where(scale == 0, 1.0, scale)
    q = q.to(torch.float8_e4m3fn).to(x.dtype) if inputs["fp8"] else q.round()
    return (q * scale).flatten(-2)


def layer(inputs: Inputs, expert: int, rows: torch.Tensor, rounded: bool = False) -> torch.Tensor:
    """What an expert makes of rows; `rounded` as if numbers had been rounded to bf16 before they are quantised."""
    rows = requantised(rows, inputs)
    gate, up = (rows @ dequantised(inputs, "w1", expert, rows.dtype).t()).chunk(2, -1)
    hidden = gate / (1 + torch.exp(-gate)) * up
    if rounded:
        generator = torch.Generator(hidden.device).manual_seed(expert)
        rounding = torch.rand(hidden.shape, generator=generator, device=hidden.device, dtype=hidden.dtype) * 2 - 1
        hidden *= 1 + torch.finfo(torch.bfloat16).eps * rounding
    return requantised(hidden, inputs) @ dequantised(inputs, "w2", expert, rows.dtype).t()


def weight_bytes(shape: Shape) -> float:
    """A weight's bytes on average, with its part of the scales of groups or blocks."""
    if shape["bits"] == 4:
        return 0.5 + 2 / shape["group"]
    return 1 + (4 / shape["block"] ** 2 if shape["block"] else 0)


def _operands(inputs: Inputs) -> list[torch.Tensor]:
    return [inputs[name] for name in ("x", "topk_weights", "topk_ids")]


def octavo_weights(inputs: Inputs) -> Inputs:
    """The arguments of `fused_moe` that a layer of quantised experts has."""
    w1, w2 = inputs["w1"], inputs["w2"]
    if inputs["bits"] == 4:
        w1, w2 = (torch.stack([octavo.int4_pack((q + 8).to(torch.uint8)) for q in w]) for w in (w1, w2))
    return {"w1": w1, "w2": w2, "w1_scale": inputs["w1_scale"], "w2_scale": inputs["w2_scale"]}


def vllm(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """vLLM's Triton kernels, with the tile choices that it brings for this GPU."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe import config, fused_experts

    x, weights, ids = _operands(inputs)
    w1, w2, s1, s2 = (inputs[name] for name in ("w1", "w2", "w1_scale", "w2_scale"))
    if inputs["bits"] == 4:
        w1, w2 = (((w[..., 0::2] + 8) | ((w[..., 1::2] + 8) << 4)).view(torch.uint8) for w in (w1, w2))
        s1, s2 = (s.transpose(1, 2).contiguous() for s in (s1, s2))
        quantised = config.int4_w4a16_moe_quant_config(s1, s2, None, None, block_shape=[0, inputs["group"]])
    elif inputs["block"]:
        quantised = config.fp8_w8a8_moe_quant_config(s1, s2, block_shape=[inputs["block"]] * 2)
    elif inputs["fp8"]:
        by = dict(per_act_token_quant=True, per_out_ch_quant=True)
        quantised = config.fp8_w8a8_moe_quant_config(s1[..., None], s2[..., None], **by)
    else:
        quantised = config.int8_w8a8_moe_quant_config(
            s1[..., None], s2[..., None], None, None, per_act_token_quant=True
        )
    current = VllmConfig()

    def call() -> torch.Tensor:
        with set_current_vllm_config(current):
            return fused_experts(x, w1, w2, weights, ids, quant_config=quantised)

    return call


def marlin(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """vLLM's Marlin kernels for experts, from GPTQ's layout."""
    import vllm._custom_ops as ops
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_moe_permute_scales
    from vllm.scalar_type import scalar_types

    if inputs.get("bits") != 4:
        raise Unsupported("measured with int4 weights")
    x, weights, ids = _operands(inputs)
    packed, scales = [], []
    for name in ("w1", "w2"):
        count, n, k = inputs[name].shape
        none = torch.empty(count, 0, dtype=torch.int32, device=x.device)
        words = torch.stack([pack_words((q + 8).to(torch.uint8), 4).t().contiguous() for q in inputs[name]])
        packed.append(ops.gptq_marlin_moe_repack(words, none, k, n, 4))
        scales.append(marlin_moe_permute_scales(inputs[f"{name}_scale"], k, n, inputs["group"]))
    current = VllmConfig()

    def call() -> torch.Tensor:
        with set_current_vllm_config(current):
            return fused_marlin_moe(
                *(x, *packed, None, None, *scales, weights, ids), quant_type_id=scalar_types.uint4b8.id
            )

    return call


def cutlass(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """vLLM's CUTLASS kernels for fp8, called as its layer calls them; workspaces are made beforehand."""
    import vllm._custom_ops as ops
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.cutlass_moe import run_cutlass_moe_fp8

    if not inputs.get("fp8") or inputs["block"]:
        raise Unsupported("for fp8 with a scale a token and an output")
    x, weights, ids = _operands(inputs)
    w1, w2 = inputs["w1"], inputs["w2"]
    count, hidden, intermediate = w2.shape
    pairs = ids.numel()

    def strides(size: int) -> torch.Tensor:
        return torch.full((count,), size, device=x.device, dtype=torch.int64)

    of_hidden, of_intermediate, of_both = map(strides, (hidden, intermediate, 2 * intermediate))
    first = x.new_empty(pairs, max(2 * intermediate, hidden))
    second, out = x.new_empty(pairs, max(intermediate, hidden)), torch.empty_like(x)
    scales = inputs["w1_scale"][..., None], inputs["w2_scale"][..., None]
    current = VllmConfig()

    def call() -> torch.Tensor:
        q, scale = ops.scaled_fp8_quant(x, use_per_token_if_dynamic=True)
        with set_current_vllm_config(current):
            run_cutlass_moe_fp8(
                *(out, q, w1, w2, ids, MoEActivation.SILU, count, None, *scales, scale, None),
                *(of_hidden, of_intermediate, of_both, of_hidden, first, second, None, x.dtype),
                *(True, True, False, weights, None),
            )
        return out

    return call
