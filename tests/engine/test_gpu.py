"""The engine on the Triton kernels: the same model as on the CPU, in every dtype."""

import math

import pytest
import torch

import octavo
from octavo.bench.engine_bench import Bench, Setup, throughput
from octavo.bench.random_model import SCHEMES, random_checkpoint, random_decoder
from octavo.bench.workload import Lengths, Workload
from octavo.engine import LLM, SamplingParams

pytestmark = pytest.mark.gpu
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TEXT = (
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, "
    "and dedicated to the proposition that all men are created equal. "
) * 8


@pytest.fixture(scope="module")
def on_cpu():
    return LLM("smollm2", device="cpu")


def test_every_op_runs_on_triton():
    assert set(octavo.backends("cuda").values()) == {"triton"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_smollm2_says_the_same_with_the_same_perplexity(on_cpu, dtype):
    llm = LLM("smollm2", device="cuda", dtype=dtype, max_num_batched_tokens=100)
    params = SamplingParams(max_tokens=24, temperature=0)
    if dtype != torch.bfloat16:  # "The" leads "L'" by 0.08 at logits of 25, where bf16's spacing is 0.125
        assert llm.chat(QUESTION, params).text == on_cpu.chat(QUESTION, params).text
    ids = on_cpu.tokenizer.encode(TEXT)
    here, there = (math.exp(-sum(p) / len(p)) for p in (llm.prompt_logprobs(ids), on_cpu.prompt_logprobs(ids)))
    assert here == pytest.approx(there, rel=0.01)


def test_a_batch_of_mixed_prompts_finishes_and_frees_its_pages():
    llm = LLM("smollm2", device="cuda", max_num_batched_tokens=64, max_num_seqs=3, cache_tokens=4096)
    prompts = [list(range(5, 5 + n)) for n in (1, 200, 17, 64, 3)]
    done = llm.generate(prompts, SamplingParams(max_tokens=20, temperature=0.7, seed=1, ignore_eos=True))
    assert [len(c.token_ids) for c in done] == [20] * 5
    assert llm.blocks.num_free == llm.blocks.num_pages


@pytest.mark.parametrize("name", ["tiny", "tiny-mixture"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_random_weights_are_served_in_every_scheme(name, scheme):
    options = dict(max_model_len=128, cache_tokens=4096, max_num_seqs=8, max_num_batched_tokens=64)
    bench = Bench(Setup(random_weights=name, scheme=scheme, device="cuda", options=options))
    result = throughput(bench, Workload(Lengths(30, 10, "uniform", 0.5), 12), warmup=4)
    assert (result["completed"], result["failed"]) == (12, 0)
    assert result["peak_memory_bytes"] > result["weight_bytes"] + result["cache_bytes"]


@pytest.mark.parametrize("scheme", ["bf16", "int4"])
def test_random_weights_take_little_more_than_themselves_while_they_are_made(scheme):
    checkpoint = random_checkpoint("Llama-3.2-1B", scheme)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = random_decoder("Llama-3.2-1B", scheme, torch.device("cuda"), max_model_len=128)
    assert len(model.layers) == 16
    largest = 2 * checkpoint.config.vocab_size * checkpoint.config.hidden_size  # the embedding
    assert torch.cuda.max_memory_allocated() - before < checkpoint.num_bytes + largest
