"""Quantising one layer, half by half: each linear layer sees in calibration what those before it have become."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

import octavo
from octavo.engine.checkpoint import Weight
from octavo.engine.layers import Linear, dequantize, make_linear
from octavo.engine.packed_formats import packed_format
from octavo.engine.quantize.forward import ATTENTION, HALVES, MLP, Forward, Half, HalfWeights, MixtureWeights, Stream
from octavo.engine.quantize.gptq import gptq
from octavo.engine.quantize.mixture import FEW, Routed, halves_of, layout_of, mixture_weights
from octavo.engine.quantize.rounding import round_to_nearest, stored
from octavo.engine.quantize.settings import BLOCK, Settings
from octavo.engine.quantize.smooth import TOKENS, Largest, balance, balance_rows

Tensors = dict[str, torch.Tensor]


class LayerQuantizer:
    """Quantises layers of one model.

    Args:
        settings: how.
        forward: the model's computation.
        stored_dtype: of what stays dense, and of int4's scales.
        dtype: of the computation in calibration.
    """

    def __init__(self, settings: Settings, forward: Forward, stored_dtype: torch.dtype, dtype: torch.dtype) -> None:
        self.settings, self.forward = settings, forward
        self.stored_dtype, self.dtype, self.device = stored_dtype, dtype, forward.device
        self.kept = frozenset(settings.kept(forward.config))
        weights_only = settings.by_weights_only(forward.config)
        self.weights_only = frozenset(weights_only)
        self.format, _ = packed_format(settings.quantization_config(weights_only=weights_only))

    def quantize(
        self, name: str, weights: dict[str, Weight], calibration: Stream | None, progress: Callable[[str], None]
    ) -> tuple[Tensors, list[dict[str, Any]]]:
        """Quantises a layer and moves the calibration's hidden states past it.

        Args:
            name: the layer's, "model.layers.0".
            weights: the layer's, by full names.
            calibration: the hidden states before it, or None for settings that need none.
            progress: called with the name of what is at work.

        Returns:
            The tensors to be stored, by full names on the CPU, and a row of the report for each weight.

        Raises:
            ValueError: weights or inputs that are not finite; it names the layer.
        """
        tensors: Tensors = {
            key: dequantize(weight, torch.device("cpu")).to(self.stored_dtype)
            for key, weight in weights.items()
            if key.endswith((".bias", "layernorm.weight"))
        }
        rows: list[dict[str, Any]] = []
        if self.forward.config.num_local_experts:
            rows += self._quantize_half(name, ATTENTION, weights, tensors, calibration, progress)
            return tensors, rows + self._quantize_experts(name, weights, tensors, calibration, progress)
        for half in HALVES:
            rows += self._quantize_half(name, half, weights, tensors, calibration, progress)
        return tensors, rows

    def halves(self, name: str, tensors: Tensors) -> tuple[HalfWeights | MixtureWeights, ...]:
        """A quantised layer as it is calibrated on: dense, and its activations as they are."""
        attention = self._dense_half(name, ATTENTION, tensors)
        if self.forward.config.num_local_experts:
            return attention, self._dense_mixture(name, tensors)
        return attention, self._dense_half(name, MLP, tensors)

    def _quantize_half(
        self,
        name: str,
        half: Half,
        weights: dict[str, Weight],
        tensors: Tensors,
        calibration: Stream | None,
        progress: Callable[[str], None],
    ) -> list[dict[str, Any]]:
        """Adds a half's tensors to `tensors`; returns their rows of the report."""
        forward, at = self.forward, f"{name}.{half.norm}.weight"
        first, last = [f"{name}.{module}" for module in half.first], f"{name}.{half.last}"
        progress(first[0])
        values = [self._values(module, weights) for module in first]
        last_values = self._values(last, weights)
        if calibration is not None and self.settings.smooths:
            last_values = self._smooth(at, half, first, values, last_values, tensors, calibration)
        norm = tensors[at].to(self.device, self.dtype)
        if half is ATTENTION and calibration is not None and self.settings.uses_gptq and first[0] not in self.kept:
            rows = []
            biases = [tensors.get(f"{module}.bias") for module in first]
            linear = make_linear([*values], biases, self.device, self.dtype)
            hessians = self._attention_hessians(calibration, norm, linear)
            for module, of, of_module in zip(first, values, hessians, strict=True):
                rows += self._round([module], [of], of_module, tensors)
        else:
            seen = None if first[0] in self.kept else calibration
            hessian = self._hessian(seen, lambda hidden: forward.first_inputs(hidden, norm))
            rows = self._round(first, values, hessian, tensors)
        progress(last)
        linear = self._dense_linear(first, tensors)
        hessian = self._hessian(
            None if last in self.kept else calibration,
            lambda hidden: forward.last_inputs(half, linear(forward.first_inputs(hidden, norm))),
        )
        rows += self._round([last], [last_values], hessian, tensors)
        if calibration is not None:
            calibration.advance(partial(forward.half, half, self._dense_half(name, half, tensors)))
        return rows

    def _quantize_experts(
        self,
        name: str,
        weights: dict[str, Weight],
        tensors: Tensors,
        calibration: Stream | None,
        progress: Callable[[str], None],
    ) -> list[dict[str, Any]]:
        """The same of a mixture, an expert after the other; the router stays as it is."""
        router = f"{layout_of(self.forward.config).router(int(name.rpartition('.')[2]))}.weight"
        tensors[router] = dequantize(weights[router], torch.device("cpu")).to(self.stored_dtype)
        routed = None
        if calibration is not None:
            norm = tensors[f"{name}.{MLP.norm}.weight"].to(self.device, self.dtype)
            routed = Routed(self.forward, calibration, norm, tensors[router].to(self.device, self.dtype))
        rows = []
        for expert, half in enumerate(halves_of(self.forward.config)[1:]):
            rows += self._quantize_expert(name, expert, half, weights, tensors, routed, progress)
        if calibration is not None:
            calibration.advance(partial(self.forward.half, MLP, self._dense_mixture(name, tensors)))
        return rows

    def _quantize_expert(
        self,
        name: str,
        expert: int,
        half: Half,
        weights: dict[str, Weight],
        tensors: Tensors,
        routed: Routed | None,
        progress: Callable[[str], None],
    ) -> list[dict[str, Any]]:
        first, last = [f"{name}.{module}" for module in half.first], f"{name}.{half.last}"
        progress(first[0])
        values, last_values = [self._values(module, weights) for module in first], self._values(last, weights)
        count = 0 if routed is None else routed.count(expert)
        if routed is not None and count and self.settings.smooths:
            largest = Largest(len(values[0]), self.device)
            linear = make_linear([torch.cat(values)], [None], self.device, self.dtype)
            for x in routed.inputs(expert):
                largest.add(octavo.silu_and_mul(linear(x)))
            values[1], last_values, _ = balance_rows(values[1], last_values, largest.value, self.settings.smooth, 1)
        seen = None if count < FEW else routed
        hessian = None
        if seen is not None and first[0] not in self.kept:
            hessian = self._hessian(seen.inputs(expert), lambda x: x)
        rows = self._round(first, values, hessian, tensors)
        hessian = None
        if seen is not None and last not in self.kept:
            made = self._dense_linear(first, tensors)
            hessian = self._hessian(seen.inputs(expert), lambda x: octavo.silu_and_mul(made(x)))
        rows += self._round([last], [last_values], hessian, tensors)
        if routed is not None:
            rows = [row | {"tokens": count} for row in rows]
            if seen is None and self.settings.uses_gptq:
                rows = [row if "kept" in row else row | {"rounded": True} for row in rows]
        return rows

    def _smooth(
        self,
        norm_name: str,
        half: Half,
        modules: list[str],
        values: list[torch.Tensor],
        last_values: torch.Tensor,
        tensors: Tensors,
        calibration: Stream,
    ) -> torch.Tensor:
        """Balances both of a half's inputs; changes the norm and bias in `tensors` and `values`, returns the last."""
        forward, alpha = self.forward, self.settings.smooth
        norm = tensors[norm_name].to(self.device)
        dense: list[Weight] = [torch.cat(values)]
        biases = [tensors[f"{m}.bias"] for m in modules if f"{m}.bias" in tensors]
        linear = make_linear(dense, [torch.cat(biases) if biases else None], self.device, self.dtype)
        first, last = (Largest(w.shape[1], self.device) for w in (values[0], last_values))
        every = -(-sum(map(len, calibration.sequences)) // TOKENS)
        sample = []
        for hidden in calibration:
            x = forward.first_inputs(hidden, norm.to(self.dtype))
            first.add(x)
            sample.append(x[::every])
            last.add(forward.last_inputs(half, linear(x)))
        if modules[0] not in self.kept | self.weights_only:
            norm, values[:] = balance(norm, values, first.value, alpha, torch.cat(sample))
        tensors[norm_name] = norm.cpu()
        heads = forward.config.num_key_value_heads if half is ATTENTION else 1
        values[-1], last_values, s = balance_rows(values[-1], last_values, last.value, alpha, heads)
        if f"{modules[-1]}.bias" in tensors:
            bias = tensors[f"{modules[-1]}.bias"]
            tensors[f"{modules[-1]}.bias"] = (bias.to(self.device).float() / s).to(bias.dtype).cpu()
        return last_values

    def _values(self, module: str, weights: dict[str, Weight]) -> torch.Tensor:
        """`[N, K]`, fp32, on the device."""
        values = dequantize(weights[f"{module}.weight"], self.device)
        if not values.isfinite().all():
            raise ValueError(f"{module}.weight: has values that are not finite")
        return values

    def _hessian(
        self, calibration: Iterable[torch.Tensor] | None, inputs: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor | None:
        if calibration is None or not self.settings.uses_gptq:
            return None
        total: torch.Tensor | None = None
        for hidden in calibration:
            x = inputs(hidden).float()
            total = torch.zeros(x.shape[1], x.shape[1], device=self.device) if total is None else total
            total.addmm_(x.t(), x)
        return total

    def _attention_hessians(
        self, calibration: Stream, norm: torch.Tensor, linear: Linear
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of q, k and v, whose outputs matter as far as they are attended to, the first token's most of all.

        With a the probabilities of a head, a token's attention is sum_j a_j v_j = W_v (sum_j a_j x_j): these are the
        inputs of v. It follows the logit of token j by a_j (1 - a_j) times how v_j differs from the others: by that k's
        inputs are weighted. Summed over heads.
        """
        totals: list[torch.Tensor] = []
        for hidden in calibration:
            x = self.forward.first_inputs(hidden, norm)
            qkv, x = linear(x), x.float()
            if not totals:
                totals = [torch.zeros(x.shape[1], x.shape[1], device=self.device) for _ in range(3)]
            of_k = torch.zeros(len(x), device=self.device)
            for a in self.forward.probabilities(qkv):
                attended = (a @ x).flatten(0, 1)
                totals[2].addmm_(attended.t(), attended)
                of_k += (a * (1 - a)).square().sum((0, 1))
            totals[0].addmm_(x.t(), x)
            totals[1].addmm_((x * of_k[:, None]).t(), x)
        return totals[0], totals[1], totals[2]

    def _round(
        self, modules: list[str], values: list[torch.Tensor], hessian: torch.Tensor | None, tensors: Tensors
    ) -> list[dict[str, Any]]:
        """Quantises layers that have the same inputs."""
        s = self.settings
        if modules[0] in self.kept:
            return [self._keep(module, w, tensors) for module, w in zip(modules, values, strict=True)]
        weight = torch.cat(values)
        if hessian is None:
            q, scale = round_to_nearest(weight, s, self.stored_dtype)
        else:
            try:
                q, scale = gptq(weight, hessian, s, self.stored_dtype)
            except ValueError as reason:
                raise ValueError(f"{modules[0]}: {reason}") from None
        rows, sizes = [], [len(w) for w in values]
        scales = scale.split([n // BLOCK for n in sizes] if s.scheme == "fp8-block" else sizes)
        for module, w, codes, of in zip(modules, values, q.split(sizes), scales, strict=True):
            parts = stored(codes, of, s, packed=s.scheme == "int4" or module in self.weights_only)
            tensors |= {f"{module}.{suffix}": part for suffix, part in parts.items()}
            error = dequantize(self.format.of(module).weight(module, parts), self.device) - w
            row = {"name": f"{module}.weight", "error": (error.norm() / w.norm()).item()}
            if hessian is not None:
                row["output_error"] = (_energy(error, hessian) / _energy(w, hessian)) ** 0.5
            rows.append(row)
        return rows

    def _keep(self, module: str, values: torch.Tensor, tensors: Tensors) -> dict[str, Any]:
        name = f"{module}.weight"
        tensors[name] = values.to(self.stored_dtype).cpu()
        error = tensors[name].to(self.device).float() - values
        return {"name": name, "error": (error.norm() / values.norm()).item(), "kept": True}

    def _weight(self, module: str, tensors: Tensors) -> Weight:
        if module in self.kept:
            return tensors[f"{module}.weight"]
        form = self.format.of(module)
        return form.weight(module, {suffix: tensors[f"{module}.{suffix}"] for suffix in form.required})

    def _dense_linear(self, modules: list[str], tensors: Tensors) -> Linear:
        weights: list[Weight] = [dequantize(self._weight(m, tensors), self.device) for m in modules]
        return make_linear(weights, [tensors.get(f"{m}.bias") for m in modules], self.device, self.dtype)

    def _dense_mixture(self, name: str, tensors: Tensors) -> MixtureWeights:
        config = self.forward.config
        norm = tensors[f"{name}.{MLP.norm}.weight"].to(self.device, self.dtype)
        router = tensors[f"{layout_of(config).router(int(name.rpartition('.')[2]))}.weight"]
        modules = [f"{name}.{module}" for half in halves_of(config)[1:] for module in half.modules]
        experts = ((f"{m}.weight", dequantize(self._weight(m, tensors), self.device)) for m in modules)
        return mixture_weights(config, norm, router, experts, self.device)

    def _dense_half(self, name: str, half: Half, tensors: Tensors) -> HalfWeights:
        norm = tensors[f"{name}.{half.norm}.weight"].to(self.device, self.dtype)
        first = self._dense_linear([f"{name}.{module}" for module in half.first], tensors)
        return HalfWeights(norm, first, self._dense_linear([f"{name}.{half.last}"], tensors))


def _energy(change: torch.Tensor, hessian: torch.Tensor) -> float:
    """The sum of squares of the outputs that a weight makes of the inputs behind a Hessian."""
    return ((change @ hessian) * change).sum().clamp(min=torch.finfo(torch.float32).tiny).item()
