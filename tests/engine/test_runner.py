"""Steps, padded and not, a step ahead of what is known: the same tokens as transformers' from whole sequences."""

import functools
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers
from stepping import Stepping, load
from tiny_models import TINY, from_config, save, save_tiny_llama

from octavo.engine.inputs import ALIGNMENT, Layout, Shape
from octavo.engine.kv_cache import KVCache
from octavo.engine.layers import DenseLinear
from octavo.engine.model import Decoder

PROMPTS = [[5, 6, 7], [9], list(range(1, 40)), [8, 8], [40, 41, 42, 43], list(range(20, 60)), list(range(1, 38))]
TOLERANCE = dict(abs=2e-4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Transformers' model and ours."""
    folder = tmp_path_factory.mktemp("llama")
    return save_tiny_llama(folder), load(folder)


@functools.cache
def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double()


def continued(model, prompt, count=8, change=lambda logits, generated: logits):
    """Greedy, from the whole text each time."""
    ids = tuple(prompt)
    for _ in range(count):
        ids += (change(logits_of(model, ids)[-1].clone(), ids[len(prompt) :]).argmax().item(),)
    return list(ids[len(prompt) :])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(max_num_batched_tokens=9),
        dict(max_num_batched_tokens=17, page_size=16),
        dict(num_pages=14),  # so that sequences are preempted
        dict(num_pages=14, max_num_batched_tokens=9, max_num_seqs=3),
        dict(caching=True, max_num_batched_tokens=23),
        dict(max_num_seqs=1),
    ],
    ids=str,
)
def test_tokens_are_those_of_whole_sequences(llama, options, padded):
    model, decoder = llama
    engine = Stepping(decoder, padded=padded, **options)
    assert engine.generate(PROMPTS) == [continued(model, prompt) for prompt in PROMPTS]
    if "num_pages" in options:
        assert engine.scheduler.num_preemptions
    again = engine.generate(PROMPTS[::-1], max_tokens=3)
    assert again == [continued(model, prompt, 3) for prompt in PROMPTS[::-1]]
    if "caching" in options:
        assert engine.scheduler.blocks.hits


def test_a_prefix_of_many_pages_comes_with_one_token(llama):
    """More new pages than a step of its size has room for."""
    model, decoder = llama
    prompt = list(range(1, 50))
    engine = Stepping(decoder, page_size=2, caching=True, padded=True)
    assert engine.generate([prompt]) == [continued(model, prompt)]
    engine.add(prompt, max_tokens=4)
    step = engine.scheduler.schedule()
    (chunk,) = step.chunks
    assert chunk.length == 1 and len(chunk.sequence.block_table) > Layout(Shape(1, 1, True), 2).updates
    (sampled,) = engine.runner.start(step).wait()
    assert sampled.token_id == continued(model, prompt, 1)[0]


def test_requests_come_and_go(llama):
    """Slots and pages go from one to the next while others run."""
    model, decoder = llama
    engine = Stepping(decoder, max_num_seqs=3, max_num_batched_tokens=12, num_pages=40, padded=True)
    sequences = []
    for i in range(12):
        prompt = [(7 * i + j) % 64 for j in range(1 + 5 * i % 17)]
        sequences.append((engine.add(prompt, max_tokens=1 + i % 5), prompt))
        for _ in range(i % 3):
            engine.step()
        if i == 6:
            engine.scheduler.finish(sequences[-1][0], "abort")
    engine.run()
    for sequence, prompt in sequences:
        if sequence.finish_reason == "length":
            assert sequence.generated == continued(model, prompt, sequence.params.max_tokens)
    assert [s.finish_reason for s, _ in sequences].count("abort") == 1


def test_a_step_that_fails_leaves_the_others_as_they_were(llama, monkeypatch):
    model, decoder = llama
    engine = Stepping(decoder, max_num_batched_tokens=8, padded=True)
    first = [engine.add(prompt) for prompt in PROMPTS[:2]]
    for _ in range(3):
        engine.step()
    doomed = engine.add(PROMPTS[2])
    hidden = Decoder.hidden

    def fail(self, token_ids, *rest):
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(Decoder, "hidden", fail)
    step = engine.scheduler.schedule()
    with pytest.raises(RuntimeError, match="a kernel failed"):
        engine.runner.start(step)
    monkeypatch.setattr(Decoder, "hidden", hidden)
    engine.scheduler.fail(step)
    assert doomed.finish_reason == "error" and {s.finish_reason for s in first} == {"error"}
    engine._pending = None
    assert engine.generate(PROMPTS) == [continued(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("budget", [7, 64])
def test_logprobs(llama, budget, padded):
    model, decoder = llama
    engine = Stepping(decoder, max_num_batched_tokens=budget, padded=padded)
    sequences = [engine.add(prompt, logprobs=3, prompt_logprobs=2, max_tokens=4) for prompt in PROMPTS]
    plain = engine.add(PROMPTS[2], max_tokens=4)
    engine.run()
    for sequence in sequences:
        expected = logits_of(model, tuple(sequence.token_ids)).log_softmax(-1)
        results = engine.results[sequence.id]
        assert [r.token_id for r in results] == sequence.generated
        entries = results[0].prompt_logprobs + [(r.token_id, r.logprob, r.top) for r in results]
        assert len(entries) == len(sequence.token_ids) - 1 and results[1].prompt_logprobs is None
        for row, (token, logprob, top) in enumerate(entries):
            assert token == sequence.token_ids[row + 1]
            assert logprob == pytest.approx(expected[row, token].item(), **TOLERANCE)
            best = expected[row].topk(2 if row < len(results[0].prompt_logprobs) else 3)
            assert [t for t, _ in top] == best.indices.tolist()
            assert [p for _, p in top] == pytest.approx(best.values.tolist(), **TOLERANCE)
    assert plain.generated == continued(model, PROMPTS[2], 4)
    assert all(r == (r.token_id, None, None, None) for r in engine.results[plain.id])


@pytest.mark.parametrize("budget", [7, 64])
def test_penalties_biases_and_tokens_that_may_not_come_yet(llama, budget):
    model, decoder = llama
    engine = Stepping(decoder, max_num_batched_tokens=budget, num_pages=24, padded=True)  # some are preempted

    def penalised(prompt, repetition, presence, frequency):
        def change(logits, generated):
            for token in {*prompt, *generated}:
                logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
            for token in generated:
                logits[token] -= frequency
            for token in set(generated):
                logits[token] -= presence
            return logits

        return change

    def biased(logits, generated):
        logits[3] += 50
        logits[4] = -torch.inf
        return logits

    expected, sequences = [], []
    for prompt in PROMPTS:
        for repetition, presence, frequency in ((1.7, 0.0, 0.0), (1.0, 2.0, 0.0), (1.2, 0.5, 2.0)):
            names = "repetition_penalty", "presence_penalty", "frequency_penalty"
            params = dict(zip(names, (repetition, presence, frequency), strict=True))
            sequences.append(engine.add(prompt, **params))
            expected.append(continued(model, prompt, 8, penalised(prompt, repetition, presence, frequency)))
        sequences.append(engine.add(prompt, logit_bias={3: 50.0, 4: -np.inf}))
        expected.append(continued(model, prompt, 8, biased))
        sequences.append(engine.add(prompt))
        expected.append(continued(model, prompt))
    free = continued(model, PROMPTS[0])

    def later(logits, generated):
        if len(generated) < 3:
            logits[list(set(free))] = -torch.inf
        return logits

    sequences.append(engine.add(PROMPTS[0], min_tokens=3, stop_token_ids=set(free)))
    expected.append(continued(model, PROMPTS[0], 8, later))
    engine.run()
    assert [s.generated for s in sequences] == expected
    assert expected[0] != free and expected[-1] != free and expected[3] == [3] * 8


def test_a_seed_draws_the_same_in_any_batch(llama):
    _, decoder = llama
    drawn = dict(temperature=1.5, top_p=0.9, seed=11, max_tokens=20)
    (alone,) = Stepping(decoder).generate([PROMPTS[0]], **drawn)
    for options in (dict(padded=True), dict(padded=True, num_pages=20, max_num_batched_tokens=7)):
        engine = Stepping(decoder, **options)
        others = [engine.add(prompt, max_tokens=20, temperature=t) for prompt, t in zip(PROMPTS, (0, 1, 2) * 2)]  # noqa: B905
        same = engine.add(PROMPTS[0], **drawn)
        penalised = engine.add(PROMPTS[0], **drawn, logprobs=0)
        engine.run()
        assert same.generated == penalised.generated == alone
        assert others[0].generated != alone
    (other,) = Stepping(decoder).generate([PROMPTS[0]], **drawn | dict(seed=12))
    assert other != alone
    unseeded = Stepping(decoder).generate([PROMPTS[0]] * 2, **drawn | dict(seed=None))
    assert unseeded[0] != unseeded[1]


def test_a_row_without_a_distribution_says_so_and_spoils_no_other(llama, monkeypatch):
    model, decoder = llama
    engine = Stepping(decoder, padded=True)
    sick, well = engine.add(PROMPTS[0]), engine.add(PROMPTS[2])
    call = DenseLinear.__call__

    def with_nan(self, x):
        out = call(self, x)
        if self is decoder.head and len(engine.results[sick.id]) < 3:
            out[0] = torch.nan
        return out

    monkeypatch.setattr(DenseLinear, "__call__", with_nan)
    engine.run()
    assert -1 in [r.token_id for r in engine.results[sick.id]]
    assert well.generated == continued(model, PROMPTS[2])


@pytest.mark.parametrize("padded", [False, True])
def test_rings_hold_a_window(tmp_path, padded):
    config = transformers.MistralConfig(**TINY | dict(max_position_embeddings=128), sliding_window=12)
    torch.manual_seed(3)
    model = save(from_config(config), tmp_path, torch.float32)
    decoder = load(tmp_path)
    prompts = [list(range(1, 60)), [5, 6, 7], list(range(30, 50))]
    expected = [continued(model, prompt, 30) for prompt in prompts]
    assert Stepping(decoder, padded=padded).generate(prompts, max_tokens=30) == expected
    ring = -(-(12 + 10) // 4) + 1
    engine = Stepping(decoder, padded=padded, ring_pages=ring, max_num_batched_tokens=10, num_pages=3 * ring)
    assert engine.generate(prompts, max_tokens=30) == expected
    with pytest.raises(ValueError, match="ring_pages: 5 pages of 4; expected at least 21 tokens"):
        Stepping(decoder, ring_pages=5, max_num_batched_tokens=10)


def test_a_ring_needs_a_window(llama):
    with pytest.raises(ValueError, match=r"None for a model without a window \(sliding_window: None\)"):
        Stepping(llama[1], ring_pages=100)


ERRORS = {torch.int8: 0.03, torch.float8_e4m3fn: 0.15, torch.float8_e5m2: 0.4}


@pytest.mark.parametrize(
    ("dtype", "scale"), [*((dtype, None) for dtype in ERRORS), (torch.float8_e4m3fn, 0.75)], ids=str
)
def test_quantised_caches(llama, dtype, scale):
    """Log-probabilities are near those of the plain cache; int8's are nearest."""
    model, decoder = llama
    if scale is not None:
        scales = dict.fromkeys(("k_scale", "v_scale"), torch.tensor(scale))
        decoder = replace(decoder, layers=tuple(replace(layer, **scales) for layer in decoder.layers))
    engine = Stepping(decoder, cache_dtype=dtype, padded=True, max_num_batched_tokens=23)
    sequences = [engine.add(prompt, prompt_logprobs=0, max_tokens=1) for prompt in PROMPTS]
    engine.run()
    errors = []
    for sequence in sequences:
        expected = logits_of(model, tuple(sequence.token_ids)).log_softmax(-1)
        for row, entry in enumerate(engine.results[sequence.id][0].prompt_logprobs):
            errors.append(abs(entry.logprob - expected[row, entry.token_id].item()))
    assert 1e-4 < np.mean(errors) < ERRORS[dtype]
    cache = engine.runner.cache
    if scale is not None:  # else the same numbers would be there with other scales, or none
        unscaled = Stepping(llama[1], cache_dtype=dtype)
        unscaled.generate(PROMPTS[:1], max_tokens=1)
        page = unscaled.runner.cache.data[0, 0, 0, :3].float()
        first = Stepping(decoder, cache_dtype=dtype)
        first.generate(PROMPTS[:1], max_tokens=1)
        scaled = first.runner.cache.data[0, 0, 0, :3].float() * scale
        assert not torch.equal(scaled, page) and torch.allclose(scaled, page, rtol=0.13, atol=0.01)
    assert cache.nbytes == 64 * KVCache.page_bytes(decoder.config, 4, dtype) == engine.runner.memory["cache"]


def test_fields_are_aligned_and_apart():
    for shape in (Shape(1, 1, True), Shape(7, 3, False), Shape(64, 6, False)):
        layout = Layout(shape, 4)
        ends = [(at, at + count * np.dtype(dtype).itemsize) for dtype, at, count in layout.fields.values()]
        assert all(at % ALIGNMENT == 0 for at, _ in ends) and ends[-1][1] <= layout.nbytes
        assert all(end <= at for (_, end), (at, _) in pairwise(ends))


def test_a_cpu_has_nothing_to_capture(llama):
    engine = Stepping(llama[1])
    assert engine.runner.num_graphs == engine.runner.memory["graphs"] == 0
    with pytest.raises(ValueError, match="device: cpu; only a GPU's kernels are compiled"):
        engine.runner.warmup()
