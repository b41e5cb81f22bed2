"""Settings of the slots, and draws by them."""

import numpy as np
import pytest
import torch

import octavo
from octavo.engine.inputs import Layout, Shape
from octavo.engine.params import SamplingParams
from octavo.engine.sampler import Mode, SlotSettings, drawn_settings, prompt_logprobs
from octavo.engine.sequence import Sequence


def sequence(i, slot=None, generated=0, stop_token_ids=(), **params):
    s = Sequence(i, [0], SamplingParams(**params), stop_token_ids=frozenset(stop_token_ids))
    s.token_ids += [1] * generated
    s.slot = i if slot is None else slot
    return s


def settings_of(requests, size=8):
    settings = SlotSettings(size)
    for request in requests:
        settings.adopt(request)
    return settings


def draw(settings, logits, requests, rows=None):
    """Tokens of rows as a step of so many (padded) would draw them."""
    shape = Shape(rows or len(requests), rows or len(requests), True)
    buffer = torch.full((Layout(shape, 16).nbytes,), 255, dtype=torch.uint8)
    host = Layout(shape, 16).views(buffer.numpy(), np)
    slots = np.array([r.slot for r in requests], np.int32)
    settings.pack(host, slots, np.array([len(r.token_ids) for r in requests], np.int32))
    fields = Layout(shape, 16).views(buffer, torch)
    padded = torch.cat((logits, logits.new_zeros(shape.sequences - len(logits), logits.shape[1])))
    return octavo.sample(padded, **drawn_settings(fields)).tolist()[: len(requests)]


def test_greedy_takes_the_largest_also_beside_draws():
    logits = torch.randn(3, 50)
    requests = [sequence(0, temperature=0), sequence(1), sequence(2, temperature=1e-6)]
    tokens = draw(settings_of(requests), logits, requests)
    assert [tokens[0], tokens[2]] == logits.argmax(-1)[[0, 2]].tolist()


def test_frequencies_follow_the_softmax():
    """Chi-squared against the exact probabilities; 99.9 % quantile of 5 degrees of freedom is 20.5."""
    logits, temperature, draws = torch.tensor([[0.5, 2.0, -1.0, 0.0, 1.5, -0.5]]), 0.8, 4000
    probs = (logits[0] / temperature).softmax(-1)
    s = sequence(0, temperature=temperature, seed=3)
    settings, counts = settings_of([s]), torch.zeros(6)
    for _ in range(draws):
        s.token_ids.append(draw(settings, logits, [s])[0])
        counts[s.token_ids[-1]] += 1
    assert ((counts - draws * probs) ** 2 / (draws * probs)).sum() < 20.5


def test_a_seed_draws_the_same_in_any_batch_slot_and_padding():
    logits = torch.randn(4, 1000)
    alone = sequence(7, seed=5)
    (expected,) = draw(settings_of([alone]), logits[2:3], [alone])
    batch = [sequence(0, seed=1), sequence(1, temperature=0), sequence(2, slot=5, seed=5), sequence(3)]
    assert draw(settings_of(batch), logits, batch, rows=8)[2] == expected


def test_a_request_keeps_its_seed_in_another_slot_until_it_is_forgotten():
    request, logits = sequence(0), torch.zeros(1, 100_000)
    settings = settings_of([request])
    first = draw(settings, logits, [request])
    request.slot = 4
    settings.adopt(request)
    assert draw(settings, logits, [request]) == first
    settings.forget(request)
    settings.forget(request)
    settings.adopt(request)
    assert draw(settings, logits, [request]) != first


def test_filters_of_each_request():
    logits = torch.tensor([[3.0, 2.9, 2.8, 0.0]]).expand(4, -1).contiguous()
    filters = [dict(top_k=1), dict(top_p=0.3, temperature=50.0), dict(min_p=0.95), dict(temperature=0)]
    for seed in range(20):
        requests = [sequence(i, **f, seed=seed) for i, f in enumerate(filters)]
        tokens = draw(settings_of(requests), logits, requests)
        assert tokens[0] == tokens[3] == 0 and tokens[1] in (0, 1) and tokens[2] == 0


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 + 5, 10**30])
def test_a_seed_of_any_size_will_do(seed):
    logits = torch.randn(1, 1000)
    requests = [sequence(i, seed=seed) for i in range(2)]
    assert len({draw(settings_of([r]), logits, [r])[0] for r in requests}) == 1


@pytest.mark.parametrize(
    ("params", "start", "mode"),
    [
        (dict(temperature=0), 0, Mode.GREEDY),
        (dict(temperature=0, top_k=5), 0, Mode.GREEDY),
        (dict(), 0, Mode.DRAWN),
        (dict(temperature=0, presence_penalty=0.1), 9, Mode.EDITED),
        (dict(temperature=0, repetition_penalty=1.1), 9, Mode.EDITED),
        (dict(temperature=0, logit_bias={1: 2}), 9, Mode.EDITED),
        (dict(temperature=0, logprobs=0), 9, Mode.EDITED),
        (dict(temperature=0, prompt_logprobs=0), 0, Mode.EDITED),
        (dict(temperature=0, prompt_logprobs=0), 1, Mode.GREEDY),
        (dict(temperature=0, min_tokens=3), 2, Mode.EDITED),
        (dict(temperature=0, min_tokens=3), 3, Mode.GREEDY),
    ],
)
def test_what_a_step_ends_with(params, start, mode):
    others = [sequence(0, temperature=0), sequence(1, stop_token_ids=(3,), **params)]
    slots, starts = np.array([0, 1], np.int32), np.array([5, start], np.int32)
    assert settings_of(others).mode(slots, starts, starts + 1) is mode


@pytest.mark.parametrize(("temperature", "mode"), [(0, Mode.GREEDY), (1, Mode.DRAWN)])
def test_a_prompt_that_goes_on_is_no_reason_to_leave_the_graph(temperature, mode):
    long = sequence(0, temperature=temperature, min_tokens=2, stop_token_ids=(3,))
    long.token_ids, long.prompt_length = [0] * 30, 30
    settings, slot = settings_of([long]), np.array([0])
    for start, end in ((0, 16), (16, 29)):
        assert settings.mode(slot, np.array([start]), np.array([end])) is mode
    assert settings.mode(slot, np.array([16]), np.array([30])) is Mode.EDITED, "it samples, and may not end yet"


def test_without_stop_tokens_nothing_ends_too_early():
    settings = settings_of([sequence(0, temperature=0, min_tokens=3)])
    assert settings.mode(np.array([0]), np.array([0]), np.array([1])) is Mode.GREEDY


def test_prompt_logprobs_some_rows_at_a_time():
    hidden, head, targets = torch.randn(10, 8), torch.randn(30, 8), torch.arange(10)
    parts = prompt_logprobs(lambda x: x @ head.t(), hidden, targets, 3, at_once=4)
    assert [len(p) for p, _, _ in parts] == [4, 4, 2]
    expected = (hidden @ head.t()).log_softmax(-1)
    found, ids, top = (torch.cat(x) for x in zip(*parts, strict=True))
    assert torch.equal(found, expected[torch.arange(10), targets])
    assert torch.equal(top, expected.topk(3).values) and torch.equal(ids, expected.topk(3).indices)
