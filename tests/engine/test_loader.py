"""A checkpoint that does not fit its configuration is refused by name."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

import octavo
from octavo.engine.checkpoint import Entry, Int4Weight, Int8Weight
from octavo.engine.config import ModelConfig
from octavo.engine.layers import (
    DenseLinear,
    GatedLinear,
    Int4Linear,
    Int8Linear,
    SplitLinear,
    embed,
    make_linear,
    weight_shape,
)
from octavo.engine.loader import expected_shapes, load_model

CPU, F32 = torch.device("cpu"), torch.float32
CONFIG = ModelConfig.from_hf(
    dict(
        architectures=["LlamaForCausalLM"],
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        rms_norm_eps=1e-5,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        hidden_act="silu",
        bos_token_id=1,
        eos_token_id=2,
        rope_theta=10000.0,
        torch_dtype="float32",
    )
)


@dataclass
class Made:
    """A checkpoint out of thin air."""

    weights: dict
    config: ModelConfig = CONFIG
    notes: list = field(default_factory=list)
    num_bytes: int = 0
    path: Path = Path("made-up")
    read: list = field(default_factory=list)

    @property
    def index(self):
        return {name: Entry(self.path / "file", weight_shape(weight)) for name, weight in self.weights.items()}

    def tensors(self, device, dtype, progress):
        for name, weight in self.weights.items():
            self.read.append(name)
            yield name, weight


def weights(config=CONFIG):
    return {name: torch.randn(shape) for name, shape in expected_shapes(config).items()}


def load(made):
    return load_model(made, CPU, F32, 64)


def test_any_order_of_tensors_gives_the_same_model():
    made = weights()
    forwards, backwards = load(Made(made)), load(Made(dict(reversed(made.items()))))
    assert torch.equal(forwards.layers[1].qkv.weight, backwards.layers[1].qkv.weight)
    q, k, v = (made[f"model.layers.1.self_attn.{p}_proj.weight"] for p in "qkv")
    assert torch.equal(forwards.layers[1].qkv.weight, torch.cat([q, k, v]))


def assert_refused(made, message):
    """With that error, and before any tensor is read."""
    checkpoint = Made(made)
    with pytest.raises(ValueError, match=message):
        load(checkpoint)
    assert not checkpoint.read


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight", "lm_head.weight"])
def test_missing_tensor(name):
    made = weights()
    del made[name]
    assert_refused(made, rf"made-up: {name}: missing from the checkpoint$")


def test_missing_tensors_are_counted():
    made = {name: weight for name, weight in weights().items() if ".layers.1." not in name}
    assert_refused(
        made, r"made-up: model\.layers\.1\.input_layernorm\.weight: missing from the checkpoint \(and 8 more\)"
    )


def test_unexpected_tensor():
    made = weights() | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}
    assert_refused(made, r"made-up/file: model\.layers\.0\.self_attn\.q_proj\.bias: unexpected")


def test_wrong_shape():
    made = weights() | {"model.layers.0.mlp.up_proj.weight": torch.zeros(64, 31)}
    assert_refused(made, r"made-up/file: model\.layers\.0\.mlp\.up_proj\.weight: shape \(64, 31\).* says \(64, 32\)")


def test_a_tied_head_stored_twice_is_ignored():
    config = replace(CONFIG, tie_word_embeddings=True)
    made = weights(config) | {"lm_head.weight": torch.zeros(50, 32)}
    model = load(Made(made, config))
    assert model.head is model.embedding


@pytest.mark.parametrize(
    "names",
    [
        ("k_scale", "v_scale"),
        ("attn.k_scale", "attn.v_scale"),
        ("k_proj.k_scale", "v_proj.v_scale"),
        ("k_proj.output_scale", "v_proj.output_scale"),
    ],
    ids=str,
)
def test_scales_of_the_cache_by_all_their_names(names):
    at = "model.layers.1.self_attn"
    scales = {f"{at}.{names[0]}": torch.tensor(0.5), f"{at}.{names[1]}": torch.tensor([0.25]).bfloat16()}
    layers = load(Made(weights() | scales | {f"{at}.q_scale": torch.ones(1)})).layers
    assert layers[0].k_scale is None and layers[0].v_scale is None
    for scale, expected in ((layers[1].k_scale, 0.5), (layers[1].v_scale, 0.25)):
        assert scale.dtype == torch.float32 and scale.tolist() == [expected]


@pytest.mark.parametrize("own_first", [True, False])
def test_one_scale_for_keys_and_values_is_theirs_where_they_have_none_of_their_own(own_first):
    at = "model.layers.0.self_attn"
    scales = {f"{at}.kv_scale": torch.tensor([0.5]), f"{at}.v_scale": torch.tensor([0.25])}
    scales = dict(reversed(scales.items())) if own_first else scales
    layer = load(Made(weights() | scales)).layers[0]
    assert (layer.k_scale.tolist(), layer.v_scale.tolist()) == ([0.5], [0.25])


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), [1.0, 2.0]], ids=str)
def test_a_scale_of_the_cache_that_is_none(scale):
    name = "model.layers.0.self_attn.k_scale"
    with pytest.raises(ValueError, match=rf"made-up/file: {name}: .*; expected one positive number, or 1, one a head"):
        load(Made(weights() | {name: torch.tensor(scale)}))


def int4(n, k=64):
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    scale, minimum = torch.rand(n, k // 32).half(), torch.randn(n, k // 32).half()
    dense = q.float() * scale.float().repeat_interleave(32, 1) + minimum.float().repeat_interleave(32, 1)
    return Int4Weight(q=q, scale=scale, minimum=minimum), dense


@pytest.mark.parametrize(("same", "kind"), [(True, Int4Linear), (False, SplitLinear)])
def test_layers_of_one_order_of_inputs_are_stacked(same, kind):
    orders = [torch.randperm(64), torch.randperm(64)]
    parts = [int4(n) for n in (24, 8)]
    weights = [replace(w, order=orders[0 if same else i]) for i, (w, _) in enumerate(parts)]
    layer = make_linear(weights, [None, None], CPU, F32)
    assert isinstance(layer, kind)
    dense = torch.cat([d[:, w.order.argsort()] for w, (_, d) in zip(weights, parts, strict=True)])
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), x @ dense.t(), rtol=1e-4, atol=1e-3)
    if same:
        torch.testing.assert_close(embed(layer, torch.tensor([30, 2]), F32), dense[[30, 2]])


def int8(n, k=64):
    q = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    scale = torch.rand(n, k // 32).half()
    return Int8Weight(q=q, scale=scale), q.float() * scale.float().repeat_interleave(32, 1)


@pytest.mark.parametrize(
    ("makers", "kind"),
    [
        ((int4, int4, int4), Int4Linear),
        ((int8, int8), Int8Linear),
        ((int4, int8, int4), SplitLinear),
        ((lambda n: (torch.randn(n, 64),) * 2, int8), SplitLinear),
    ],
)
def test_stacked_layers_compute_what_their_parts_would(makers, kind):
    parts = [make(n) for make, n in zip(makers, (24, 8, 40), strict=False)]
    layer = make_linear([w for w, _ in parts], [None] * len(parts), CPU, F32)
    assert isinstance(layer, kind)
    x = torch.randn(3, 64)
    dense = torch.cat([(w[0] if isinstance(w, tuple) else w) for _, w in parts])
    torch.testing.assert_close(layer(x), x @ dense.t(), rtol=1e-4, atol=1e-3)


def test_biases_are_stacked_too():
    a, b = torch.randn(4, 8), torch.randn(2, 8)
    layer = make_linear([a, b], [torch.ones(4), torch.full((2,), 2.0)], CPU, F32)
    assert isinstance(layer, DenseLinear)
    assert torch.equal(layer(torch.zeros(1, 8)), torch.tensor([[1.0, 1, 1, 1, 2, 2]]))


@pytest.mark.parametrize("make", [int4, int8])
def test_embedding_rows_are_the_weights_rows(make):
    weight, dense = make(50)
    layer = make_linear([weight], [None], CPU, F32)
    ids = torch.tensor([3, 0, 49, 3])
    torch.testing.assert_close(embed(layer, ids, F32), dense[ids], rtol=1e-6, atol=1e-6)


def test_quantised_weights_stay_quantised():
    made = weights()
    made["model.layers.0.mlp.gate_proj.weight"], _ = int4(64, 32)
    made["model.layers.0.mlp.up_proj.weight"], _ = int4(64, 32)
    layer = load(Made(made)).layers[0].mlp.gate_up
    assert isinstance(layer, Int4Linear) and layer.packed.dtype == torch.int16
    assert octavo.int4_unpack(layer.packed, 128, 32).shape == (128, 32)
    assert layer.activation == "silu_and_mul"


@pytest.mark.parametrize(("kind", "n"), [("dense", 24), ("int4", 24), ("int4", 12), ("int8", 24)])
@pytest.mark.parametrize("biased", [False, True])
def test_gate_and_up(kind, n, biased):
    """Interleaved where the op has an epilogue for them, or side by side: the same numbers."""
    make = {"dense": lambda n, k: (torch.randn(n, k), None), "int4": int4, "int8": int8}[kind]
    gate_up = [make(n, 64)[0] for _ in range(2)]
    biases = [torch.randn(n) if biased else None for _ in range(2)]
    layer = make_linear(gate_up, biases, CPU, F32, gated=True)
    assert isinstance(layer, Int4Linear if (kind, n) == ("int4", 24) else GatedLinear)
    x = torch.randn(5, 64)
    expected = octavo.silu_and_mul(make_linear(gate_up, biases, CPU, F32)(x))
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
