"""transformers' models with octavo's attention beside the same models with SDPA or with the eager attention."""

import pytest
import torch
import transformers

import octavo
from octavo.engine import register_transformers_attention
from octavo.engine.checkpoint import open_checkpoint
from octavo.engine.hub import resolve
from octavo.testing import assert_accurate

register_transformers_attention()

COMMON = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    initializer_range=0.3,
    eos_token_id=None,
    bos_token_id=None,
    pad_token_id=0,
)
TINY = {
    "llama": transformers.LlamaConfig(**COMMON),
    "mistral": transformers.MistralConfig(**COMMON, sliding_window=9),
    "gemma2": transformers.Gemma2Config(
        **COMMON, sliding_window=9, attn_logit_softcapping=2.0, query_pre_attn_scalar=16
    ),
    "gpt-oss": transformers.GptOssConfig(
        **COMMON,
        sliding_window=9,
        num_local_experts=2,
        num_experts_per_tok=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
}
WHERE = [("cpu", torch.float32)]
WHERE += [pytest.param(("cuda", d), marks=pytest.mark.gpu) for d in (torch.float32, torch.float16, torch.bfloat16)]


@pytest.fixture(scope="module", params=TINY)
def name(request):
    return request.param


def model_of(name, implementation="eager"):
    torch.manual_seed(3)
    config = TINY[name]
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, -1.5, 1.5)
    return model


def ids_of(batch, length, device="cpu"):
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(4)).to(device)


def ids_and_mask(lengths, side, device="cpu"):
    longest = max(lengths)
    mask = torch.zeros(len(lengths), longest, dtype=torch.long, device=device)
    for row, length in zip(mask, lengths, strict=True):
        row[longest - length :] = 1 if side == "left" else 0
        row[:length] = 1 if side == "right" else row[:length]
    if side == "holes":
        mask[:] = 1
        mask[0, 3:5] = mask[1, 0] = mask[1, 7] = 0
    return dict(input_ids=ids_of(len(lengths), longest, device) * mask, attention_mask=mask)


@torch.inference_mode()
def logits_of(name, sequences, dtype, device="cpu"):
    """The logits of each sequence alone, `[1, length]`, by the eager attention."""
    model = model_of(name).to(device, dtype)
    return torch.cat([model(ids.to(device)).logits[0].cpu() for ids in sequences])


@pytest.mark.parametrize("where", WHERE, ids=str)
@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])  # gpt-oss is not to be had in float64
def test_logits_of_a_padded_batch(name, where, side):
    """What is no padding has the logits that it has without any."""
    device, dtype = where
    args = ids_and_mask([20, 13, 5], side, device)
    kept = args["attention_mask"].bool()
    args["position_ids"] = (args["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        logits = model_of(name, "octavo").to(device, dtype)(**args).logits[kept].cpu()
    sequences = [ids[row][None] for ids, row in zip(args["input_ids"], kept, strict=True)]
    assert_accurate(logits, logits_of(name, sequences, torch.float64), logits_of(name, sequences, dtype, device))


@pytest.mark.parametrize("where", WHERE, ids=str)
def test_packed_sequences(where):
    """In one row, position_ids begin anew; each has the logits that it has alone."""
    device, dtype = where
    ids, positions = ids_of(1, 20, device), torch.cat([torch.arange(n) for n in (7, 1, 12)])[None].to(device)
    model = model_of("mistral", "octavo").to(device, dtype)
    starts = torch.tensor([0, 7, 8, 20], dtype=torch.int32, device=device)
    lengths = dict(cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=12, max_length_k=12)
    with torch.inference_mode():
        packed = model(ids, position_ids=positions, use_cache=False).logits[0].cpu()
        told = model(ids, position_ids=positions, use_cache=False, **lengths).logits[0].cpu()
    assert torch.equal(packed, told)
    sequences = ids.split((7, 1, 12), 1)
    exact, plain = logits_of("mistral", sequences, torch.float64), logits_of("mistral", sequences, dtype, device)
    assert_accurate(packed, exact, plain)


def generated(model, args, **options):
    options = dict(max_new_tokens=12, do_sample=False) | options
    args = {name: x.to(model.device) for name, x in args.items()}
    return model.generate(**args, **options).cpu()


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generates_the_same_tokens(name, device, side, cache):
    """As SDPA, or, where that lacks something (softcap, sinks), the eager attention; also in chunks of the prompt."""
    args = dict(input_ids=ids_of(2, 14)) if side == "none" else ids_and_mask([14, 9, 1], side)
    peer = "sdpa" if name in ("llama", "mistral") else "eager"
    options = dict(cache_implementation=cache, disable_compile=True) if cache else {}
    expected = generated(model_of(name, peer).to(device), args, **options)
    model = model_of(name, "octavo").to(device)
    assert torch.equal(generated(model, args, **options), expected)
    if cache is None:
        model = model_of(name, "sdpa" if peer == "sdpa" else "eager").to(device)
        model.set_attn_implementation("octavo")
        assert torch.equal(generated(model, args, prefill_chunk_size=5), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_models(device):
    model = model_of("mistral", "octavo").to(device)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="inductor" if device == "cuda" else "aot_eager")
    packed = dict(input_ids=ids_of(1, 20), position_ids=torch.cat([torch.arange(n) for n in (7, 13)])[None])
    for args in (dict(input_ids=ids_of(2, 20)), ids_and_mask([20, 13], "right"), packed):
        args = {name: x.to(device) for name, x in args.items()} | dict(use_cache=False)
        kept = args.get("attention_mask", torch.ones_like(args["input_ids"])).bool()
        with torch.inference_mode():
            logits = compiled(**args).logits[kept].cpu()
        sequences = [ids[row][None] for ids, row in zip(args["input_ids"], kept, strict=True)]
        sequences = args["input_ids"].split((7, 13), 1) if "position_ids" in args else sequences
        exact, plain = (
            logits_of("mistral", sequences, d, w) for d, w in ((torch.float64, "cpu"), (torch.float32, device))
        )
        assert_accurate(logits, exact, plain)


@pytest.mark.filterwarnings("ignore:`past_key_values`:FutureWarning")
def test_a_static_cache_without_a_mask():
    ids = ids_of(2, 12)
    cache = transformers.StaticCache(config=TINY["llama"], max_cache_len=30)
    model = model_of("llama", "octavo")
    with torch.inference_mode():
        logits = torch.cat([model(part, past_key_values=cache).logits for part in ids.split((7, 4, 1), 1)], 1)
    assert_accurate(
        logits.flatten(0, 1), *(logits_of("llama", ids.split(1), d) for d in (torch.float64, torch.float32))
    )


@pytest.mark.filterwarnings("ignore:`past_key_values`:FutureWarning")
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_a_static_cache_and_a_mask_as_wide_as_it(side):
    """Also of tokens that are not there yet, as some callers make it once for all steps."""
    args = ids_and_mask([12, 7], side)
    wide = torch.nn.functional.pad(args["attention_mask"], (0, 18), value=1)
    cache = transformers.StaticCache(config=TINY["llama"], max_cache_len=30)
    kept = args["attention_mask"].bool()
    positions = (args["attention_mask"].cumsum(1) - 1).clamp(min=0)
    steps = zip(args["input_ids"].split((7, 5), 1), positions.split((7, 5), 1), strict=True)
    model = model_of("llama", "octavo")
    with torch.inference_mode():
        outs = [model(x, attention_mask=wide, position_ids=p, past_key_values=cache).logits for x, p in steps]
    sequences = [ids[row][None] for ids, row in zip(args["input_ids"], kept, strict=True)]
    exact, plain = (logits_of("llama", sequences, d) for d in (torch.float64, torch.float32))
    assert_accurate(torch.cat(outs, 1)[kept], exact, plain)


@pytest.mark.parametrize("side", ["none", "left"])
def test_a_static_cache_is_not_copied(monkeypatch, side):
    from octavo.engine import transformers_attention

    places = []

    def noted(q, k, v, **options):
        places.append((k.data_ptr(), k.shape[1], options.get("cache_seqlens"), options.get("cache_leftpad")))
        return octavo.flash_attn_with_kvcache(q, k, v, **options)

    monkeypatch.setattr(transformers_attention, "flash_attn_with_kvcache", noted)
    args = dict(input_ids=ids_of(2, 14)) if side == "none" else ids_and_mask([14, 9], side)
    generated(model_of("llama", "octavo"), args, cache_implementation="static", disable_compile=True)
    layers = TINY["llama"].num_hidden_layers
    capacity = places[0][1]
    assert capacity > 14 and len({place for place, *_ in places}) == layers  # the same memory in every step
    for i, (_, width, lengths, padding) in enumerate(places):
        written = 14 + i // layers
        assert width == capacity and ([capacity] * 2 if lengths is None else lengths.tolist()) == [written] * 2
        assert (padding is None) == (side == "none") and (padding is None or padding.tolist() == [0, 5])


@pytest.mark.parametrize("device", DEVICES)
def test_smollm2_generates_the_same_tokens(device):
    path = resolve("smollm2")
    tokenizer = open_checkpoint(path).tokenizer()
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="octavo").to(device)
    prompts = [tokenizer.encode(text) for text in ("The capital of France is", "Once upon a time, there was a little")]
    longest = max(map(len, prompts))
    padded = [([0] * (longest - len(p)) + p, [0] * (longest - len(p)) + [1] * len(p)) for p in prompts]
    ids, mask = (torch.tensor(x) for x in zip(*padded, strict=True))
    assert not mask.all()
    args, options = dict(input_ids=ids, attention_mask=mask), dict(max_new_tokens=16, pad_token_id=0)
    tokens = generated(model, args, **options)
    model.set_attn_implementation("sdpa")
    assert torch.equal(tokens, generated(model, args, **options))
    assert "Paris" in tokenizer.decode(tokens[0, longest:].tolist())


def test_an_encoder():
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    args = ids_and_mask([20, 13, 5], "right")
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, attn_implementation="octavo").eval()
    kept = args["attention_mask"].bool()
    with torch.inference_mode():
        out = model(**args).last_hidden_state[kept]
        model.set_attn_implementation("eager")
        plain = model(**args).last_hidden_state[kept]
        exact = model.double()(**args).last_hidden_state[kept]
    assert_accurate(out, exact, plain)


def bart(implementation="octavo"):
    torch.manual_seed(5)
    config = transformers.BartConfig(
        vocab_size=97,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_position_embeddings=64,
        init_std=0.3,
        forced_eos_token_id=None,
    )
    return transformers.BartForConditionalGeneration._from_config(config, attn_implementation=implementation).eval()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("n", [1, 5, 9, 12])
def test_an_encoder_and_a_decoder(device, side, n):
    """Of 9 tokens and of n: queries fewer and more than the keys of cross-attention, which has no order."""
    args = dict(input_ids=ids_of(2, 9)) if side == "none" else ids_and_mask([9, 6], side)
    args = {name: x.to(device) for name, x in args.items()} | dict(decoder_input_ids=ids_of(2, n, device))
    with torch.inference_mode():
        logits = bart().to(device)(**args).logits.cpu()
        plain = bart("eager").to(device)(**args).logits.cpu()
        exact = bart("eager").to(device).double()(**args).logits.cpu()
    assert_accurate(logits, exact, plain)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("side", ["none", "right"])
def test_an_encoder_and_a_decoder_generate_the_same_tokens(cache, side):
    args = dict(input_ids=ids_of(2, 9)) if side == "none" else ids_and_mask([9, 6], side)
    options = dict(cache_implementation=cache, disable_compile=True) if cache else {}
    assert torch.equal(generated(bart(), args, **options), generated(bart("eager"), args, **options))


def test_it_is_octavo_that_attends(monkeypatch):
    from octavo.engine import transformers_attention

    calls = []
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):

        def noted(*args, name=name, **options):
            calls.append((name, options))
            return getattr(octavo, name)(*args, **options)

        monkeypatch.setattr(transformers_attention, name, noted)
    model = model_of("mistral", "octavo")
    with torch.inference_mode():
        model(ids_of(1, 12))
        model(**ids_and_mask([12, 8], "left"))
        model(**ids_and_mask([12, 8], "right"))
        model(ids_of(1, 4), position_ids=torch.tensor([[0, 1, 0, 1]]), use_cache=False)
    dense, left, right, packed = calls[::2]
    assert dense[0] == "flash_attn_func" and dense[1]["window_size"] == (8, 8) and dense[1]["causal"]
    assert left[0] == right[0] == "flash_attn_with_kvcache"
    assert left[1]["cache_leftpad"] is calls[3][1]["cache_leftpad"]  # found out once for all layers
    assert packed[0] == "flash_attn_varlen_func" and packed[1]["cu_seqlens_q"].tolist() == [0, 2, 4]


def test_what_is_not_supported_is_named():
    from octavo.engine.transformers_attention import _attention, _mask

    q = torch.zeros(2, 4, 3, 16)
    module = torch.nn.Module()
    with pytest.raises(ValueError, match=r"dropout: 0\.1; expected 0\.0"):
        _attention(module, q, q, q, None, dropout=0.1)
    with pytest.raises(ValueError, match=r"attention_mask: shape \(2, 1, 3, 3\); expected \[batch, keys\]"):
        _attention(module, q, q, q, torch.zeros(2, 1, 3, 3))
    with pytest.raises(ValueError, match="position_bias: shape"):
        _attention(module, q, q, q, None, position_bias=torch.zeros(1, 4, 3, 3))
    with pytest.raises(ValueError, match="mask_function: made of chunked_overlay"):
        from transformers.masking_utils import chunked_causal_mask_function

        _mask(2, 3, 3, mask_function=chunked_causal_mask_function(2, torch.zeros(2)))
    model = model_of("llama", "octavo")
    with pytest.raises(ValueError, match="position_ids: packed sequences in a batch of 2"):
        model(ids_of(2, 4), position_ids=torch.tensor([[0, 1, 0, 1]]), use_cache=False)
