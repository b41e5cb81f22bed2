import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import octavo
from octavo.kernels import rope_table
from octavo.testing import assert_accurate

LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=512)
SCALINGS = {  # name -> scaling dictionary, as a configuration of max_position_embeddings 2048 has it
    "none": None,
    "default": dict(rope_type="default"),
    "linear": dict(rope_type="linear", factor=2.5),
    "linear, old key": dict(type="linear", factor=4),
    "dynamic": dict(rope_type="dynamic", factor=2.0),
    "dynamic, old key": dict(type="dynamic", factor=4.0),
    "llama3": dict(rope_type="llama3", **LLAMA3),
    "llama3, old key": dict(type="llama3", **LLAMA3),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=512),
    "yarn, old key": dict(type="yarn", factor=4.0, original_max_position_embeddings=512),
    "yarn, original length left out": dict(rope_type="yarn", factor=4.0),
    "yarn, factor below one": dict(rope_type="yarn", factor=0.5, original_max_position_embeddings=512),
    "yarn, attention factor": dict(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=512, attention_factor=0.75
    ),
    "yarn, DeepSeek": dict(
        rope_type="yarn",
        factor=40,
        original_max_position_embeddings=512,
        beta_fast=32,
        beta_slow=1,
        mscale=1.0,
        mscale_all_dim=0.707,
    ),
    "yarn, mscale alone": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=512, mscale=0.5),
    "yarn, gpt-oss": dict(
        rope_type="yarn",
        factor=32.0,
        original_max_position_embeddings=512,
        beta_fast=32.0,
        beta_slow=1.0,
        truncate=False,
    ),
    "yarn, other betas": dict(
        rope_type="yarn", factor=8.0, original_max_position_embeddings=512, beta_fast=4, beta_slow=0.5
    ),
    "yarn, ramp of no width": dict(
        rope_type="yarn", factor=8.0, original_max_position_embeddings=512, beta_fast=100, beta_slow=82
    ),
    "yarn, ramp beyond the last frequency": dict(
        rope_type="yarn", factor=8.0, original_max_position_embeddings=512, beta_slow=1e-11
    ),
}
POSITIONS = 2048


def config_of(scaling, base, head_dim):
    parameters = {"rope_theta": base} | (scaling or {"rope_type": "default"})
    return LlamaConfig(
        head_dim=head_dim,
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        rope_parameters=parameters,
    )


@pytest.mark.parametrize("rows", [POSITIONS, 3 * POSITIONS, 1100])
@pytest.mark.parametrize("head_dim", [128, 80])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_frequencies_are_those_of_transformers(scaling, head_dim, rows):
    config = config_of(scaling, 500000.0, head_dim)
    kind = config.rope_parameters["rope_type"]
    init = ROPE_INIT_FUNCTIONS.get(kind, LlamaRotaryEmbedding.compute_default_rope_parameters)
    expected, attention_factor = init(config, seq_len=rows)
    frequencies, factor = rope_table._frequencies(head_dim, rows, 500000.0, scaling or {}, POSITIONS)
    assert torch.equal(frequencies, expected)
    assert factor == attention_factor


@pytest.mark.parametrize("rows", [POSITIONS, 3 * POSITIONS])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_rows_are_those_of_transformers(scaling, rows):
    """The same bits, but for dynamic beyond the model's length, whose base transformers' forward computes in fp32."""
    embedding = LlamaRotaryEmbedding(config_of(scaling, 10000.0, 64))
    cos, sin = embedding(torch.zeros(1), torch.arange(rows)[None])
    table = octavo.rotary_cos_sin_cache(64, rows, scaling=scaling, original_max_position=POSITIONS)
    assert table.shape == (rows, 64) and table.dtype == torch.float32 and table.is_contiguous()
    frequencies, factor = rope_table._frequencies(64, rows, 10000.0, scaling or {}, POSITIONS)
    for position in (0, 1, 1000, rows - 2, rows - 1):
        angles = position * frequencies.double()
        exact = factor * torch.cat((angles.cos(), angles.sin()))
        theirs = torch.cat((cos[0, position, :32], sin[0, position, :32]))
        if scaling is None or "dynamic" not in scaling.values() or rows == POSITIONS:
            assert torch.equal(table[position], theirs)
        assert_accurate(table[position], exact, theirs)


def test_dynamic_is_unscaled_up_to_the_models_length():
    scaling = dict(rope_type="dynamic", factor=4.0)
    plain = octavo.rotary_cos_sin_cache(64, 3000)
    assert torch.equal(octavo.rotary_cos_sin_cache(64, 3000, scaling=scaling, original_max_position=3000), plain)
    assert torch.equal(octavo.rotary_cos_sin_cache(64, 700, scaling=scaling, original_max_position=3000), plain[:700])
    assert not torch.equal(octavo.rotary_cos_sin_cache(64, 3000, scaling=scaling, original_max_position=2999), plain)


def test_rope_theta_of_the_dictionary_goes_first():
    expected = octavo.rotary_cos_sin_cache(32, 40, base=777.0)
    assert torch.equal(octavo.rotary_cos_sin_cache(32, 40, scaling={"rope_theta": 777.0}), expected)
    angle = 39 * 777.0 ** (-10 / 32)
    assert math.isclose(expected[39, 5], math.cos(angle), abs_tol=1e-5)
    assert math.isclose(expected[39, 16 + 5], math.sin(angle), abs_tol=1e-5)


def test_dtype_and_device(device):
    expected = octavo.rotary_cos_sin_cache(10, 40)
    for dtype in (torch.float16, torch.bfloat16):
        table = octavo.rotary_cos_sin_cache(10, 40, dtype=dtype, device=device)
        assert table.device.type == device.type
        assert torch.equal(table.cpu(), expected.to(dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rotary_dim=7), "rotary_dim: 7; expected an even number"),
        (dict(rotary_dim=0), "rotary_dim: 0"),
        (dict(max_position=0), "max_position: 0; expected at least 1"),
        (dict(original_max_position=0), "original_max_position: 0; expected at least 1"),
        (dict(base=1.0), "base: 1.0; expected a number above 1"),
        (
            dict(scaling=dict(type="su", factor=2.0)),
            "type 'su' is not known; .* default, linear, dynamic, llama3, yarn",
        ),
        (dict(scaling=dict(type="linear")), "type 'linear' needs the key 'factor'"),
        (dict(scaling=dict(type="linear", factor="2")), r"scaling\['factor'\]: '2'; expected a positive number"),
        (dict(scaling=dict(type="linear", factor=0.0)), r"scaling\['factor'\]: 0.0; expected a positive number"),
        (dict(scaling=dict(type="dynamic")), "type 'dynamic' needs the key 'factor'"),
        (dict(scaling=dict(type="dynamic", factor=2.0)), "original_max_position: None; scaling type 'dynamic' needs"),
        (
            dict(scaling=dict(type="dynamic", factor=2.0), rotary_dim=2, original_max_position=8),
            "rotary_dim: 2; scaling type 'dynamic' needs at least 4",
        ),
        (dict(scaling=dict(type="yarn", factor=2.0)), "type 'yarn' needs the key 'original_max_position_embeddings'"),
        (dict(scaling=dict(type="yarn", original_max_position_embeddings=8)), "type 'yarn' needs the key 'factor'"),
        (
            dict(scaling=dict(type="llama3", **(LLAMA3 | dict(high_freq_factor=1.0)))),
            r"scaling\['high_freq_factor'\]: 1.0; expected more than low_freq_factor \(1.0\)",
        ),
        *(
            (
                dict(scaling=dict(type="llama3") | {k: v for k, v in LLAMA3.items() if k != key}),
                f"needs the key '{key}'",
            )
            for key in LLAMA3
        ),
    ],
)
def test_errors(change, message):
    args = dict(rotary_dim=8, max_position=4) | change
    with pytest.raises(ValueError, match=message):
        octavo.rotary_cos_sin_cache(**args)


def test_dtype_error():
    with pytest.raises(TypeError, match=r"dtype: torch\.float64 is not accepted"):
        octavo.rotary_cos_sin_cache(8, 4, dtype=torch.float64)
