import pytest
import torch

from octavo.engine.params import SamplingParams
from octavo.engine.sampler import Sampler
from octavo.engine.sequence import Chunk, Sequence


def sequence(i, **params):
    return Sequence(i, [0], SamplingParams(**params))


def sample(sampler, logits, sequences):
    """The tokens that each of these draws next."""
    chunks = [Chunk(s, s.num_computed, s.remaining, True) for s in sequences]
    return [s.token_id for s in sampler.sample(logits, chunks, [s.generated for s in sequences])]


def test_greedy_takes_the_largest():
    logits = torch.randn(3, 50)
    greedy = [sequence(i, temperature=0) for i in range(3)]
    assert sample(Sampler(torch.device("cpu")), logits, greedy) == logits.argmax(-1).tolist()


def test_frequencies_follow_the_softmax():
    """Chi-squared against the exact probabilities; 99.9 % quantile of 5 degrees of freedom is 20.5."""
    logits, temperature, draws = torch.tensor([[0.5, 2.0, -1.0, 0.0, 1.5, -0.5]]), 0.8, 4000
    probs = (logits[0] / temperature).softmax(-1)
    sampler, s = Sampler(torch.device("cpu")), sequence(0, temperature=temperature, seed=3)
    counts = torch.zeros(6)
    for _ in range(draws):
        s.token_ids.append(sample(sampler, logits, [s])[0])
        counts[s.token_ids[-1]] += 1
    assert ((counts - draws * probs) ** 2 / (draws * probs)).sum() < 20.5


def test_a_seed_draws_the_same_in_any_batch():
    logits = torch.randn(4, 1000)
    alone = sample(Sampler(torch.device("cpu")), logits[2:3], [sequence(7, seed=5)])
    batch = [sequence(0, seed=1), sequence(1, temperature=0), sequence(2, seed=5), sequence(3)]
    assert sample(Sampler(torch.device("cpu")), logits, batch)[2] == alone[0]


def test_unseeded_requests_differ_and_state_is_forgotten():
    sampler = Sampler(torch.device("cpu"))
    logits, requests = torch.zeros(2, 100_000), [sequence(0), sequence(1)]
    a, b = sample(sampler, logits, requests)
    assert a != b
    sampler.forget(requests[0])
    sampler.forget(requests[0])
    assert list(sampler._seeds) == [1]


def test_filters_of_each_request():
    logits = torch.tensor([[3.0, 2.9, 2.8, 0.0]]).expand(4, -1).contiguous()
    filters = [dict(top_k=1), dict(top_p=0.3, temperature=50.0), dict(min_p=0.95), dict(temperature=0)]
    requests = [sequence(i, **f) for i, f in enumerate(filters)]
    for _ in range(20):
        tokens = sample(Sampler(torch.device("cpu")), logits, requests)
        assert tokens[0] == tokens[3] == 0 and tokens[1] in (0, 1) and tokens[2] == 0


def test_a_seed_of_any_size_will_do():
    logits = torch.randn(1, 1000)
    for seed in (-1, 2**63, 2**64 + 5, 10**30):
        first, second = (sample(Sampler(torch.device("cpu")), logits, [sequence(0, seed=seed)]) for _ in range(2))
        assert first == second


def test_nan_gives_no_token():
    logits = torch.zeros(2, 10)
    logits[1, 3] = torch.nan
    for temperature in (0, 1):
        requests = [sequence(4, temperature=0), sequence(9, temperature=temperature)]
        assert sample(Sampler(torch.device("cpu")), logits, requests) == [0, -1]


def test_log_probabilities_are_the_models_own():
    logits = torch.randn(2, 20)
    requests = [sequence(0, temperature=0, logprobs=3, logit_bias={5: 100.0}), sequence(1, temperature=0)]
    chunks = [Chunk(s, 0, 1, True) for s in requests]
    first, second = Sampler(torch.device("cpu")).sample(logits, chunks, [[], []])
    exact = logits[0].log_softmax(-1)
    assert first.token_id == 5 and first.logprob == pytest.approx(exact[5].item(), abs=1e-5)
    assert [token for token, _ in first.top] == exact.topk(3).indices.tolist()
    assert [p for _, p in first.top] == pytest.approx(exact.topk(3).values.tolist(), abs=1e-5)
    assert second.logprob is None and second.top is None


def test_penalties_see_prompt_and_output():
    logits = torch.tensor([[2.0, 1.9, 1.8, 1.0]]).expand(4, -1).contiguous()
    settings = [dict(repetition_penalty=2.0), dict(presence_penalty=0.15), dict(frequency_penalty=0.06), {}]
    requests = [sequence(i, temperature=0, **s) for i, s in enumerate(settings)]  # token 0 is the prompt
    for request in requests:
        request.token_ids += [1, 0, 0]
    # 2.0 and 1.9 halved; 1.85 and 1.75; 1.88 and 1.84; as they are.
    assert sample(Sampler(torch.device("cpu")), logits, requests) == [2, 0, 0, 0]
    for request in requests:
        request.token_ids += [0] * 3
    # The first twice as often does not matter to presence; frequency: 1.7 and 1.84.
    assert sample(Sampler(torch.device("cpu")), logits, requests) == [2, 0, 1, 0]


def test_stop_tokens_wait_for_min_tokens():
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    request = Sequence(0, [0], SamplingParams(temperature=0, min_tokens=2), stop_token_ids=frozenset({0, 1}))
    drawn = []
    for _ in range(3):
        drawn += sample(Sampler(torch.device("cpu")), logits, [request])
        request.token_ids.append(drawn[-1])
    assert drawn == [2, 2, 0]
