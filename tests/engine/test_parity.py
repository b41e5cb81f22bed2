"""The engine beside transformers: same tokens from a real model, same logits from tiny ones."""

import copy
import warnings

import pytest
import torch
import transformers
from tiny_models import from_config, part_experts

from octavo.engine import LLM, SamplingParams
from octavo.engine.hub import resolve
from octavo.testing import assert_accurate

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain photosynthesis to a child.",
    "List three prime numbers greater than 10.",
    "Translate 'good morning' into Spanish and German.",
]
TIE = 1e-3


@pytest.fixture(scope="module")
def smollm2():
    return LLM("smollm2", device="cpu", max_num_batched_tokens=64)


@pytest.fixture(scope="module")
def peer():
    path = resolve("smollm2")
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def test_smollm2_says_paris(smollm2):
    answer = smollm2.chat([{"role": "user", "content": QUESTIONS[0]}], SamplingParams(max_tokens=32, temperature=0))
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop" and answer.token_ids[-1] in smollm2.eos_token_ids


def test_smollm2_generates_the_same_tokens_as_transformers(smollm2, peer):
    """Greedy tokens of five prompts, generated in one batch, are transformers' own choice at every position.

    transformers is fed octavo's tokens, so each is compared given the same past: without ties this is equality of the
    two generations, and after a tie the comparison goes on from there.
    """
    prompts = [smollm2.tokenizer.apply_chat_template([{"role": "user", "content": q}]) for q in QUESTIONS]
    params = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)
    for completion in smollm2.generate(prompts, params):
        assert len(completion.token_ids) == 64
        ids = torch.tensor([completion.prompt_token_ids + completion.token_ids])
        with torch.inference_mode():
            logits = peer(ids).logits[0, len(completion.prompt_token_ids) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(completion.token_ids).unsqueeze(1)).squeeze(1)
        behind = logits.max(dim=1).values - chosen
        assert behind.max() < TIE, f"token {behind.argmax()} trails transformers' choice by {behind.max():.2e}"
        ties = (behind > 0).sum().item()
        if ties:
            warnings.warn(f"{ties} of 64 tokens are transformers' second choice in a tie within {TIE}", stacklevel=1)


COMMON = dict(
    vocab_size=211,
    hidden_size=96,
    intermediate_size=144,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    initializer_range=0.2,
    eos_token_id=None,
)
TINY = {
    "llama": transformers.LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True),
    "llama3-rope": transformers.LlamaConfig(
        **COMMON,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral-window": transformers.MistralConfig(**COMMON, sliding_window=11),
    "mixtral": transformers.MixtralConfig(**COMMON, num_local_experts=5, num_experts_per_tok=2),
    "mixtral-window": transformers.MixtralConfig(**COMMON, sliding_window=11, num_experts_per_tok=3),
    "qwen2-moe": transformers.Qwen2MoeConfig(
        **COMMON, moe_intermediate_size=56, shared_expert_intermediate_size=80, num_experts=7, num_experts_per_tok=3
    ),
    "qwen3-moe": transformers.Qwen3MoeConfig(
        **COMMON, moe_intermediate_size=56, num_experts=7, num_experts_per_tok=3, norm_topk_prob=True
    ),
    "qwen3-moe-window": transformers.Qwen3MoeConfig(
        **COMMON,
        moe_intermediate_size=56,
        num_experts=7,
        num_experts_per_tok=3,
        norm_topk_prob=False,
        use_sliding_window=True,
        sliding_window=11,
    ),
}


@pytest.fixture(scope="module", params=TINY)
def tiny(request, tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp(request.param)
    model = from_config(TINY[request.param])
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, -1.5, 1.5)  # biases and norms that would show if they were dropped
    if hasattr(model.config, "num_experts_per_tok"):
        part_experts(model)
    model.save_pretrained(folder, max_shard_size="100KB")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=_word_tokenizer(COMMON["vocab_size"]))
    tokenizer.save_pretrained(folder)
    return folder, model


def _word_tokenizer(size):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


WHERE = [("cpu", torch.float32)]
WHERE += [pytest.param(("cuda", d), marks=pytest.mark.gpu) for d in (torch.float32, torch.float16, torch.bfloat16)]


@pytest.mark.parametrize("chunk", [40, 7, 1], ids=["whole", "chunks-of-7", "token-by-token"])
@pytest.mark.parametrize("where", WHERE, ids=str)
def test_tiny_models_give_the_same_logits_at_every_position(tiny, chunk, where):
    folder, model = tiny
    device, dtype = where
    ids = torch.randint(0, COMMON["vocab_size"], (1, 40), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(ids).logits[0]
        plain = copy.deepcopy(model).to(device, dtype)(ids.to(device)).logits[0].cpu()
    llm = LLM(str(folder), device=device, dtype=dtype, page_size=5)
    logits = torch.cat(list(llm.prompt_logits(ids[0].tolist(), chunk))).cpu()
    assert_accurate(logits.to(dtype), exact, plain)
    assert llm.blocks.num_free == llm.blocks.num_pages


def test_the_window_matters_at_this_length():
    """Without this, the comparison above could pass with the window left out."""
    ids = torch.arange(40).unsqueeze(0)
    model = from_config(TINY["mistral-window"])
    with torch.inference_mode():
        windowed = model(ids).logits
        model.config.sliding_window = None
        full = model(ids).logits
    model.config.sliding_window = 11
    assert not torch.allclose(windowed[0, 20:], full[0, 20:], atol=1e-2)
