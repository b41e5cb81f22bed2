"""What a request may ask for."""

import numpy as np
import pytest

from octavo.engine import SamplingParams


def test_defaults_change_nothing():
    params = SamplingParams()
    assert params.n == 1 and params.max_tokens == 16 and params.temperature == 1 and not params.has_penalties
    assert params.stop_strings == () and params.logit_bias is None


def test_values_are_kept_as_they_are_meant():
    params = SamplingParams(stop="a", stop_token_ids=[3], logit_bias={7: 1}, max_tokens=None, seed=-5)
    assert params.stop_strings == ("a",) and params.stop_token_ids == (3,) and params.logit_bias == {7: 1.0}
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
    assert SamplingParams(stop=None, stop_token_ids=None).stop_token_ids == ()
    assert type(SamplingParams(stop_token_ids=[np.int64(3)]).stop_token_ids[0]) is int
    assert SamplingParams(logit_bias={1: -float("inf")}).logit_bias == {1: -float("inf")}


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
        (dict(n=0), "n: 0; expected at least 1"),
        (dict(n=True), "n: True; expected an integer"),
        (dict(n=None), "n: None; expected an integer"),
        (dict(max_tokens=2.5), "max_tokens: 2.5; expected an integer"),
        (dict(min_tokens=-1), "min_tokens: -1; expected at least 0"),
        (dict(min_tokens=9, max_tokens=8), "min_tokens: 9; expected at most max_tokens, 8"),
        (dict(temperature="hot"), "temperature: 'hot'; expected a number"),
        (dict(top_k=1.5), "top_k: 1.5; expected an integer"),
        (dict(repetition_penalty=0), "repetition_penalty: 0; expected more than 0"),
        (dict(presence_penalty=2.1), "presence_penalty: 2.1; expected -2 to 2"),
        (dict(frequency_penalty=float("nan")), "frequency_penalty: nan; expected -2 to 2"),
        (dict(seed="x"), "seed: 'x'; expected an integer"),
        (dict(stop=["a", ""]), "stop: an empty string"),
        (dict(stop=[3]), "stop: 3; expected strings"),
        (dict(stop_token_ids=["a"]), "stop_token_ids: 'a'; expected an integer"),
        (dict(stop_token_ids=5), "stop_token_ids: 5; expected several integers"),
        (dict(logprobs=-1), "logprobs: -1; expected at least 0"),
        (dict(prompt_logprobs=-1), "prompt_logprobs: -1; expected at least 0"),
        (dict(logit_bias=[1, 2]), "logit_bias: .1, 2.; expected a mapping"),
        (dict(logit_bias={-1: 1.0}), "logit_bias: -1; expected at least 0"),
        (dict(logit_bias={1: float("nan")}), "logit_bias: nan for token 1; expected a finite number"),
        (dict(logit_bias={1: float("inf")}), "logit_bias: inf for token 1; expected a finite number"),
        (dict(warmth=1), "warmth"),
    ],
)
def test_errors(params, message):
    with pytest.raises((TypeError, ValueError), match=message):
        SamplingParams(**params)
