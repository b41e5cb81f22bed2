"""Right answers under load: a prompt is continued as alone, whatever is in the batch and however it got there."""

import gc
import random
import resource
import warnings

import pytest
import torch
import transformers
from tiny_models import from_config, save_tiny_llama, save_tokenizer

from octavo.engine import LLM, SamplingParams
from octavo.testing import without_interpreter

TIE = 1e-3
"""Logits as near as this may change places where sums are taken in another order."""
NEW = 12
SETTINGS = {
    "one batch": dict(max_num_seqs=32),
    "chunks of 16": dict(max_num_seqs=32, max_num_batched_tokens=16),
    "no prefixes": dict(max_num_seqs=32, enable_prefix_caching=False),
    "few pages": dict(max_num_seqs=32, page_size=4, cache_tokens=160, max_num_batched_tokens=64),
    "few pages, no prefixes": dict(max_num_seqs=32, page_size=4, cache_tokens=160, enable_prefix_caching=False),
}


def prompts_of(vocab, count=32, longest=60):
    """Of any length up to 60; every other one begins as others do."""
    chance = random.Random(5)
    shared = [chance.randrange(vocab) for _ in range(longest // 2)]
    prompts = []
    for number in range(count):
        own = [chance.randrange(vocab) for _ in range(chance.randint(1, longest // 2))]
        prompts.append(shared[: chance.randint(1, longest // 2)] + own if number % 2 else own)
    return prompts


def assert_same(llm, expected, got):
    """The same tokens, or from where they part the two were as good as one another."""
    for one, other in zip(expected, got, strict=True):
        assert one.prompt_token_ids == other.prompt_token_ids and one.finish_reason == other.finish_reason
        if one.token_ids != other.token_ids:
            at = next(i for i, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=True)) if a != b)
            ids = [*one.prompt_token_ids, *one.token_ids[:at]]
            logits = torch.cat(list(llm.prompt_logits(ids, 64)))[-1]
            behind = (logits[one.token_ids[at]] - logits[other.token_ids[at]]).abs().item()
            assert behind < TIE, f"token {at} is another, by {behind}"
            warnings.warn(f"two tokens were {behind:.1e} apart", stacklevel=1)


def answers(llm, prompts, **params):
    params = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True, **params)
    return llm.generate(prompts, params, progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_llama(folder, num_hidden_layers=1)
    return str(folder)


@pytest.fixture(scope="module")
def alone(folder):
    """The model, and what each prompt gives by itself, where nothing is cached."""
    with without_interpreter():  # which is for each test, and this is done for all of them
        llm = LLM(folder, device="cpu", max_num_seqs=1, enable_prefix_caching=False)
        return llm, [answers(llm, [prompt])[0] for prompt in prompts_of(64)]


@pytest.mark.parametrize("setting", SETTINGS)
def test_32_prompts_are_continued_as_alone(folder, alone, setting):
    one, expected = alone
    llm = LLM(folder, device="cpu", **SETTINGS[setting])
    prompts = prompts_of(64)
    for _ in range(2):  # the second time every beginning may be in the cache
        assert_same(one, expected, answers(llm, prompts))
        assert llm.blocks.num_used == 0
    assert (llm.scheduler.num_preemptions > 10) == ("few pages" in setting)
    assert (llm.blocks.hit_rate > 0.2) == llm.blocks.enable_prefix_caching


def test_log_probabilities_are_those_of_the_prompt_however_often_it_is_computed(folder, alone):
    one, _ = alone
    llm = LLM(folder, device="cpu", **SETTINGS["few pages"])
    prompts = prompts_of(64)
    for prompt, done in zip(prompts, answers(llm, prompts, prompt_logprobs=0, logprobs=0), strict=True):
        ids = prompt + done.token_ids
        exact = torch.cat(list(one.prompt_logits(ids, 128))).log_softmax(-1)
        told = (done.prompt_logprobs or []) + done.logprobs
        assert [token.token_id for token in told] == ids[1:] and done.num_cached_tokens == 0
        expected = [exact[i, token].item() for i, token in enumerate(ids[1:])]
        assert [token.logprob for token in told] == pytest.approx(expected, abs=1e-3)
    assert llm.scheduler.num_preemptions > 10


def test_a_ring_gives_the_same_text(tmp_path):
    torch.manual_seed(4)
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.MistralConfig(
        **sizes, num_key_value_heads=2, max_position_embeddings=128, sliding_window=11, initializer_range=0.2
    )
    config.eos_token_id = None
    from_config(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, 64)
    prompts = prompts_of(64)[:12]
    whole = LLM(str(tmp_path), device="cpu", max_num_batched_tokens=256, page_size=4)
    assert whole.blocks.ring_pages * 4 > 128, "longer than the context: nothing is written over"
    expected = answers(whole, prompts)
    rings = LLM(str(tmp_path), device="cpu", max_num_batched_tokens=9, page_size=4, cache_tokens=80)
    assert rings.blocks.ring_pages == 6 and not rings.blocks.enable_prefix_caching
    assert_same(whole, expected, answers(rings, prompts))
    assert rings.scheduler.num_preemptions > 0 and rings.blocks.num_used == 0


def serve(folder, count):
    """Requests of random lengths, with aborts, and steps that fail before or after they were computed."""
    chance = random.Random(3)
    llm = LLM(folder, device="cpu", max_num_seqs=16, page_size=4, cache_tokens=400, max_num_batched_tokens=64)
    core, start, forget, forgotten = llm.core, llm.runner.start, llm.runner.forget, set()

    def forgetting(sequence):
        forgotten.add(sequence.id)
        forget(sequence)

    def failing(step):
        if chance.random() < 0.005:
            raise RuntimeError("no kernel image is available")
        pending = start(step)
        if chance.random() < 0.005:
            raise RuntimeError("an illegal memory access was encountered")
        return pending

    llm.runner.start, llm.runner.forget = failing, forgetting
    beginning = [chance.randrange(64) for _ in range(20)]
    waiting, ended, memory = [], [], []
    for number in range(count):
        prompt = beginning[: chance.choice([0, 0, 8, 20])] + [
            chance.randrange(64) for _ in range(chance.randint(1, 20))
        ]
        params = SamplingParams(max_tokens=chance.randint(1, 12), temperature=0)
        waiting.append(core.add(str(number), prompt, params))
        if chance.random() < 0.1:
            core.abort(chance.choice(waiting).id)
        while len(waiting) > 24 or (waiting and number == count - 1):
            core.step()
            ended += [(r.completion, r.params.max_tokens) for r in waiting if r.unfinished == 0]
            waiting = [r for r in waiting if r.unfinished]
        if number in (count // 2, count - 1):
            gc.collect()
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    core.drain()
    llm.runner.start = start
    assert llm.blocks.num_used == 0 and not core.has_work and not core._requests and len(forgotten) == count
    return ended, memory


def check_ends(folder, ended, compared):
    reasons = [completion.finish_reason for completion, _ in ended]
    assert set(reasons) == {"length", "abort", "error"}
    for completion, most in ended:
        if completion.finish_reason == "error":
            assert "RuntimeError: " in completion.error and completion.request_id in completion.error
        else:
            assert completion.error is None and len(completion.token_ids) <= most
    llm = LLM(folder, device="cpu", enable_prefix_caching=False)
    for completion, most in [e for e in ended if e[0].finish_reason == "length"][:: len(ended) // compared]:
        params = SamplingParams(max_tokens=most, temperature=0)
        assert_same(llm, llm.generate([completion.prompt_token_ids], params, progress=False), [completion])
    return reasons


def test_requests_end_in_an_answer_or_an_error_of_their_own(folder):
    ended, _ = serve(folder, 500)
    assert len(check_ends(folder, ended, 40)) == 500


@pytest.mark.slow
def test_ten_thousand_requests_on_a_model(folder):
    ended, (half, whole) = serve(folder, 10_000)
    assert len(check_ends(folder, ended, 200)) == 10_000
    assert whole - half < 20, "MiB more after the second half"


TEXT = (
    "The sea is everything. It covers seven tenths of the terrestrial globe. Its breath is pure and healthy. It is an "
    "immense desert, where man is never lonely, for he feels life stirring on all sides. "
) * 3
WHERE = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.slow
@pytest.mark.parametrize("device", WHERE)
def test_smollm2_continues_32_texts_as_alone(device):
    def load(**options):
        return LLM("smollm2", device=device, dtype=torch.float32, **options)

    one = load(max_num_seqs=1, enable_prefix_caching=False)
    ids = one.tokenizer.encode(TEXT)
    prompts = [ids[start : start + 5 + 3 * start] for start in range(32)]
    expected = [answers(one, [prompt])[0] for prompt in prompts]
    for setting, options in SETTINGS.items():
        llm = load(**options)
        for _ in range(2):
            assert_same(one, expected, answers(llm, prompts))
        assert (llm.scheduler.num_preemptions > 0) == ("few pages" in setting)
