import pytest
import torch

from octavo.engine.sampler import Sampler
from octavo.engine.sequence import SamplingParams, Sequence


def sequence(i, **params):
    return Sequence(i, [0], SamplingParams(**params))


def test_greedy_takes_the_largest():
    logits = torch.randn(3, 50)
    greedy = [sequence(i, temperature=0) for i in range(3)]
    assert Sampler(torch.device("cpu")).sample(logits, greedy) == logits.argmax(-1).tolist()


def test_frequencies_follow_the_softmax():
    """Chi-squared against the exact probabilities; 99.9 % quantile of 5 degrees of freedom is 20.5."""
    logits, temperature, draws = torch.tensor([[0.5, 2.0, -1.0, 0.0, 1.5, -0.5]]), 0.8, 4000
    probs = (logits[0] / temperature).softmax(-1)
    sampler, s = Sampler(torch.device("cpu")), sequence(0, temperature=temperature, seed=3)
    counts = torch.zeros(6)
    for _ in range(draws):
        s.token_ids.append(sampler.sample(logits, [s])[0])
        counts[s.token_ids[-1]] += 1
    assert ((counts - draws * probs) ** 2 / (draws * probs)).sum() < 20.5


def test_a_seed_draws_the_same_in_any_batch():
    logits = torch.randn(4, 1000)
    alone = Sampler(torch.device("cpu")).sample(logits[2:3], [sequence(7, seed=5)])
    batch = [sequence(0, seed=1), sequence(1, temperature=0), sequence(2, seed=5), sequence(3)]
    assert Sampler(torch.device("cpu")).sample(logits, batch)[2] == alone[0]


def test_unseeded_requests_differ_and_state_is_forgotten():
    sampler = Sampler(torch.device("cpu"))
    logits, requests = torch.zeros(2, 100_000), [sequence(0), sequence(1)]
    a, b = sampler.sample(logits, requests)
    assert a != b
    sampler.forget(requests[0])
    sampler.forget(requests[0])
    assert list(sampler._seeds) == [1]


def test_filters_of_each_request():
    logits = torch.tensor([[3.0, 2.9, 2.8, 0.0]]).expand(4, -1).contiguous()
    filters = [dict(top_k=1), dict(top_p=0.3, temperature=50.0), dict(min_p=0.95), dict(temperature=0)]
    requests = [sequence(i, **f) for i, f in enumerate(filters)]
    for _ in range(20):
        tokens = Sampler(torch.device("cpu")).sample(logits, requests)
        assert tokens[0] == tokens[3] == 0 and tokens[1] in (0, 1) and tokens[2] == 0


def test_a_seed_of_any_size_will_do():
    logits = torch.randn(1, 1000)
    for seed in (-1, 2**63, 2**64 + 5, 10**30):
        first, second = (Sampler(torch.device("cpu")).sample(logits, [sequence(0, seed=seed)]) for _ in range(2))
        assert first == second


def test_nan_is_reported():
    logits = torch.zeros(2, 10)
    logits[1, 3] = torch.nan
    for temperature in (0, 1):
        requests = [sequence(4), sequence(9, temperature=temperature)]
        with pytest.raises(RuntimeError, match="request 9: its logits hold NaN or infinities"):
            Sampler(torch.device("cpu")).sample(logits, requests)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (dict(max_tokens=0), "max_tokens: 0; expected at least 1"),
        (dict(temperature=-0.1), "temperature: -0.1; expected"),
        (dict(temperature=float("nan")), "temperature: nan; expected"),
        (dict(temperature=float("inf")), "temperature: inf; expected"),
        (dict(top_k=-1), "top_k: -1; expected at least 0"),
        (dict(top_p=0.0), "top_p: 0.0; expected more than 0"),
        (dict(top_p=1.1), "top_p: 1.1; expected more than 0"),
        (dict(min_p=-0.1), "min_p: -0.1; expected 0 to 1"),
        (dict(min_p=float("nan")), "min_p: nan; expected 0 to 1"),
    ],
)
def test_errors(params, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**params)
