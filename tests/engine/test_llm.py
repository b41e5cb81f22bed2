"""The front door, on a tiny random model."""

from dataclasses import replace

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from octavo.engine import LLM, SamplingParams

GREEDY = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=48,
        initializer_range=0.4,
        eos_token_id=3,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, device="cpu", page_size=4, cache_tokens=200, max_num_batched_tokens=9, max_num_seqs=3)


def test_batched_prompts_get_what_they_get_alone(llm):
    prompts = [[5, 6, 7], [9], list(range(20)), [8, 8], [40, 41, 42, 43]]
    batched = llm.generate(prompts, GREEDY)
    assert [c.prompt_token_ids for c in batched] == prompts
    for prompt, completion in zip(prompts, batched, strict=True):
        assert completion.token_ids == llm.generate([prompt], GREEDY)[0].token_ids
        assert len(completion.token_ids) == 5 and completion.finish_reason == "length"
    assert llm.blocks.num_free == llm.blocks.num_pages


def test_text_and_ids_agree(llm):
    by_text = llm.generate("w5 w6 w7", GREEDY)[0]
    assert by_text.prompt_token_ids == [5, 6, 7]
    assert by_text.token_ids == llm.generate([[5, 6, 7]], GREEDY)[0].token_ids
    assert by_text.text.split() == [f"w{t}" for t in by_text.token_ids]


def test_stream_is_generate_token_by_token(llm):
    tokens = list(llm.stream([5, 6, 7], GREEDY))
    whole = llm.generate([[5, 6, 7]], GREEDY)[0]
    assert [t.token_id for t in tokens] == whole.token_ids
    assert "".join(t.text for t in tokens) == whole.text
    assert [t.finish_reason for t in tokens] == [None] * 4 + ["length"]


def test_a_seed_reproduces_in_any_batch(llm):
    params = SamplingParams(max_tokens=6, temperature=1.5, seed=11, ignore_eos=True)
    alone = llm.generate([[5, 6]], params)[0].token_ids
    assert llm.generate([[9], [5, 6], [1, 2, 3]], params)[1].token_ids == alone
    assert llm.generate([[5, 6]], replace(params, seed=12))[0].token_ids != alone


def test_generation_stops_at_eos_and_says_so(llm):
    free = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=30, temperature=0, ignore_eos=True))[0].token_ids
    eos, llm.core.eos_token_ids = llm.eos_token_ids, frozenset({free[2]})
    try:
        stopped = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=30, temperature=0))[0]
    finally:
        llm.core.eos_token_ids = eos
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free[: free.index(free[2]) + 1]


def test_generation_ends_with_the_context(llm):
    completion = llm.generate([[4] * 45], SamplingParams(max_tokens=30, temperature=0, ignore_eos=True))[0]
    assert len(completion.token_ids) == 3 and completion.finish_reason == "length"


def test_a_stream_left_early_gives_its_pages_back(llm):
    stream = llm.stream([5, 6, 7], GREEDY)
    next(stream)
    with pytest.raises(RuntimeError, match="in the middle of another"):
        llm.generate([[1]], GREEDY)
    stream.close()
    assert llm.blocks.num_free == llm.blocks.num_pages and not llm.scheduler.has_work


def test_prompt_logprobs_are_those_of_generation(llm):
    ids = [5, 6, 7, *llm.generate([[5, 6, 7]], GREEDY)[0].token_ids]
    logprobs = llm.prompt_logprobs(ids)
    logits = torch.cat(list(llm.prompt_logits(ids, 100)))
    expected = [logits[i].log_softmax(-1)[ids[i + 1]].item() for i in range(len(ids) - 1)]
    assert logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], r"prompts\[1\]: empty; expected at least one token"),
        ("", r"prompts\[0\]: empty"),
        ([[1] * 48], r"prompts\[0\]: 48 tokens, but the context holds 48"),
        ([[1, 64]], r"prompts\[0\]: token id 64; expected 0 to 63"),
        ([[-1]], r"prompts\[0\]: token id -1"),
    ],
)
def test_bad_prompts(llm, prompts, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, GREEDY)
    assert llm.blocks.num_free == llm.blocks.num_pages and not llm.scheduler.has_work


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (dict(device="tpu9"), "device: 'tpu9'; expected cpu, cuda"),
        (dict(device="cuda:99"), "device: 'cuda:99', but this machine has"),
        (dict(page_size=0), "page_size: 0; expected at least 1"),
        (dict(cache_tokens=-1), "cache_tokens: -1"),
        (dict(max_model_len=0), "max_model_len: 0"),
    ],
)
def test_bad_arguments(folder, argument, message):
    with pytest.raises(ValueError, match=message):
        LLM(folder, **argument)


def test_a_cache_too_small_for_the_request_is_refused(folder):
    llm = LLM(folder, device="cpu", page_size=4, cache_tokens=8)
    with pytest.raises(ValueError, match="the cache has 2: raise cache_tokens"):
        llm.generate([[1] * 9], GREEDY)
