import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

from octavo.engine import gguf_file
from octavo.engine.checkpoint import Int4Weight, Int8Weight, open_checkpoint
from octavo.engine.hub import resolve

LAYERS, HEADS, KV_HEADS, HEAD, HIDDEN, INNER, VOCAB = 2, 4, 2, 16, 64, 256, 40
SHAPES = {
    "attn_norm.weight": (HIDDEN,),
    "attn_q.weight": (HEADS * HEAD, HIDDEN),
    "attn_k.weight": (KV_HEADS * HEAD, HIDDEN),
    "attn_v.weight": (KV_HEADS * HEAD, HIDDEN),
    "attn_output.weight": (HIDDEN, HEADS * HEAD),
    "ffn_norm.weight": (HIDDEN,),
    "ffn_gate.weight": (INNER, HIDDEN),
    "ffn_up.weight": (INNER, HIDDEN),
    "ffn_down.weight": (HIDDEN, INNER),
}
HUGGING_FACE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def permute(rows, heads):
    """As convert_hf_to_gguf.py reorders the rows of queries and keys."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def raw_weight(shape, kind, rng):
    """Raw data of a random tensor: quantised where the gguf package can, else random blocks with sane scales."""
    if kind != Type.Q4_K:
        return quantize(rng.standard_normal(shape, dtype=np.float32), kind)
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // 256, 144), dtype=np.uint8)
    blocks[:, :4] = rng.standard_normal((len(blocks), 2)).astype(np.float16).view(np.uint8)
    return blocks.reshape(shape[0], -1)


def write_gguf(path, kind=Type.F16, overrides=None, extra=None, keys=None, head=True):
    """Writes a made-up model; returns what a reader should see, by Hugging Face's names, as fp32.

    `overrides` gives tensors another type, `extra` adds tensors: by their shape, or their very values.
    """
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, (keys or {}).pop("architecture", "llama"))
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_token_list([f"token {i} é" for i in range(VOCAB)])
    writer.add_token_types([1] * VOCAB)
    for key, value in (keys or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    shapes = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    shapes |= {"output.weight": (VOCAB, HIDDEN)} if head else {}
    shapes |= {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in SHAPES.items()}
    expected = {}
    for name, shape in (shapes | (extra or {})).items():
        its_kind = (overrides or {}).get(name, Type.F32 if isinstance(shape, np.ndarray) or len(shape) == 1 else kind)
        raw = shape if isinstance(shape, np.ndarray) else raw_weight(shape, its_kind, rng)
        layer, _, rest = name.removeprefix("blk.").partition(".")
        if name.startswith("blk."):
            module, _, what = rest.partition(".")
            expected[f"model.layers.{layer}.{HUGGING_FACE[module]}.{what}"] = dequantize(raw, its_kind)
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(rest.split(".")[0])
        stored = raw if heads is None else permute(raw, heads)
        writer.add_tensor(name, np.ascontiguousarray(stored), raw_dtype=its_kind)
        if not name.startswith("blk."):
            renamed = name.replace("token_embd", "model.embed_tokens").replace("output_norm", "model.norm")
            expected[renamed.replace("output.", "lm_head.")] = dequantize(raw, its_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: torch.from_numpy(np.array(value)) for name, value in expected.items()}


def dense(weight):
    """The weight in fp32, by its documented formula."""
    if isinstance(weight, torch.Tensor):
        return weight.float()
    rows, columns = weight.q.shape
    assert weight.scale.shape == (rows, columns // weight.group_size) and weight.scale.dtype == torch.float16
    q = weight.q.view(rows, -1, weight.group_size).float() * weight.scale.unsqueeze(-1).float()
    if isinstance(weight, Int4Weight):
        assert weight.q.dtype == torch.uint8 and weight.q.max() <= 15
        q += weight.minimum.unsqueeze(-1).float()
    return q.view(rows, columns)


KEPT = {Type.Q4_0: Int4Weight, Type.Q4_1: Int4Weight, Type.Q8_0: Int8Weight}


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q8_0], ids=lambda k: k.name)
def test_every_tensor_exactly(tmp_path, kind):
    expected = write_gguf(tmp_path / "m.gguf", kind)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    read = dict(checkpoint.tensors())
    assert read.keys() == expected.keys()
    for name, weight in read.items():
        is_norm = "norm" in name
        assert type(weight) is (torch.Tensor if is_norm else KEPT.get(kind, torch.Tensor)), name
        if isinstance(weight, torch.Tensor):
            assert weight.dtype == (torch.float32 if is_norm else gguf_file.DENSE[kind.name])
        assert torch.equal(dense(weight), expected[name]), name
    assert checkpoint.notes == []


def test_other_types_are_dequantised_and_the_user_told(tmp_path):
    kinds = {"blk.0.attn_q.weight": Type.Q5_0, "blk.0.ffn_down.weight": Type.Q4_K, "blk.1.ffn_down.weight": Type.Q4_K}
    expected = write_gguf(tmp_path / "m.gguf", Type.Q4_0, kinds)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    read = dict(checkpoint.tensors())
    for name in ("layers.0.self_attn.q_proj", "layers.0.mlp.down_proj", "layers.1.mlp.down_proj"):
        weight = read[f"model.{name}.weight"]
        assert weight.dtype == checkpoint.config.dtype == torch.float16
        assert torch.equal(weight, expected[f"model.{name}.weight"].half())
    (note,) = checkpoint.notes
    assert "2 of type Q4_K, 1 of type Q5_0 (of 21 tensors)" in note
    for name, weight in checkpoint.tensors(dtype=torch.float32):
        assert torch.equal(dense(weight), expected[name]), f"{name}: in fp32 exactly what the gguf package makes of it"


def test_dequantising_in_pieces(tmp_path, monkeypatch):
    expected = write_gguf(tmp_path / "m.gguf", Type.Q5_1)
    monkeypatch.setattr(gguf_file, "ROWS_AT_A_TIME", 7)
    for name, weight in open_checkpoint(tmp_path / "m.gguf").tensors():
        assert torch.equal(weight, expected[name].to(weight.dtype))


def test_biases_are_permuted_too(tmp_path):
    extra = {f"blk.{i}.attn_{p}.bias": SHAPES[f"attn_{p}.weight"][:1] for i in range(LAYERS) for p in "qkv"}
    expected = write_gguf(tmp_path / "m.gguf", extra=extra)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    read = dict(checkpoint.tensors())
    assert checkpoint.config.attention_bias
    for name in (n for n in expected if n.endswith("bias")):
        assert torch.equal(read[name], expected[name])


def test_configuration_follows_the_tensors(tmp_path):
    write_gguf(tmp_path / "m.gguf", Type.BF16, head=False)
    config = open_checkpoint(tmp_path / "m.gguf").config
    assert config.tie_word_embeddings and config.dtype == torch.bfloat16
    assert (config.hidden_size, config.num_key_value_heads, config.head_dim) == (HIDDEN, KV_HEADS, HEAD)


def test_rope_factors_become_llama3_scaling(tmp_path):
    wavelengths = 2 * np.pi * 2e6 ** (np.arange(0, HEAD, 2) / HEAD)
    factors = np.where(wavelengths > 8192, 8, 1).astype(np.float32)  # none lies on the ramp, 2048 to 8192
    write_gguf(tmp_path / "m.gguf", extra={"rope_freqs.weight": factors}, keys={"llama.rope.freq_base": 2e6})
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.config.rope_scaling["rope_type"] == "llama3" and checkpoint.config.rope_scaling["factor"] == 8
    assert "rope_freqs.weight" not in dict(checkpoint.tensors())


def test_rope_factors_of_another_type_are_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", extra={"rope_freqs.weight": (8,)}, overrides={"rope_freqs.weight": Type.F16})
    with pytest.raises(ValueError, match=r"rope_freqs\.weight: type F16; expected F32"):
        open_checkpoint(tmp_path / "m.gguf")


def test_num_bytes_is_the_data(tmp_path):
    write_gguf(tmp_path / "m.gguf", Type.Q8_0)
    parameters = LAYERS * (HIDDEN * HIDDEN * 2 + HIDDEN * HEAD * KV_HEADS * 2 + HIDDEN * INNER * 3) + 2 * VOCAB * HIDDEN
    norms = (2 * LAYERS + 1) * HIDDEN
    assert open_checkpoint(tmp_path / "m.gguf").num_bytes == parameters // 32 * 34 + norms * 4


def test_a_file_cut_off_anywhere_is_refused_before_any_reading(tmp_path):
    whole, cut = tmp_path / "m.gguf", tmp_path / "cut.gguf"
    write_gguf(whole, Type.Q4_1)
    content = whole.read_bytes()
    header = content.index(b"blk.1.ffn_down.weight") + 64
    for size in [*range(0, header, 37), *range(header, len(content), 9973), len(content) - 1]:
        cut.write_bytes(content[:size])
        with pytest.raises(ValueError, match="not a GGUF|cut off") as error:
            open_checkpoint(cut)
        assert str(cut) in str(error.value)
    assert "output" in str(error.value) or "blk." in str(error.value), "the tensor is named"


def test_a_header_with_wrong_bytes_opens_or_says_why(tmp_path):
    write_gguf(tmp_path / "m.gguf", Type.Q4_0)
    content = bytearray((tmp_path / "m.gguf").read_bytes())
    header = content.index(b"blk.1.ffn_down.weight") + 64
    rng, refused = np.random.default_rng(0), 0
    for at in rng.integers(4, header, 400):
        broken = bytearray(content)
        broken[at] ^= 1 << rng.integers(0, 8)
        (tmp_path / "broken.gguf").write_bytes(broken)
        try:
            open_checkpoint(tmp_path / "broken.gguf")
        except ValueError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a GGUF file"),
        (b"PK\x03\x04", "not a GGUF file"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(16), "version 1"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(16), "big-endian"),
        (b"GGUF" + (3).to_bytes(4, "little") + bytes(16), "general.architecture: None"),
    ],
)
def test_what_is_no_gguf(tmp_path, content, message):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keys": {"architecture": "qwen2"}}, "general.architecture: 'qwen2'; supported"),
        ({"keys": {"split.count": 3}}, "split.count: one of 3 parts.*llama-gguf-split --merge"),
        ({"extra": {"mm.0.weight": (4, 64)}}, "mm.0.weight: a tensor that Llama"),
        ({"extra": {"v.weight": (4, 64)}}, "v.weight: a tensor that Llama"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, arguments, message):
    write_gguf(tmp_path / "m.gguf", **arguments)
    with pytest.raises(ValueError, match=rf"m\.gguf: {message}"):
        open_checkpoint(tmp_path / "m.gguf")


def test_unknown_types_are_named(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    content = bytearray((tmp_path / "m.gguf").read_bytes())
    name = b"blk.0.attn_v.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8
    assert content[at] == Type.F16
    content[at] = 200
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"blk\.0\.attn_v\.weight: type 200 is not known"):
        open_checkpoint(tmp_path / "m.gguf")
    content[at] = Type.I16  # known, as large as F16, and no format of weights
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.gguf: blk\.0\.attn_v\.weight: type I16; supported: F32, .*Q4_K"):
        open_checkpoint(tmp_path / "m.gguf")


def test_broken_scales_are_refused(tmp_path):
    blocks = np.zeros((KV_HEADS * HEAD, 2, 18), np.uint8)
    blocks[3, 1, :2] = np.array([9000], np.float16).view(np.uint8)  # −8 · 9000 is beyond fp16
    raw = torch.from_numpy(blocks.reshape(len(blocks), -1))
    with pytest.raises(ValueError, match="scale"):
        gguf_file._blocks(raw, "Q4_0")


def test_broken_scales_of_k_quants_are_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", overrides={"blk.0.ffn_down.weight": Type.Q4_K})
    content = bytearray((tmp_path / "m.gguf").read_bytes())
    tensor = next(t for t in open_checkpoint(tmp_path / "m.gguf").table.values() if t.type == Type.Q4_K)
    content[tensor.start : tensor.start + 2] = np.array([60000], np.float16).tobytes()
    (tmp_path / "m.gguf").write_bytes(content)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    with pytest.raises(
        ValueError, match=r"m\.gguf: blk\.0\.ffn_down\.weight: dequantised it holds what float16 does not"
    ):
        list(checkpoint.tensors(dtype=torch.float16))
    assert dict(checkpoint.tensors(dtype=torch.float32))["model.layers.0.mlp.down_proj.weight"].abs().max() > 65504


def test_heads_that_do_not_fit_are_named(tmp_path):
    write_gguf(tmp_path / "m.gguf", keys={"llama.attention.key_length": 32})
    with pytest.raises(ValueError, match=r"attn_q\.weight: 64 rows; expected 4 heads of 32"):
        list(open_checkpoint(tmp_path / "m.gguf").tensors())


def hold_against_transformers(path, wanted):
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path.parent, gguf_file=path.name))
    theirs = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    names = set()
    for name, weight in checkpoint.tensors():
        names.add(name)
        if wanted(name):
            assert torch.equal(dense(weight), theirs[name]), name
    tied = {"lm_head.weight"} if checkpoint.config.tie_word_embeddings else set()
    assert names == theirs.keys() == model.state_dict().keys() - tied


def test_transformers_reads_the_same(tmp_path):
    overrides = {"blk.0.attn_q.weight": Type.Q8_0, "blk.1.attn_k.weight": Type.Q4_1, "output.weight": Type.F32}
    write_gguf(tmp_path / "m.gguf", Type.Q4_0, overrides)
    hold_against_transformers(tmp_path / "m.gguf", lambda name: True)


@pytest.mark.slow  # transformers takes a minute over the vocabulary
def test_transformers_reads_the_same_from_smollm2():
    ends = ("embed", "model.norm", ".0.", ".29.")
    hold_against_transformers(resolve("smollm2"), lambda name: any(part in name for part in ends))


def test_smollm2():
    checkpoint = open_checkpoint(resolve("smollm2"))
    read = {name: dense(weight) for name, weight in checkpoint.tensors()}
    assert len(read) == 272 and checkpoint.notes == []
    assert read["model.embed_tokens.weight"].shape == (49152, 576)
    assert all(weight.isfinite().all() for weight in read.values())
    config = checkpoint.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert config.rope_theta == 1e5 and config.tie_word_embeddings and config.eos_token_ids == (2,)
