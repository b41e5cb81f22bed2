"""Linear layers and the embedding, over whatever format their weights came in.

A layer keeps its weights as the checkpoint has them (dense, grouped int4 and int8, int8 and fp8 whose activations are
quantised too) and picks octavo's op accordingly; fp8 that no op serves becomes dense. Weights that
share an input (q, k and v; gate and up) are stacked along their outputs into one GEMM where their formats agree; gate
and up are interleaved for the ops whose epilogue then makes silu(gate) · up of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import octavo
from octavo.engine.checkpoint import Activations, Fp8Weight, Int4Weight, Int8Weight, Weight

BLOCK = 128  # outputs and inputs that share a scale where fp8 has scales by blocks


@dataclass(frozen=True)
class Quantized:
    """What a layer with 8-bit activations takes in place of its input: what came before has quantised it."""

    q: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype  # the input's, and the result's


Linear = Callable[[Any], torch.Tensor]
"""Takes a tensor, or what `normed` and `gated` make for it."""


@dataclass(frozen=True)
class DenseLinear:
    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return octavo.linear(x, self.weight, self.bias, prefetch_weight=True)


@dataclass(frozen=True)
class Int4Linear:
    packed: torch.Tensor
    scale: torch.Tensor  # [K / group_size, N]
    minimum: torch.Tensor | None  # [K / group_size, N]
    bias: torch.Tensor | None
    group_size: int
    order: torch.Tensor | None = None  # [K]: which input each packed one is
    activation: str | None = None  # "silu_and_mul": the outputs are gate and up, interleaved

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.order is not None:
            x = x[..., self.order]
        return octavo.int4_linear(
            *(x, self.packed, self.scale, self.minimum, self.bias),
            group_size=self.group_size,
            activation=self.activation,
            prefetch_weight=True,
        )


@dataclass(frozen=True)
class Int8Linear:
    weight: torch.Tensor
    scale: torch.Tensor  # [K / group_size, N]
    bias: torch.Tensor | None
    group_size: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return octavo.int8_linear(
            x, self.weight, self.scale, self.bias, group_size=self.group_size, prefetch_weight=True
        )


@dataclass(frozen=True)
class W8A8Linear:
    """Both sides of the product have a byte an element: int8 or fp8 (e4m3)."""

    weight: torch.Tensor
    scale: torch.Tensor  # fp32, [N]; by blocks [ceil(N / 128), K / 128]
    bias: torch.Tensor | None
    activations: Activations
    activation: str | None = None  # "silu_and_mul": the outputs are gate and up, interleaved

    def __call__(self, x: torch.Tensor | Quantized) -> torch.Tensor:
        if isinstance(x, torch.Tensor):
            x = self.quantized(x)
        linear = octavo.int8_int8_linear if self.weight.dtype == torch.int8 else octavo.fp8_linear
        operands = x.q, self.weight, x.scale, self.scale, self.bias
        return linear(*operands, out_dtype=x.dtype, activation=self.activation)

    def quantized(self, x: torch.Tensor) -> Quantized:
        quantize = octavo.quantize_int8 if self.weight.dtype == torch.int8 else octavo.quantize_fp8
        given = self.activations.scale
        if given is not None:
            return Quantized(quantize(x, given), given, x.dtype)
        q, scale = quantize(x, granularity=self.activations.granularity)
        return Quantized(q, scale, x.dtype)

    @property
    def takes_quantized(self) -> bool:
        """Whether an op that knows a row at a time can quantise what it computes for this layer."""
        return self.activations.scale is not None or self.activations.granularity != "tensor"

    def from_op(self, quantize: Callable[..., Any], dtype: torch.dtype) -> Quantized:
        """Its input from an op that quantises what it computes."""
        given = self.activations.scale
        if given is not None:
            return Quantized(quantize(dtype=self.weight.dtype, scale=given), given, dtype)
        group_size = BLOCK if self.activations.granularity == "group" else None
        q, scale = quantize(dtype=self.weight.dtype, group_size=group_size)
        return Quantized(q, scale, dtype)


@dataclass(frozen=True)
class SplitLinear:
    """Weights that share an input but not a format: one GEMM each, outputs side by side."""

    parts: tuple[Linear, ...]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


@dataclass(frozen=True)
class GatedLinear:
    """Gate and up, side by side, where no epilogue makes silu(gate) · up of them."""

    gate_up: Linear

    def __call__(self, x: torch.Tensor | Quantized) -> torch.Tensor:
        layer = self.gate_up
        if isinstance(layer, DenseLinear) and isinstance(x, torch.Tensor):
            return octavo.linear(x, layer.weight, layer.bias, activation="silu_and_mul", prefetch_weight=True)
        return octavo.silu_and_mul(layer(x))


@dataclass(frozen=True)
class Mlp:
    gate_up: Linear  # silu(gate) · up
    down: Linear

    def __call__(self, x: torch.Tensor | Quantized) -> torch.Tensor:
        layer = _quantising(self.down)
        if layer is None or not isinstance(self.gate_up, GatedLinear):
            return self.down(self.gate_up(x))
        both = self.gate_up.gate_up(x)
        return self.down(layer.from_op(partial(octavo.silu_and_mul_quantize, both), both.dtype))


def normed(
    into: object, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | Quantized:
    """RMSNorm of x as the layer or MLP that follows takes it: quantised already, if it would quantise that anyway.

    With `residual`, x is added to it in place first, and their sum is normalised.
    """
    layer = _quantising(into)
    if layer is None:
        if residual is None:
            return octavo.rms_norm(x, weight, eps)
        return octavo.add_rms_norm(x, residual, weight, eps)
    if residual is None:
        quantize: Any = partial(octavo.rms_norm_quantize, x, weight, eps=eps)
    else:
        quantize = partial(octavo.add_rms_norm_quantize, x, residual, weight, eps=eps)
    return layer.from_op(quantize, x.dtype)


def _quantising(layer: object) -> W8A8Linear | None:
    """The layer that quantises the input of this one, where the op before can do that in its place."""
    while isinstance(layer, Mlp | GatedLinear):
        layer = layer.gate_up
    return layer if isinstance(layer, W8A8Linear) and layer.takes_quantized else None


def weight_shape(weight: Weight) -> tuple[int, ...]:
    """`(out_features, in_features)` of a weight in any format; a vector's own shape."""
    return tuple(weight.shape if isinstance(weight, torch.Tensor) else weight.q.shape)


def make_linear(
    weights: list[Weight],
    biases: list[torch.Tensor | None],
    device: torch.device,
    dtype: torch.dtype,
    gated: bool = False,
) -> Linear:
    """One layer that computes all of `weights` on the same input, outputs in order.

    `gated`: they are gate and up, and the layer's result is silu(gate) · up.
    """
    weights = [supported(w, device, dtype) for w in weights]
    cut = any(isinstance(w, Fp8Weight) and w.block == (BLOCK, BLOCK) and w.q.shape[0] % BLOCK for w in weights[:-1])
    apart = cut or len({_kind(w) for w in weights}) > 1 or len({b is None for b in biases}) > 1
    if gated and (apart or not _interleaves(weights[0])):
        return GatedLinear(make_linear(weights, biases, device, dtype))
    if apart:
        return SplitLinear(tuple(make_linear([w], [b], device, dtype) for w, b in zip(weights, biases, strict=True)))
    activation = "silu_and_mul" if gated else None
    bias = None
    if biases[0] is not None:
        bias = _in_order(torch.cat([b.to(device, dtype) for b in biases if b is not None]), gated)
    first = weights[0]
    if isinstance(first, Int4Weight):
        q, scale = (_in_order(_stack(weights, field, device), gated) for field in ("q", "scale"))
        minimum = None
        if first.minimum is not None:
            minimum = _in_order(_stack(weights, "minimum", device), gated).t().contiguous()
        order = None if first.order is None else first.order.to(device)
        group_size = q.shape[1] // scale.shape[1]
        scale = scale.t().contiguous()
        return Int4Linear(octavo.int4_pack(q), scale, minimum, bias, group_size, order, activation)
    if isinstance(first, Int8Weight | Fp8Weight) and first.activations is not None:
        scale = torch.cat([output_scales(w) for w in weights if isinstance(w, Int8Weight | Fp8Weight)]).to(device)
        activations = first.activations
        if activations.scale is not None:
            activations = Activations(activations.granularity, activations.scale.to(device))
        q = _in_order(_stack(weights, "q", device), gated)
        return W8A8Linear(q, _in_order(scale, gated), bias, activations, activation)
    if isinstance(first, Int8Weight):
        q, scale = (_stack(weights, field, device) for field in ("q", "scale"))
        return Int8Linear(q, scale.t().contiguous(), bias, q.shape[1] // scale.shape[1])
    dense = [w.to(device, dtype) for w in weights if isinstance(w, torch.Tensor)]
    return DenseLinear(dense[0] if len(dense) == 1 else torch.cat(dense), bias)


def _interleaves(weight: Weight) -> bool:
    """Whether the op of gate's and up's format has an epilogue for them; outputs of blocks can't be interleaved."""
    if weight_shape(weight)[0] % 8:
        return False
    if isinstance(weight, Int8Weight | Fp8Weight):
        return weight.activations is not None and weight.activations.granularity != "group"
    return isinstance(weight, Int4Weight)


def _in_order(x: torch.Tensor, gated: bool) -> torch.Tensor:
    """What belongs to outputs, in the order that the layer has them in."""
    return octavo.interleave_gate_up(x) if gated else x


def supported(weight: Weight, device: torch.device, dtype: torch.dtype) -> Weight:
    """The weight as it is, or dense where no op computes with its format there."""
    if isinstance(weight, Fp8Weight) and not _fp8_runs(weight, device):
        return dequantize(weight, device).to(dtype)
    return weight


def _fp8_runs(weight: Fp8Weight, device: torch.device) -> bool:
    """Whether `fp8_linear` can compute this layer: its activations are to be fp8, and GPU and shape allow it."""
    if weight.activations is None:
        return False
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return False
    return weight.q.shape[1] % (BLOCK if weight.activations.granularity == "group" else 16) == 0


def output_scales(weight: Int8Weight | Fp8Weight) -> torch.Tensor:
    """fp32: one a row of the weight, or those of its blocks."""
    scale = weight.scale.float()
    if isinstance(weight, Int8Weight):
        return scale.reshape(-1)
    if weight.activations is not None and weight.activations.granularity == "group":
        return scale.contiguous()
    return scale.reshape(-1).expand(weight.q.shape[0]).contiguous()  # one a tensor serves all its outputs


def dequantize(weight: Weight, device: torch.device) -> torch.Tensor:
    """The weight `[N, K]` that a format stands for, in fp32; made on the device, where it is faster."""
    if isinstance(weight, torch.Tensor):
        return weight.to(device).float()
    q, scale = weight.q.to(device).float(), weight.scale.to(device).float()
    if isinstance(weight, Fp8Weight):
        n, k = q.shape
        return q * scale.repeat_interleave(weight.block[0], 0)[:n].repeat_interleave(weight.block[1], 1)[:, :k]
    groups = q.unflatten(1, (scale.shape[1], -1))
    if isinstance(weight, Int8Weight):
        return (groups * scale.unsqueeze(-1)).flatten(1)
    if weight.minimum is None:
        values = ((groups - 8) * scale.unsqueeze(-1)).flatten(1)
    else:
        values = (groups * scale.unsqueeze(-1) + weight.minimum.to(device).float().unsqueeze(-1)).flatten(1)
    return values if weight.order is None else values[:, weight.order.to(device).argsort()]


def _kind(weight: Weight) -> tuple[object, ...]:
    """What weights must have in common to be one layer."""
    if isinstance(weight, torch.Tensor):
        return (torch.Tensor,)
    groups = weight.scale.shape[1]
    if not isinstance(weight, Int4Weight):
        a = weight.activations
        return type(weight), groups, a and (a.granularity, None if a.scale is None else a.scale.item())
    return Int4Weight, groups, weight.minimum is None, None if weight.order is None else tuple(weight.order.tolist())


def _stack(weights: list[Weight], field: str, device: torch.device) -> torch.Tensor:
    return torch.cat([getattr(w, field).to(device) for w in weights])


def embed(layer: Linear, token_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of an embedding that is held as the linear layer that it may be tied to: `[T] -> [T, hidden]`."""
    if isinstance(layer, DenseLinear):
        return F.embedding(token_ids, layer.weight)
    if isinstance(layer, Int8Linear):
        return _rows(layer.weight[token_ids], layer.scale[:, token_ids]).to(dtype)
    if isinstance(layer, Int4Linear):
        groups, count = layer.scale.shape[0], len(token_ids)
        rows = layer.packed[token_ids // 64, :, token_ids % 64]  # tiles of 64 rows: [T, K / 128, 32]
        tiles = F.pad(rows, (0, 0, 0, 0, 0, -count % 64)).unflatten(0, (-1, 64)).transpose(1, 2)
        q = octavo.int4_unpack(tiles.contiguous(), count, groups * layer.group_size)
        if layer.minimum is None:
            values = _rows(q.float() - 8, layer.scale[:, token_ids])
        else:
            minimum = layer.minimum[:, token_ids].t().float().repeat_interleave(layer.group_size, dim=1)
            values = _rows(q, layer.scale[:, token_ids]) + minimum
        return (values if layer.order is None else values[:, layer.order.argsort()]).to(dtype)
    raise TypeError(f"layer: {type(layer).__name__} cannot serve as an embedding")


def _rows(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Integers `[T, K]` times their groups' scales `[groups, T]`, in fp32."""
    groups = q.unflatten(1, (scale.shape[0], -1))
    return (groups * scale.t().unsqueeze(-1).float()).flatten(1)
