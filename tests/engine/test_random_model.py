"""Models of random weights, and what they cost."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from octavo.bench import model_costs
from octavo.bench.floors import Ceilings
from octavo.bench.model_costs import Load, costs_of
from octavo.bench.random_model import SCHEMES, SERVED, TINY, TINY_MIXTURE, random_checkpoint, random_decoder
from octavo.bench.shapes import parameters
from octavo.engine.experts import ExpertLoop, StackedExperts
from octavo.engine.layers import DenseLinear, GatedLinear, Int4Linear, W8A8Linear, dequantize

CPU = torch.device("cpu")
PEAKS = Ceilings({"read_bytes_per_s": 2e9, "gemm_fp32_flops_per_s": 8e9, "gemm_int8_ops_per_s": 3e10})


@pytest.fixture(scope="module")
def decoders():
    made = {}

    def get(name, scheme):
        if (name, scheme) not in made:
            made[name, scheme] = random_decoder(name, scheme, CPU)
        return made[name, scheme]

    return get


@pytest.mark.parametrize("name", SERVED)
def test_every_shape_has_as_many_weights_as_the_model(name):
    served = SERVED[name]
    checkpoint = random_checkpoint(name.lower(), "bf16")
    norms = 2 * served.model.head_dim * served.model.layers if checkpoint.config.qk_norm else 0
    assert checkpoint.num_bytes == 2 * (parameters(served.model) + norms)
    assert checkpoint.config.num_local_experts == served.model.experts


@pytest.mark.parametrize(
    ("scheme", "qkv", "gate_up"),
    [
        ("bf16", DenseLinear, GatedLinear),
        ("int4", Int4Linear, Int4Linear),
        ("int8", W8A8Linear, W8A8Linear),
        ("fp8", W8A8Linear, W8A8Linear),
    ],
)
def test_layers_are_those_of_a_checkpoint_in_this_format(decoders, scheme, qkv, gate_up):
    model = decoders("tiny", scheme)
    assert len(model.layers) == TINY.layers and isinstance(model.head, DenseLinear)
    for layer in model.layers:
        assert (type(layer.qkv), type(layer.o)) == (qkv, qkv) and type(layer.mlp.gate_up) is gate_up
    if scheme == "int4":
        assert model.layers[0].o.group_size == 128 and model.layers[0].mlp.gate_up.activation == "silu_and_mul"
    if qkv is W8A8Linear:
        assert model.layers[0].o.weight.dtype == getattr(torch, "int8" if scheme == "int8" else "float8_e4m3fn")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_experts_are_those_of_a_checkpoint_in_this_format(decoders, scheme):
    """A CPU computes int4 experts one after another."""
    for layer in decoders("tiny-mixture", scheme).layers:
        assert isinstance(layer.mlp.experts, ExpertLoop if scheme == "int4" else StackedExperts)
        assert layer.mlp.router.weight.shape == (TINY_MIXTURE.experts, TINY_MIXTURE.hidden)


@pytest.mark.parametrize("name", ["tiny", "tiny-mixture"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_outputs_are_about_as_large_as_inputs(decoders, name, scheme):
    model, generator = decoders(name, scheme), torch.Generator().manual_seed(1)
    x = torch.randn(40, TINY.hidden, generator=generator)
    layer = model.layers[0]
    outputs = (layer.qkv(x), model.head(x), layer.o(torch.randn(40, TINY.heads * TINY.head_dim, generator=generator)))
    for y in outputs:
        assert 0.8 < y.std() < 1.25
    assert 0.1 < layer.mlp(x).std() < 1, "silu and a product make it smaller"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_compute_with_the_weights_that_were_drawn(decoders, scheme):
    drawn = dict(random_checkpoint("tiny", scheme).tensors(prefix="model.layers.1.mlp.down"))
    x = torch.randn(5, TINY.intermediate, generator=torch.Generator().manual_seed(2))
    (weight,) = (w for n, w in random_checkpoint("tiny", scheme).tensors() if n in drawn)
    expected = x @ dequantize(weight, CPU).T
    assert (decoders("tiny", scheme).layers[1].mlp.down(x) - expected).abs().max() < 0.1 * expected.std() + 1e-5


def test_a_seed_repeats_its_weights_and_layers_can_be_fewer():
    one, same, other = (random_decoder("tiny", "bf16", CPU, layers=1, seed=seed) for seed in (0, 0, 1))
    assert len(one.layers) == 1
    assert torch.equal(one.layers[0].o.weight, same.layers[0].o.weight)
    assert not torch.equal(one.layers[0].o.weight, other.layers[0].o.weight)


def test_weights_are_drawn_one_at_a_time():
    checkpoint, done = random_checkpoint("Llama-2-70B", "int8"), []
    names = checkpoint.tensors(progress=done.append, prefix="model.layers.3.self_attn.k")
    name, weight = next(names)
    assert name == "model.layers.3.self_attn.k_proj.weight" and weight.q.shape == (1024, 8192) and not done
    assert list(names) == [] and done == [1024 * 8192 + 4 * 1024]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpt-5", "bf16"), "random weights: 'gpt-5'; there are shapes of Llama-3-8B"),
        (("tiny", "int2"), "scheme: 'int2'; expected bf16, fp8, int8, int4"),
        (("tiny", "bf16", 3), "layers: 3; tiny has 1 to 2"),
        (("tiny", "bf16", 0), "layers: 0; tiny has 1 to 2"),
    ],
)
def test_what_there_is_no_shape_of(arguments, message):
    with pytest.raises(ValueError, match=message):
        random_checkpoint(*arguments)


def test_random_weights_have_no_tokenizer():
    with pytest.raises(ValueError, match="random tiny, bf16: there is no tokenizer: give token ids"):
        random_checkpoint("tiny", "bf16").tokenizer()


# -------------------------------------------------------------------------------------------------------------- costs


def test_operations_of_a_token_are_those_that_torch_counts(decoders):
    model = decoders("tiny", "bf16")
    costs, layer = costs_of(model, 512), model.layers[0]
    x = torch.randn(3, TINY.hidden)
    with FlopCounterMode(display=False) as layers, torch.inference_mode(False):
        for layer in model.layers:
            layer.qkv(x), layer.o(x.new_ones(3, TINY.heads * TINY.head_dim))
            layer.mlp.gate_up.gate_up(x), layer.mlp.down(x.new_ones(3, TINY.intermediate))
    assert costs.token_flops * 3 == layers.get_total_flops()
    with FlopCounterMode(display=False) as head:
        model.head(x)
    assert costs.head_flops * 3 == head.get_total_flops()


def test_a_mixture_costs_its_router_and_the_experts_that_a_token_takes(decoders):
    dense, mixture = (costs_of(decoders(name, "bf16"), 512) for name in ("tiny", "tiny-mixture"))
    mlp, router = 2 * 3 * TINY.hidden * TINY.intermediate, 2 * TINY.hidden * TINY_MIXTURE.experts
    assert mixture.token_flops == dense.token_flops + TINY.layers * (mlp + router)
    assert mixture.expert_bytes == TINY.layers * TINY_MIXTURE.experts * 4 * mlp // 2
    assert mixture.step_bytes(1) == mixture.weight_bytes + mixture.expert_bytes / 2
    assert mixture.step_bytes(1000) == pytest.approx(mixture.weight_bytes + mixture.expert_bytes)


@pytest.mark.parametrize("name", ["tiny", "tiny-mixture"])
def test_a_step_reads_all_weights_but_the_embedding(decoders, name):
    costs, model = costs_of(decoders(name, "bf16"), 512), SERVED[name].model
    assert costs.weight_bytes + costs.expert_bytes == 4 * (parameters(model) - model.vocab * model.hidden)


@pytest.mark.parametrize(("scheme", "dtype"), [("bf16", "float32"), ("int4", "float32"), ("int8", "int8")])
def test_peaks_are_those_of_what_is_multiplied(decoders, scheme, dtype):
    assert costs_of(decoders("tiny", scheme), 512).dtype == dtype
    assert costs_of(decoders("tiny-mixture", scheme), 512).dtype == dtype


@given(st.integers(1, 40), st.integers(0, 60), st.one_of(st.none(), st.integers(1, 50)))
def test_keys_that_tokens_see(first, count, window):
    tokens = range(first, first + count)
    assert model_costs._keys(first, first + count - 1, window) == sum(min(t, window or t) for t in tokens)


def test_operations_and_bytes_of_requests(decoders):
    costs = replace(costs_of(decoders("tiny", "bf16"), 512), token_flops=100, head_flops=10, key_flops=1)
    # The first computes tokens 3 to 5, which see 3 + 4 + 5 keys, and samples 3; the second computes and samples one.
    loads = [Load(3, 3, cached=2), Load(1, 1)]
    assert costs.flops(loads) == (3 * 100 + 3 * 10 + 12) + (100 + 10 + 1)
    costs = replace(costs, weight_bytes=1000, kv_bytes=1)
    # Written: 3 and 1. Read: prompts of 3 and 1, and by the two tokens decoded 4 + 5.
    assert costs.bytes_moved(loads, [4, 1, 1]) == 3 * 1000 + 4 + 4 + 9
    assert replace(costs, window=2).bytes_moved([Load(3, 3)], [1]) == 1000 + 5 + 2 + 4


def test_b_star_is_where_computing_takes_as_long_as_reading(decoders):
    costs = costs_of(decoders("tiny", "bf16"), 512)
    b_star = costs.critical_batch(PEAKS)
    assert b_star == pytest.approx(8e9 / 2e9 * 4 / 2, rel=0.01), "peak / bandwidth · bytes a weight / 2"
    below, at, above = (costs.decode_seconds(batch, 0, PEAKS) for batch in (1, round(b_star), 4 * round(b_star)))
    assert below == pytest.approx(at, rel=0.01) and above == pytest.approx(4 * at, rel=0.01)
    assert costs.critical_batch(Ceilings({})) is None and costs.decode_seconds(1, 0, Ceilings({})) is None
