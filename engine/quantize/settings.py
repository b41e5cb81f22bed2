"""What `octavo quantize` is asked for, and the `quantization_config` that says so to whoever loads the result."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from octavo.engine.config import ModelConfig
from octavo.engine.quantize.mixture import halves_of, routers

SCHEMES = ("int4", "int8", "fp8", "fp8-block")
METHODS = ("gptq", "rtn")
GROUP_SIZES = (32, 64, 128)
BLOCK = 128


@dataclass(frozen=True)
class Settings:
    """How the linear layers are quantised; embedding, norms and head stay as they are.

    Args:
        scheme: "int4", weights alone, symmetric, a scale for `group_size` inputs; "int8", a scale an output, and the
            layer's inputs quantised too, by token (W8A8); "fp8", the same in e4m3; "fp8-block", with a scale for 128 by
            128 weights and for 128 inputs of a token.
        method: "gptq" (Frantar et al. 2022, https://arxiv.org/abs/2210.17323): the error of each input's weights is
            made up for in those that follow, by calibration; or "rtn", round to nearest, the fast way, which is also
            that of experts who see few tokens of the calibration text.
        group_size: of int4, 32, 64 or 128: a divisor of every layer's inputs.
        act_order: of GPTQ, whether inputs are taken in the order of their size (groups stay as they lie, so that the
            layers cost the same; compressed-tensors calls it actorder "weight").
        damp: of GPTQ, what is added to the Hessian's diagonal, in parts of its mean; it keeps GPTQ from fitting a short
            calibration text.
        smooth: of int8, SmoothQuant's alpha (Xiao et al. 2022, https://arxiv.org/abs/2211.10438), by which large inputs
            of a layer are balanced with its weights, by what comes before it; behind norms it is where a search for the
            best balance begins. 0 does without. Of experts, whose norm is the router's too, down alone is balanced.
        calibration_tokens: of the calibration text at most.
        sequence_length: tokens of it that see each other. Every token attends to a sequence's first, which is unlike
            others: GPTQ weighs k's and v's inputs by the attention that they receive.
        keep: linear layers that stay as they are, by whole parts of their names: "down_proj" is that of every layer,
            "layers.0" all of the first. Those with the same input, q, k and v, gate and up, are kept together, since
            engines make one layer of them. compressed-tensors' `ignore` names them.
        weights_only: of int8, layers whose inputs stay as they are (W8A16), named like those of `keep`: for inputs that
            8 bits do not hold. Their weights are stored as compressed-tensors' "pack-quantized", in a group of their
            own.

    Raises:
        ValueError: a value that is not accepted.
    """

    scheme: str
    method: str = "gptq"
    group_size: int = 128
    act_order: bool = True
    damp: float = 0.1
    smooth: float = 0.5
    calibration_tokens: int = 128 * 2048
    sequence_length: int = 128
    keep: tuple[str, ...] = ()
    weights_only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, supported in (("scheme", SCHEMES), ("method", METHODS), ("group_size", GROUP_SIZES)):
            if getattr(self, name) not in supported:
                raise ValueError(
                    f"{name}: {getattr(self, name)!r}; expected one of {', '.join(str(s) for s in supported)}"
                )
        if not 0 < self.damp <= 1:
            raise ValueError(f"damp: {self.damp}; expected more than 0 and at most 1")
        if not 0 <= self.smooth < 1:
            raise ValueError(f"smooth: {self.smooth}; expected 0 (off) or less than 1; 0.5 is usual")
        if self.weights_only and self.scheme != "int8":
            raise ValueError(f"weights_only: {self.weights_only}, but the scheme is {self.scheme}: it is for int8")
        for name in ("calibration_tokens", "sequence_length"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}: {getattr(self, name)}; expected at least 2")

    @property
    def uses_gptq(self) -> bool:
        return self.method == "gptq"

    @property
    def smooths(self) -> bool:
        return self.scheme == "int8" and self.smooth > 0

    @property
    def calibrates(self) -> bool:
        """Whether the result depends on a calibration text."""
        return self.uses_gptq or self.smooths

    def effective(self) -> dict[str, Any]:
        """What has a say in the result."""
        names = {"scheme", "method"}
        if self.scheme == "int4":
            names |= {"group_size"}
        if self.uses_gptq:
            names |= {"act_order", "damp"}
        if self.scheme == "int8":
            names |= {"smooth"}
        if self.calibrates:
            names |= {"calibration_tokens", "sequence_length"}
        effective = {name: value for name, value in asdict(self).items() if name in names}
        named = {"keep": self.keep, "weights_only": self.weights_only}
        return effective | {name: list(parts) for name, parts in named.items() if parts}

    def kept(self, config: ModelConfig) -> list[str]:
        """The full names of the layers that stay as they are."""
        return _named(self.keep, config)

    def ignored(self, config: ModelConfig) -> list[str]:
        """The full names of the linear layers that are not quantised, the routers of experts among them."""
        return [*routers(config), *self.kept(config)]

    def by_weights_only(self, config: ModelConfig) -> list[str]:
        """The full names of the layers whose inputs stay as they are."""
        kept = set(self.kept(config))
        return [name for name in _named(self.weights_only, config) if name not in kept]

    def check(self, config: ModelConfig) -> None:
        """Looks at every linear layer's shape before any work is done.

        Raises:
            ValueError: a shape that the scheme does not fit; it names the tensor, and what would fit. Or a part of
                `keep` or `weights_only` that no layer has, or a mixture of experts that is not Mixtral.
        """
        if config.num_local_experts and config.architecture != "MixtralForCausalLM":
            raise ValueError(
                f"architecture: {config.architecture}; octavo quantize takes dense models and Mixtral: quantise other "
                "mixtures of experts with llm-compressor or GPTQModel, whose checkpoints octavo loads"
            )
        for name in ("keep", "weights_only"):
            for part in getattr(self, name):
                if not _named((part,), config):
                    raise ValueError(
                        f"{name}: {part!r} is in no linear layer's name, such as model.layers.0.mlp.down_proj"
                    )
        c = config
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        shapes = {
            "self_attn.q_proj": (q, c.hidden_size),
            "self_attn.k_proj": (kv, c.hidden_size),
            "self_attn.v_proj": (kv, c.hidden_size),
            "self_attn.o_proj": (c.hidden_size, q),
        }
        mlp = halves_of(config)[1]  # of experts, the first's
        shapes |= dict.fromkeys(mlp.first, (c.intermediate_size, c.hidden_size))
        shapes[mlp.last] = c.hidden_size, c.intermediate_size
        for name, (n, k) in shapes.items():
            at = f"model.layers.0.{name}.weight"
            if self.scheme == "int4" and k % self.group_size:
                fitting = [str(g) for g in GROUP_SIZES if not any(inputs % g for _, inputs in shapes.values())]
                advice = f"choose {' or '.join(fitting)}" if fitting else "no group size fits this model: choose int8"
                raise ValueError(f"group_size: {self.group_size} does not divide the {k} inputs of {at}: {advice}")
            if self.scheme == "fp8-block" and (k % BLOCK or n % BLOCK):
                raise ValueError(
                    f"scheme: fp8-block, but {at} has {n} outputs and {k} inputs, no multiples of {BLOCK}: choose fp8, "
                    "whose scales are by output"
                )
            if k % 32:
                raise ValueError(f"{at}: {k} inputs; expected a multiple of 32")

    def quantization_config(self, kept: Sequence[str] = (), weights_only: Sequence[str] = ()) -> dict[str, Any]:
        """config.json's entry, in compressed-tensors' terms.

        Args:
            kept: the full names of layers that are not quantised.
            weights_only: of those whose inputs are not.
        """
        bits, kind = (4 if self.scheme == "int4" else 8), ("float" if self.scheme.startswith("fp8") else "int")
        weights: dict[str, Any] = dict(num_bits=bits, type=kind, symmetric=True, dynamic=False)
        inputs: dict[str, Any] = dict(num_bits=8, type=kind, symmetric=True, dynamic=True)
        if self.scheme == "int4":
            weights |= dict(strategy="group", group_size=self.group_size)
            if self.uses_gptq and self.act_order:
                weights["actorder"] = "weight"
        elif self.scheme == "fp8-block":
            weights |= dict(strategy="block", block_structure=[BLOCK, BLOCK])
            inputs |= dict(strategy="group", group_size=BLOCK)
        else:
            weights |= dict(strategy="channel")
            inputs |= dict(strategy="token")
        form = {"int4": "pack-quantized", "int8": "int-quantized"}.get(self.scheme, "float-quantized")
        group: dict[str, Any] = dict(targets=["Linear"], weights=weights, format=form)
        group["input_activations"] = None if self.scheme == "int4" else inputs
        groups = {"group_0": group}
        if weights_only:
            groups["group_1"] = group | dict(targets=[*weights_only], input_activations=None, format="pack-quantized")
            form = "mixed-precision"
        return dict(
            quant_method="compressed-tensors",
            quantization_status="compressed",
            format=form,
            config_groups=groups,
            ignore=["lm_head", *kept],
            kv_cache_scheme=None,
        )


def _named(parts: Sequence[str], config: ModelConfig) -> list[str]:
    """The full names of the linear layers that have one of the parts in theirs, and of those with the same input."""

    def named(modules: list[str]) -> bool:
        return any(f".{part}." in f".{module}." for part in parts for module in modules)

    same_input = [of for half in halves_of(config) for of in (half.first, (half.last,))]
    inputs = [[f"model.layers.{i}.{m}" for m in of] for i in range(config.num_hidden_layers) for of in same_input]
    return [module for modules in inputs if named(modules) for module in modules]
