"""The front door, on a tiny random model."""

import asyncio
import shutil
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import save_bpe_tokenizer, save_tiny_llama, save_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers

from octavo.engine import LLM, AsyncLLM, SamplingParams

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
        (dict(gpu_memory_utilization=0.0), "gpu_memory_utilization: 0.0; expected more than 0"),
        (dict(gpu_memory_utilization=1.5), "gpu_memory_utilization: 1.5"),
        (dict(kv_cache_dtype="fp16"), "kv_cache_dtype: 'fp16'; expected one of fp8, fp8_e5m2, int8, or None"),
    ],
)
def test_bad_arguments(folder, argument, message):
    with pytest.raises(ValueError, match=message):
        LLM(folder, **argument)


@pytest.mark.parametrize(("cache", "rounding"), [("fp8", 2**-4), ("fp8_e5m2", 2**-3), ("int8", 2**-8)])
def test_a_quantised_cache_holds_the_same_tokens_in_less(folder, llm, cache, rounding):
    small = LLM(folder, device="cpu", page_size=4, cache_tokens=200, kv_cache_dtype=cache)
    assert small.runner.cache.nbytes < 0.6 * llm.runner.cache.nbytes
    text = [5, 6, 7, 40, 41, 42, 43, 9, 9, 8, 20]
    exact, rounded = (torch.tensor(m.prompt_logprobs(text)) for m in (llm, small))
    assert 0 < (exact - rounded).abs().mean() < 8 * rounding  # of log-probabilities from -6 to -11
    assert len(small.generate([text], GREEDY)[0].token_ids) == 5


def test_a_cache_too_small_for_the_request_is_refused(folder):
    llm = LLM(folder, device="cpu", page_size=4, cache_tokens=8)
    with pytest.raises(ValueError, match="the cache has 2: raise cache_tokens"):
        llm.generate([[1] * 9], GREEDY)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A model with a tokenizer of bytes and few words, and a chat template."""
    folder = tmp_path_factory.mktemp("bpe")
    save_tiny_llama(folder, vocab_size=300)
    _, eos = save_bpe_tokenizer(folder, 300)
    llm = LLM(str(folder), device="cpu", max_num_seqs=8)
    assert llm.eos_token_ids == {eos}
    return llm


def free(llm, tokens=20, **others):
    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, **others)


def test_a_stop_string_ends_the_text_before_it(bpe):
    whole = bpe.generate("the sea", free(bpe))[0]
    at = len(whole.text) // 2
    stop = whole.text[at : at + 2]
    assert stop.isascii()
    done = bpe.generate("the sea", free(bpe, stop=[stop, "not there"]))[0]
    assert done.text == whole.text[: whole.text.find(stop)] and done.finish_reason == "stop"
    assert done.outputs[0].stop_reason == stop
    assert done.token_ids == whole.token_ids[: len(done.token_ids)] and stop in bpe.tokenizer.decode(done.token_ids)
    pieces = list(bpe.stream("the sea", free(bpe, stop=stop)))
    assert "".join(p.text for p in pieces) == done.text and pieces[-1].finish_reason == "stop"


def test_a_stop_token_ends_the_text_before_it(bpe):
    whole = bpe.generate("the sea", free(bpe))[0]
    token = whole.token_ids[9]
    done = bpe.generate("the sea", free(bpe, stop_token_ids=[token]))[0]
    length = whole.token_ids.index(token) + 1
    assert done.token_ids == whole.token_ids[:length] and done.outputs[0].stop_reason == token
    assert done.text == bpe.tokenizer.decode(whole.token_ids[: length - 1]) and done.finish_reason == "stop"
    assert "".join(t.text for t in bpe.stream("the sea", free(bpe, stop_token_ids=[token]))) == done.text


def test_min_tokens_forbids_ends_until_then(bpe):
    whole = bpe.generate("the sea", free(bpe))[0].token_ids
    stops = whole[:3]
    params = free(bpe, stop_token_ids=stops, min_tokens=5)
    done = bpe.generate("the sea", params)[0]
    assert len(done.token_ids) > 5 and not set(stops) & set(done.token_ids[:5])


def test_several_continuations_with_a_seed_are_those_of_their_seeds(bpe):
    params = SamplingParams(max_tokens=8, seed=5, n=3)
    done = bpe.generate(["the sea", "then"], params)
    assert [len(c.outputs) for c in done] == [3, 3] and len({tuple(o.token_ids) for o in done[0].outputs}) == 3
    for i in range(3):
        single = bpe.generate("the sea", replace(params, n=1, seed=5 + i))[0]
        assert single.token_ids == done[0].outputs[i].token_ids and single.text == done[0].outputs[i].text
    assert done[0].text == done[0].outputs[0].text


def test_logprobs_of_tokens_and_prompt_are_the_models(bpe):
    prompt = bpe.tokenizer.encode("the sea and the sky")
    done = bpe.generate([prompt], free(bpe, 6, logprobs=2, prompt_logprobs=1))[0]
    ids = prompt + done.token_ids
    exact = torch.cat(list(bpe.prompt_logits(ids, 7))).log_softmax(-1)
    assert [t.token_id for t in done.prompt_logprobs + done.logprobs] == ids[1:]
    for position, token in enumerate(done.prompt_logprobs + done.logprobs):
        k = 1 if position < len(prompt) - 1 else 2
        assert token.logprob == pytest.approx(exact[position, ids[position + 1]].item(), abs=1e-4)
        assert [i for i, _ in token.top] == exact[position].topk(k).indices.tolist()
        assert [p for _, p in token.top] == pytest.approx(exact[position].topk(k).values.tolist(), abs=1e-4)
    assert done.outputs[0].cumulative_logprob == pytest.approx(sum(t.logprob for t in done.logprobs))
    assert bpe.generate([prompt], free(bpe, 2))[0].logprobs is None
    small = LLM.from_decoder(bpe.model, max_num_batched_tokens=3, page_size=2)
    assert [t.logprob for t in done.prompt_logprobs] == pytest.approx(
        [t.logprob for t in small.generate([prompt], free(bpe, 1, prompt_logprobs=0))[0].prompt_logprobs], abs=1e-4
    )


def test_biases_force_and_forbid(bpe):
    whole = bpe.generate("the sea", free(bpe))[0].token_ids
    assert bpe.generate("the sea", free(bpe, 3, logit_bias={7: 1000.0}))[0].token_ids == [7] * 3
    assert whole[0] not in bpe.generate("the sea", free(bpe, logit_bias={whole[0]: -float("inf")}))[0].token_ids


def test_penalties_keep_from_repeating(bpe):
    often = bpe.generate("the sea", free(bpe, 12, logit_bias={7: 100.0, 8: 99.0, 9: 98.0}))[0].token_ids
    assert often == [7] * 12
    less = bpe.generate("the sea", free(bpe, 12, logit_bias={7: 100.0, 8: 99.0, 9: 98.0}, frequency_penalty=2.0))[0]
    assert {7, 8} <= set(less.token_ids) and less.token_ids[0] == 7


def test_one_of_all_and_settings_of_each(bpe):
    prompts = [[5, 6, 7], [9], [8, 8]]
    settings = [free(bpe, 2), free(bpe, 5), free(bpe, 1, logprobs=0)]
    done = bpe.generate(prompts, settings, priority=[2, 1, 0])
    assert [len(c.token_ids) for c in done] == [2, 5, 1] and [c.prompt_token_ids for c in done] == prompts
    assert done[2].logprobs and done[0].logprobs is None
    assert bpe.generate([5, 6, 7], settings[0])[0].token_ids == done[0].token_ids
    assert bpe.generate([], settings[0]) == []
    with pytest.raises(ValueError, match="params: 2 of them; expected one for each of 3 prompts"):
        bpe.generate(prompts, settings[:2])
    with pytest.raises(ValueError, match="priority: 1 of them"):
        bpe.generate(prompts, settings, priority=[1])


def test_chats_are_answered_one_by_one_or_together(bpe):
    one, two = [{"role": "user", "content": "the sea"}], [{"role": "user", "content": "then"}]
    answers = bpe.chat([one, two], free(bpe, 4))
    assert [a.token_ids for a in answers] == [bpe.chat(c, free(bpe, 4)).token_ids for c in (one, two)]
    assert "".join(t.text for t in bpe.stream(one, free(bpe, 4))) == answers[0].text


def test_the_prefix_cache_is_used_and_its_hits_are_told(bpe):
    prompt = list(range(40))
    first, again = (bpe.generate([prompt], free(bpe, 4))[0] for _ in range(2))
    assert first.token_ids == again.token_ids and (first.num_cached_tokens, again.num_cached_tokens) == (0, 32)
    assert 0 < bpe.blocks.hit_rate < 1


def test_errors_are_returned_where_they_are_wanted(bpe):
    prompts = [[5], [], [300], "the sea", [1] * 200]
    done = bpe.generate(prompts, free(bpe, 3), return_errors=True)
    assert [c.finish_reason for c in done] == ["length", "error", "error", "length", "error"]
    assert done[0].token_ids == bpe.generate([[5]], free(bpe, 3))[0].token_ids
    assert done[1].error == "prompts[1]: empty; expected at least one token"
    assert "prompts[2]: token id 300" in done[2].error and "prompts[4]: 200 tokens" in done[4].error
    settings = [free(bpe, 3), free(bpe, 3, logit_bias={300: 1.0})]
    assert [c.finish_reason for c in bpe.generate([[5], [5]], settings, return_errors=True)] == ["length", "error"]
    with pytest.raises(TypeError, match=r"prompts\[0\]: .*expected a text, or token ids"):
        bpe.generate([[5, "x"]])


def test_a_failing_step_is_raised_or_returned(bpe, monkeypatch):
    start, calls = bpe.runner.start, []

    def failing(step):
        calls.append(step)
        if len(calls) == 2:
            raise RuntimeError("an illegal memory access was encountered")
        return start(step)

    monkeypatch.setattr(bpe.runner, "start", failing)
    with pytest.raises(RuntimeError, match="request .*: RuntimeError: an illegal memory access"):
        bpe.generate([[5], [6]], free(bpe, 3))
    assert bpe.blocks.num_used == 0 and not bpe.core.has_work
    calls.clear()
    (done,) = bpe.generate([[5]], free(bpe, 3), return_errors=True)
    assert done.finish_reason == "error" and "illegal memory access" in done.error
    calls.clear()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(bpe.stream([5], free(bpe, 3)))
    assert bpe.generate([[5]], free(bpe, 3))[0].finish_reason == "length"


def test_a_decoder_without_a_tokenizer_takes_token_ids(bpe):
    llm = LLM.from_decoder(bpe.model, max_num_seqs=2, cache_tokens=64)
    done = llm.generate([[5, 6, 7]], free(bpe, 4))[0]
    assert done.token_ids == bpe.generate([[5, 6, 7]], free(bpe, 4))[0].token_ids and done.text == ""
    for wanted in (lambda: llm.generate("text"), lambda: llm.tokenizer):
        with pytest.raises(ValueError, match="no tokenizer: give it token ids"):
            wanted()
    with pytest.raises(ValueError, match="page_size: 0"):
        LLM.from_decoder(bpe.model, page_size=0)


def test_progress_tells_tokens_per_second(bpe, capfd):
    bpe.generate([[5], [6]], free(bpe, 3), progress=True)
    seen = capfd.readouterr()
    assert "2/2" in seen.err and "tokens/s in" in seen.err and seen.out == ""
    bpe.generate([[5], [6]], free(bpe, 3))
    assert capfd.readouterr().err == "", "this is no terminal"


def test_async_answers_are_those_of_generate(bpe):
    messages = [{"role": "user", "content": "the sea"}]
    stop = bpe.generate("the sea", free(bpe))[0].text[5:7]
    expected = [bpe.generate("the sea", free(bpe, stop=stop))[0], bpe.chat(messages, free(bpe, 4, logprobs=1))]

    async def last(steps):
        seen = [completion async for completion in steps]
        assert all(later.text.startswith(c.text) for c, later in pairwise(seen))
        return seen[-1]

    async def main():
        async with AsyncLLM(bpe) as server:
            asked = (
                server.generate("the sea", free(bpe, stop=stop)),
                server.generate(messages, free(bpe, 4, logprobs=1)),
            )
            got = await asyncio.gather(*map(last, asked))
            with pytest.raises(RuntimeError, match="in the middle of another"):
                bpe.generate("the sea")
            streamed = [token.text async for token in server.stream("the sea", free(bpe, stop=stop))]
        return got, "".join(streamed)

    got, streamed = asyncio.run(main())
    assert [c.text for c in got] == [c.text for c in expected] and streamed == got[0].text
    assert [c.token_ids for c in got] == [c.token_ids for c in expected]
    assert [t.token_id for t in got[1].logprobs] == got[1].token_ids and got[0].outputs[0].stop_reason == stop


def test_a_quantised_cache_and_no_graphs_by_option(folder):
    llm = LLM(folder, device="cpu", page_size=4, kv_cache_dtype="int8", enforce_eager=True)
    assert llm.runner.cache.data.dtype == torch.int8 and llm.runner.num_graphs == 0
    plain = LLM(folder, device="cpu", page_size=4, cache_tokens=4 * llm.blocks.num_pages)
    assert llm.generate([[5, 6, 7]], GREEDY)[0].token_ids == plain.generate([[5, 6, 7]], GREEDY)[0].token_ids


@pytest.mark.parametrize(("per_head", "cache"), [(False, "fp8"), (True, "fp8"), (False, "fp8_e5m2")])
def test_the_scales_of_a_checkpoint_are_those_of_a_float8_cache(tmp_path, per_head, cache):
    """Stored is k / scale: as if k_proj were divided, and q_proj multiplied; of values, v_proj and o_proj."""
    save_tiny_llama(tmp_path / "source")
    save_tokenizer(tmp_path / "source", 64)
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    # Powers of two, which round nothing but where what they divide becomes subnormal in float8.
    scales = {"k": torch.tensor([0.25, 4.0]), "v": torch.tensor([64.0 if cache == "fp8" else 2.0**15, 0.5])}
    scales = scales if per_head else {part: scale[:1] for part, scale in scales.items()}
    scaled, by_hand = dict(tensors), dict(tensors)
    for layer in range(2):
        at = f"model.layers.{layer}.self_attn"
        k, v = (scale.expand(2).repeat_interleave(16)[:, None] for scale in scales.values())  # of two heads
        scaled |= {f"{at}.{part}_scale": scale.clone() for part, scale in scales.items()}
        by_hand[f"{at}.k_proj.weight"] = tensors[f"{at}.k_proj.weight"] / k
        by_hand[f"{at}.v_proj.weight"] = tensors[f"{at}.v_proj.weight"] / v
        of_queries = [scale.view(2, 1, 16).expand(2, 2, 16).reshape(-1) for scale in (k, v)]  # of four heads
        by_hand[f"{at}.q_proj.weight"] = tensors[f"{at}.q_proj.weight"] * of_queries[0][:, None]
        by_hand[f"{at}.o_proj.weight"] = tensors[f"{at}.o_proj.weight"] * of_queries[1]
    logits, ids = {}, list(range(3, 40))
    for name, of in (("plain", tensors), ("scaled", scaled), ("by hand", by_hand)):
        shutil.copytree(tmp_path / "source", tmp_path / name)
        save_file(of, tmp_path / name / "model.safetensors")
        llm = LLM(str(tmp_path / name), device="cpu", kv_cache_dtype=cache, cache_tokens=64)
        logits[name] = torch.cat(list(llm.prompt_logits(ids, 8)))
    assert torch.allclose(logits["scaled"], logits["by hand"], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits["scaled"], logits["plain"], rtol=1e-3, atol=1e-3)
    others = [LLM(str(tmp_path / name), device="cpu", cache_tokens=64) for name in ("plain", "scaled")]
    plain, unused = (torch.cat(list(llm.prompt_logits(ids, 8))) for llm in others)
    assert torch.equal(plain, unused), "a cache that is not quantised has no use for them"
