"""Which sizes steps are padded to, and that a GPU's graphs do what launching does."""

import pytest
import torch
import transformers
from quantised_models import MIXTRAL, save_quantised
from stepping import Stepping, load
from tiny_models import save, save_tiny_llama, save_tiny_mixtral, tiny_llama

import octavo
from octavo.engine.graphs import Sizes, decode_sizes, modes, token_sizes
from octavo.engine.inputs import Shape
from octavo.engine.memory import activation_bytes, pages_that_fit
from octavo.engine.runner import NOT_CAPTURED, ModelRunner
from octavo.engine.sampler import Mode
from octavo.kernels import launch as launching


def test_sizes_of_decodes():
    assert decode_sizes(1) == [1]
    assert decode_sizes(3) == [1, 2, 3]
    assert decode_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert decode_sizes(300)[-4:] == [256, 272, 288, 300]


@pytest.mark.parametrize("most", [1, 9, 16, 40, 64, 2048, 3000, 16384])
def test_padding_of_tokens_is_little(most):
    sizes = token_sizes(most)
    assert sizes[-1] == most and sizes == sorted(set(sizes))
    for tokens in range(1, most + 1):
        size = min(s for s in sizes if s >= tokens)
        assert size - tokens < max(64, tokens / 8)
    waste = [1 - tokens / min(s for s in sizes if s >= tokens) for tokens in range(512, most + 1)]
    assert not waste or sum(waste) / len(waste) < 0.08


@pytest.mark.parametrize("limits", [(1, 1), (3, 9), (20, 16), (40, 100), (256, 2048)], ids=str)
def test_every_step_has_a_shape_that_is_captured(limits):
    max_num_seqs, most = limits
    sizes = Sizes(max_num_seqs, most)
    every = sizes.every()
    assert every[0].tokens == most and len(every) == len(set(every))
    assert [s.tokens for s in every] == sorted((s.tokens for s in every), reverse=True)
    for tokens in range(1, most + 1):
        for sequences in {1, 2, min(tokens, max_num_seqs), min(17, tokens, max_num_seqs)}:
            if sequences > tokens or sequences > max_num_seqs:
                continue
            shape = sizes.shape(tokens, sequences, False)
            assert shape in every and shape.tokens >= tokens and shape.sequences >= sequences
            if sequences == tokens:
                shape = sizes.shape(tokens, sequences, True)
                assert shape in every and shape.sequences == shape.tokens >= sequences
    assert modes(Shape(4, 4, True)) == (Mode.GREEDY, Mode.DRAWN) and modes(Shape(64, 4, False)) == (Mode.DRAWN,)


CONFIG = dict(
    vocab_size=300,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.1,
    eos_token_id=None,
)
PROMPTS = [list(range(5, 5 + n)) for n in (1, 200, 17, 64, 3, 90)]
LIMITS = dict(max_num_seqs=5, max_num_batched_tokens=96, max_model_len=400, page_size=16, num_pages=40)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save(tiny_llama(**CONFIG), folder, torch.bfloat16)
    return load(folder, "cuda", torch.bfloat16, 512)


@pytest.fixture(scope="module")
def warm(decoder):
    engine = Stepping(decoder, **LIMITS)
    seen = []
    engine.runner.warmup(lambda done, total: seen.append((done, total)))
    assert seen[-1] == (engine.runner.num_graphs,) * 2 and engine.runner.memory["graphs"] >= 0
    return engine


def work(engine):
    """Greedy, drawn and edited requests of all lengths."""
    wanted = [
        dict(),
        dict(temperature=0.9, top_k=20, seed=5),
        dict(temperature=1.2, top_p=0.9, min_p=0.01, seed=6),
        dict(repetition_penalty=1.3, frequency_penalty=0.5),
        dict(logprobs=3, prompt_logprobs=1),
        dict(logit_bias={7: 3.0}, min_tokens=4, stop_token_ids=(8, 9)),
    ]
    sequences = [engine.add(p, **w, max_tokens=12) for w in wanted[:3] for p in PROMPTS]
    sequences += [engine.add(p, **w, max_tokens=12) for w in wanted[3:] for p in PROMPTS]
    engine.run()
    return [s.generated for s in sequences], [engine.results[s.id] for s in sequences]


@pytest.mark.gpu
def test_graphs_do_what_launching_does(decoder, warm):
    tokens, results = work(warm)
    launched = Stepping(decoder, **LIMITS, enforce_eager=True)
    assert launched.runner.graphs is None and launched.runner.num_graphs == 0
    expected, expected_results = work(launched)
    assert tokens == expected and results == expected_results
    assert min(token for of in tokens for token in of) >= 0  # what was not written in the cache is NaN


@pytest.mark.gpu
def test_nothing_is_compiled_or_captured_after_the_warm_up(warm):
    work(warm)  # graphs of steps that are sampled behind them are captured when they are first met
    compiled, ready, graphs = octavo.compile_count(), len(launching._ready), warm.runner.num_graphs
    work(warm)
    assert (octavo.compile_count(), len(launching._ready), warm.runner.num_graphs) == (compiled, ready, graphs)


@pytest.mark.gpu
def test_the_warm_up_compiles_all(decoder):
    engine = Stepping(decoder, **LIMITS)
    engine.runner.warmup()
    compiled, ready = octavo.compile_count(), len(launching._ready)
    work(engine)
    assert (octavo.compile_count(), len(launching._ready)) == (compiled, ready)


@pytest.mark.gpu
def test_starting_a_step_waits_for_nothing(warm):
    work(warm)
    warm.scheduler.blocks.forget_since(0)
    for prompt, temperature in zip(PROMPTS, (0, 1) * 3, strict=True):
        warm.add(prompt, temperature=temperature)
    pending = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):  # prompts, and then some that go on with what they sampled
            step = warm.scheduler.schedule()
            pending.append((step, warm.runner.start(step)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for step, started in pending:
        sampling = [chunk for chunk in step.chunks if chunk.samples]
        for chunk, sampled in zip(sampling, started.wait(), strict=True):
            warm.scheduler.update(chunk, sampled.token_id)
    for sequence in list(warm.scheduler.running) + list(warm.scheduler.waiting):
        warm.scheduler.finish(sequence, "abort")


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e5m2], ids=str)
def test_graphs_over_quantised_caches(decoder, cache_dtype):
    engines = [Stepping(decoder, **LIMITS, cache_dtype=cache_dtype, enforce_eager=eager) for eager in (False, True)]
    assert engines[0].generate(PROMPTS) == engines[1].generate(PROMPTS)
    assert engines[0].runner.num_graphs


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dense", "gptq", "gptq asymmetric"])
def test_mixtures(tmp_path, name):
    """Routing inside of graphs; experts without an op are launched, and the runner says so."""
    config = dict(CONFIG) | dict(num_local_experts=5, num_experts_per_tok=2)
    if name == "dense":
        save_tiny_mixtral(tmp_path, torch.bfloat16, **config)
    else:
        save_quantised(
            tmp_path, name, config=MIXTRAL if name == "gptq asymmetric" else transformers.MixtralConfig(**config)
        )
    decoder = load(tmp_path, "cuda", torch.float16, 128)
    limits = LIMITS | dict(max_model_len=128)
    prompts = [[t % decoder.config.vocab_size for t in p[:100]] for p in PROMPTS]
    engines = [Stepping(decoder, **limits, enforce_eager=eager) for eager in (False, True)]
    assert engines[0].generate(prompts) == engines[1].generate(prompts)
    alone = name == "gptq asymmetric"
    assert engines[0].runner.notes == ((NOT_CAPTURED,) if alone else ())
    assert bool(engines[0].runner.num_graphs) != alone


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [64, 4096])
def test_what_the_largest_step_takes(decoder, tokens):
    limits = LIMITS | dict(max_num_batched_tokens=tokens, num_pages=1)
    runner = ModelRunner(decoder, **limits, enforce_eager=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with runner._on_stream():
        runner._prepare(runner.sizes.every()[0])
        runner._compute(runner.sizes.every()[0], Mode.DRAWN)
        torch.cuda.synchronize()
    measured = torch.cuda.max_memory_allocated() - before
    assert 0 < measured < activation_bytes(decoder.config, torch.bfloat16, tokens, 5) < measured + 2**27


def test_pages_that_fit(tmp_path):
    save_tiny_llama(tmp_path)
    model = load(tmp_path)
    page = 2 * 2 * 4 * 2 * 16 * 4  # K and V, layers, tokens, heads, head size, bytes
    assert pages_that_fit(model, 4, None, 0.9, 64, 6) == 2**30 // page
    assert pages_that_fit(model, 4, torch.float8_e5m2, 0.9, 64, 6) == 2**30 // (page // 4)
    assert pages_that_fit(model, 4, torch.int8, 0.9, 64, 6) == 2**30 // (page // 4 + 2 * 2 * 4 * 2 * 4)
    small, large = (activation_bytes(model.config, torch.float32, tokens, 6) for tokens in (1, 1000))
    assert 0 < small < large
