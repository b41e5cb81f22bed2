"""Padded steps of a tiny model through the kernels themselves, under the interpreter: padding spoils nothing."""

from stepping import Stepping, load
from tiny_models import save_tiny_llama

from octavo.kernels.registry import without_interpreter

PROMPTS = [[5, 6, 7], [9], list(range(1, 22))]


def test_padded_steps_are_those_of_the_reference(tmp_path):
    save_tiny_llama(tmp_path, num_hidden_layers=1)
    decoder = load(tmp_path)
    limits = dict(max_num_seqs=5, max_num_batched_tokens=24, page_size=16, num_pages=16)

    def work(padded):
        engine = Stepping(decoder, **limits, padded=padded)
        greedy = [engine.add(prompt, max_tokens=3) for prompt in PROMPTS]
        drawn = engine.add(PROMPTS[0], max_tokens=3, temperature=0.8, top_k=9, top_p=0.9, min_p=0.01, seed=4)
        edited = engine.add(PROMPTS[0], max_tokens=3, repetition_penalty=1.5, logit_bias={3: 2.0}, logprobs=2)
        engine.run()
        return [s.generated for s in (*greedy, drawn, edited)]

    with without_interpreter():
        expected = work(False)
    assert work(True) == expected
