"""Models of random weights in the shape of real ones, made on the device, without files.

They come to the engine as a checkpoint does: tensor by tensor, in the formats of compressed-tensors, through the same
loader, which packs and interleaves them and lays experts in place. So beside the model there is never more than its
largest layer.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from octavo.bench import shapes
from octavo.bench.shapes import Model
from octavo.engine.checkpoint import CPU, Activations, Entry, Fp8Weight, Int4Weight, Int8Weight, Weight
from octavo.engine.config import ModelConfig
from octavo.engine.loader import expected_shapes, load_model

GROUP = 128
SCHEMES = ("bf16", "fp8", "int8", "int4")
"""Linear layers in bf16; in fp8 and int8 with scales by output and inputs by token; in int4 with groups of 128.

Embedding, head and routers are bf16 in all of them.
"""


@dataclass(frozen=True)
class Served:
    """What the engine must know of a model beside its sizes: of `config.json`, what costs depend on."""

    model: Model
    architecture: str = "LlamaForCausalLM"
    context: int = 8192
    rope_theta: float = 10000.0


TINY = Model("tiny", 128, 256, 2, 2, 1, 64, 512)
TINY_MIXTURE = Model("tiny-mixture", 128, 256, 2, 2, 1, 64, 512, experts=4, experts_per_token=2)
_SERVED = (
    Served(shapes.LLAMA_3_8B, rope_theta=500000.0),
    Served(shapes.LLAMA_2_70B, context=4096),
    Served(shapes.MISTRAL_7B, "MistralForCausalLM", 32768),
    Served(shapes.MIXTRAL_8X7B, "MixtralForCausalLM", 32768, 1e6),
    Served(shapes.LLAMA_3_2_1B, context=131072, rope_theta=500000.0),
    Served(shapes.PHI_3_MINI, context=4096),
    Served(shapes.QWEN3_30B_A3B, "Qwen3MoeForCausalLM", 40960, 1e6),
    Served(TINY, context=2048),
    Served(TINY_MIXTURE, "MixtralForCausalLM", 2048),
)
SERVED = {served.model.name: served for served in _SERVED}
"""The models that the engine has a place for; the tiny ones are for a look at the commands."""


def find(name: str) -> Served:
    """A model by its name, in upper or lower case.

    Raises:
        ValueError: there is none of that name.
    """
    for known, served in SERVED.items():
        if known.lower() == name.lower():
            return served
    raise ValueError(f"random weights: {name!r}; there are shapes of {', '.join(SERVED)}")


def model_config(served: Served, layers: int | None = None) -> ModelConfig:
    """The configuration of a model, of all its layers or of the first few."""
    m = served.model
    return ModelConfig(
        architecture=served.architecture,
        vocab_size=m.vocab,
        hidden_size=m.hidden,
        intermediate_size=m.intermediate,
        num_hidden_layers=layers or m.layers,
        num_attention_heads=m.heads,
        num_key_value_heads=m.kv_heads,
        head_dim=m.head_dim,
        rms_norm_eps=1e-5,
        max_position_embeddings=served.context,
        rope_theta=served.rope_theta,
        rope_scaling=None,
        sliding_window=m.window,
        tie_word_embeddings=m.tied,
        attention_bias=False,
        mlp_bias=False,
        hidden_act="silu",
        bos_token_id=None,
        eos_token_ids=(),
        dtype=torch.bfloat16,
        num_local_experts=m.experts,
        num_experts_per_tok=m.experts_per_token,
        qk_norm=served.architecture == "Qwen3MoeForCausalLM",
    )


class RandomCheckpoint:
    """Weights that are drawn where a checkpoint's would be read; the same ones on the same device for the same seed.

    Args:
        config: of the model.
        scheme: one of `SCHEMES`.
        name: what messages call it.
        seed: of the draws.

    Raises:
        ValueError: another scheme, or int4 groups that do not fit the model's sizes.
    """

    def __init__(self, config: ModelConfig, scheme: str, name: str = "random weights", seed: int = 0) -> None:
        if scheme not in SCHEMES:
            raise ValueError(f"scheme: {scheme!r}; expected {', '.join(SCHEMES)}")
        self.path, self.config, self.scheme, self.seed = Path(name), config, scheme, seed
        self.notes = ["weights are random: what the model says means nothing"]
        self.index: Mapping[str, Entry] = {n: Entry(self.path, s) for n, s in expected_shapes(config).items()}
        for tensor, entry in self.index.items():
            if scheme == "int4" and self._is_quantised(tensor) and entry.shape and entry.shape[1] % GROUP:
                raise ValueError(f"scheme: int4, but {tensor} has {entry.shape[1]} inputs, no multiple of {GROUP}")
        self.num_bytes = sum(self._bytes(tensor, entry.shape or ()) for tensor, entry in self.index.items())

    def tensors(
        self,
        device: torch.device = CPU,
        dtype: torch.dtype | None = None,
        progress: Callable[[int], None] | None = None,
        *,
        prefix: str = "",
    ) -> Iterator[tuple[str, Weight]]:
        """Draws one weight at a time on the device; see `Checkpoint`."""
        generator = torch.Generator(device).manual_seed(self.seed)
        for name, entry in self.index.items():
            assert entry.shape is not None
            if name.startswith(prefix):
                yield name, self._draw(name, entry.shape, generator)
                if progress is not None:
                    progress(self._bytes(name, entry.shape))

    def tokenizer(self) -> Any:
        raise ValueError(f"{self.path}: there is no tokenizer: give token ids")

    def _is_quantised(self, name: str) -> bool:
        """Whether it is a linear layer's or an expert's: not embedding, head, router or norm."""
        at_layer, module = name.startswith("model.layers."), name.rpartition(".")[0]
        return self.scheme != "bf16" and at_layer and not module.endswith(("norm", ".gate"))

    def _bytes(self, name: str, shape: tuple[int, ...]) -> int:
        """As the scheme stores it, scales included."""
        count = torch.Size(shape).numel()
        if not self._is_quantised(name):
            return 2 * count
        return count // 2 + 2 * count // GROUP if self.scheme == "int4" else count + 4 * shape[0]

    def _draw(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Weight:
        """A weight whose layer's outputs are about as large as its inputs."""
        device = generator.device
        if len(shape) == 1:  # a norm's
            return torch.ones(shape, dtype=torch.bfloat16, device=device)
        (n, k), size = shape, shape[1] ** -0.5

        def integers(low: int, high: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.randint(low, high, (n, k), generator=generator, device=device, dtype=dtype)

        def scales(groups: int, spread: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((n, groups), size / spread, device=device, dtype=dtype)

        if self._is_quantised(name) and self.scheme == "int4":
            return Int4Weight(integers(0, 16, torch.uint8), scales(k // GROUP, 4.6, torch.bfloat16), None, GROUP)
        by_token = Activations("token")
        if self._is_quantised(name) and self.scheme == "int8":
            return Int8Weight(integers(-127, 128, torch.int8), scales(1, 73, torch.float32), k, by_token)
        values = torch.randn(n, k, generator=generator, device=device, dtype=torch.bfloat16)
        if self._is_quantised(name):
            return Fp8Weight(values.to(torch.float8_e4m3fn), scales(1, 1, torch.float32), (1, k), by_token)
        return values.mul_(size)


def random_checkpoint(name: str, scheme: str, layers: int | None = None, seed: int = 0) -> RandomCheckpoint:
    """The checkpoint of a model of random weights.

    Args:
        name: one of `SERVED`.
        scheme: one of `SCHEMES`.
        layers: only so many of them; all by default.
        seed: of the draws.

    Raises:
        ValueError: no such name or scheme, or a number of layers that the model has not.
    """
    served = find(name)
    if layers is not None and not 1 <= layers <= served.model.layers:
        raise ValueError(f"layers: {layers}; {served.model.name} has 1 to {served.model.layers}")
    return RandomCheckpoint(model_config(served, layers), scheme, f"random {served.model.name}, {scheme}", seed)


def random_decoder(
    name: str,
    scheme: str,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    layers: int | None = None,
    max_model_len: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
):
    """A model of random weights, ready to serve, loaded as a checkpoint of it would be.

    Args:
        name, scheme, layers, seed: see `random_checkpoint`.
        device: where it is made.
        dtype: of activations and dense weights; by default bf16 on a GPU, fp32 on a CPU.
        max_model_len: rows of the rotary table; by default the model's context.
        progress: called with the bytes of each weight that was made.

    Raises:
        ValueError: see `random_checkpoint`.
    """
    checkpoint = random_checkpoint(name, scheme, layers, seed)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    context = checkpoint.config.max_position_embeddings
    return load_model(checkpoint, device, dtype, max_model_len or context, progress)
