import inspect
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import octavo
from octavo import reference
from octavo.kernels.launch import INTERPRET
from octavo.kernels.sampling import choose, draw, threshold
from octavo.kernels.sampling import sample as sampling
from octavo.testing import check_op

FEATURES = ("temperature", "top_k", "top_p", "min_p", "penalties", "bias", "mask")
COMBINATIONS = [c for n in range(len(FEATURES) + 1) for c in itertools.combinations(FEATURES, n)]
ARGUMENTS = list(inspect.signature(octavo.sample).parameters)[1:-1]
VOCAB = 40


def use_tiles(patch, *tiles):
    """Other tiles than those that ship; which tokens are a tile's decides what is drawn, so the reference's too."""
    patch.setattr(sampling, "choose_tiles", lambda vocab, edited: sampling._Tiles(*tiles))
    patch.setattr(reference.sampling, "tile_of", lambda vocab: tiles[0])


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 8 tokens, two at once, and 16 candidates, so that 40 tokens take every path."""
    use_tiles(monkeypatch, 8, 2, 2, 2, 16, 8, 4, 4)


@pytest.fixture
def large_tiles(monkeypatch):
    """Tiles of 16 tokens, all of them at once: what takes many rows goes the short way, as most rows do."""
    use_tiles(monkeypatch, 16, 4, 4, 4, 64, 64, 4, 4)


def words(allowed):
    """Booleans `[rows, vocab]` as bitmasks."""
    padded = np.pad(allowed.numpy(), ((0, 0), (0, -allowed.shape[1] % 32)))
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32).copy())


def settings(features, rows, vocab=VOCAB, seed=0):
    """Settings that change the distribution, the same in every row; seeds differ."""
    g = torch.Generator().manual_seed(seed)

    def all_rows(value, dtype=torch.float32):
        return torch.full((rows,), value, dtype=dtype)

    def each_row(x):
        return x.expand(rows, -1).contiguous()

    found = dict(seeds=torch.arange(rows) * 7919 + seed, positions=torch.arange(rows) % 5)
    if "temperature" in features:
        found |= dict(temperature=all_rows(1.7))
    if "top_k" in features:
        found |= dict(top_k=all_rows(12, torch.int32))
    if "top_p" in features:
        found |= dict(top_p=all_rows(0.85))
    if "min_p" in features:
        found |= dict(min_p=all_rows(0.04))
    if "penalties" in features:
        counts = torch.randint(0, 4, (1, vocab), generator=g, dtype=torch.int32) - 2
        found |= dict(
            repetition_penalty=all_rows(1.3),
            presence_penalty=all_rows(0.4),
            frequency_penalty=all_rows(0.2),
            output_counts=each_row(counts.clamp(min=0)),
            prompt_mask=each_row(words(torch.rand(1, vocab, generator=g) < 0.3)),
        )
    if "bias" in features:
        found |= dict(
            bias_ids=each_row(torch.tensor([[3, -1, vocab - 1, 5, 3, vocab]])),
            bias_values=each_row(torch.tensor([[1.5, 9.0, 2.0, -30.0, 0.5, 9.0]])),
        )
    if "mask" in features:
        found |= dict(allowed_mask=each_row(words(torch.rand(1, vocab, generator=g) < 0.7)))
    return found


def on(device, given):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}


def by_reference(logits, processed_logprobs=False, **given):
    cpu = on("cpu", given)
    return reference.sampling.sample(logits.cpu(), *(cpu.get(name) for name in ARGUMENTS), processed_logprobs)


def edited(row, given, i=0):
    """A row's logits after bias, penalties and mask, in float64: a loop over tokens."""
    x = row.double().numpy().copy()
    for token, value in (
        zip(*(given[k][i].tolist() for k in ("bias_ids", "bias_values")), strict=True) if ("bias_ids" in given) else ()
    ):
        if 0 <= token < len(x):
            x[token] += value
    for v in range(len(x)):
        if "output_counts" in given:
            count, r = int(given["output_counts"][i, v]), float(given["repetition_penalty"][i])
            if count or given["prompt_mask"][i, v // 32] >> v % 32 & 1:
                x[v] = x[v] / r if x[v] > 0 else x[v] * r
            x[v] -= count * float(given["frequency_penalty"][i]) + (count > 0) * float(given["presence_penalty"][i])
        if "allowed_mask" in given and not given["allowed_mask"][i, v // 32] >> v % 32 & 1:
            x[v] = -np.inf
    return x


def probabilities(row, given, i=0):
    """The exact distribution of one row, in float64, by the definitions."""

    def softmax(x):
        e = np.exp(x - x.max())
        return e / e.sum()

    x = edited(row, given, i) / (float(given["temperature"][i]) if "temperature" in given else 1.0)
    if "min_p" in given:
        p = softmax(x)
        x = np.where(p >= min(float(given["min_p"][i]), 1.0) * p.max(), x, -np.inf)
    if "top_k" in given and 0 < (k := int(given["top_k"][i])) < len(x):
        x = np.where(x >= np.sort(x)[-k], x, -np.inf)
    if "top_p" in given and (top_p := float(given["top_p"][i])) < 1:
        p = softmax(x)
        before = np.array([p[x > value].sum() for value in x])
        x = np.where((before < top_p) | (x == x.max()), x, -np.inf)
    return softmax(x)


def chance(tokens, probs):
    """The probability of a chi-squared statistic at least as large as that of these draws."""
    counts = np.bincount(tokens.cpu().numpy(), minlength=len(probs))
    assert not counts[probs == 0].any(), "drew what the filters leave out"
    # Tokens of which few are expected are taken together, neighbours in probability, until five or more are.
    order = np.argsort(probs)
    expected, counted = [0.0], [0]
    for e, c in zip((probs * len(tokens))[order].tolist(), counts[order].tolist(), strict=True):
        if expected[-1] >= 5:
            expected.append(0.0)
            counted.append(0)
        expected[-1] += e
        counted[-1] += c
    if expected[-1] < 5 and len(expected) > 1:
        last, last_count = expected.pop(), counted.pop()
        expected[-1] += last
        counted[-1] += last_count
    if len(expected) == 1:
        return 1.0
    statistic = sum((c - e) ** 2 / e for e, c in zip(expected, counted, strict=True))
    half = torch.tensor([(len(expected) - 1) / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()


LIMIT = 1e-4  # seeds are fixed, so a test that passes once passes always


def logits_of(vocab=VOCAB, seed=1, scale=1.5, rows=1):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("features", COMBINATIONS, ids=lambda c: "+".join(c) or "none")
def test_reference_draws_from_the_exact_distribution(features, small_tiles):
    """Every combination of filters; the kernels draw the same tokens as the reference, which other tests hold."""
    rows = 2000
    logits, given = logits_of(), settings(features, rows)
    tokens = by_reference(logits.expand(rows, -1), **given)[0]
    assert chance(tokens, probabilities(logits[0], given)) > LIMIT


@pytest.mark.parametrize("features", [(), ("temperature", "top_k", "top_p", "min_p")], ids=["none", "filters"])
def test_draws_from_the_exact_distribution(device, large_tiles, features):
    rows = 100
    logits, given = logits_of(), settings(features, rows)
    tokens = octavo.sample(logits.expand(rows, -1).contiguous().to(device), **on(device, given))
    assert chance(tokens, probabilities(logits[0], given)) > LIMIT


OFF = dict(
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    bias_ids=-1,
    allowed_mask=-1,
)


def every_combination():
    """One row a combination of filters, in one batch: what is off for a row has the value that says so."""
    rows = len(COMBINATIONS)
    given = settings(FEATURES, rows)
    features_of = dict(bias_ids="bias", allowed_mask="mask")
    for name, off in OFF.items():
        feature = features_of.get(name, "penalties" if "penalty" in name else name)
        for i, combination in enumerate(COMBINATIONS):
            if feature not in combination:
                given[name][i] = off
    return logits_of(rows=rows), given


def test_every_combination_in_one_batch(device, large_tiles):
    logits, given = every_combination()
    tokens = octavo.sample(logits.to(device), **on(device, given)).cpu()
    assert torch.equal(tokens, by_reference(logits, **given)[0])
    for i, (row, token) in enumerate(zip(logits, tokens.tolist(), strict=True)):
        assert probabilities(row, given, i)[token] > 0


@pytest.mark.parametrize("feature", [(), *((f,) for f in FEATURES)], ids=lambda f: "".join(f) or "none")
def test_one_filter_without_the_others(device, dtype, small_tiles, feature):
    rows = 4
    logits, given = logits_of(rows=rows).to(dtype), settings(feature, rows, seed=3)
    tokens = octavo.sample(logits.to(device), **on(device, given)).cpu()
    assert torch.equal(tokens, by_reference(logits, **given)[0])


@pytest.mark.parametrize("processed", [False, True], ids=["raw", "processed"])
@pytest.mark.parametrize("greedy", [False, True], ids=["drawn", "greedy"])
def test_logprobs(device, small_tiles, processed, greedy):
    rows, n = 3, 9
    logits, given = logits_of(rows=rows), settings(FEATURES, rows)
    logits[0, 7] = logits[0, 30] = logits[0, 31] = 4.0  # ties come in the order of their ids
    if greedy:
        given["temperature"] = torch.zeros(rows)
    out = octavo.sample(logits.to(device), **on(device, given), num_logprobs=n, processed_logprobs=processed)
    tokens, chosen, ids, values = (x.cpu() for x in out)
    assert ids.shape == values.shape == (rows, n) and ids.dtype == torch.int64 and values.dtype == torch.float32
    for i in range(rows):
        if not processed:
            exact, order = logits[i].double().log_softmax(-1), logits[i].double()
        else:
            order = torch.from_numpy(edited(logits[i], given, i))
            kept = torch.from_numpy(probabilities(logits[i], given, i)).log()
            exact = order.log_softmax(-1) if greedy else kept
        expected = torch.sort(order, descending=True, stable=True).indices[:n]
        assert ids[i].tolist() == expected.tolist()
        torch.testing.assert_close(values[i].double(), exact[expected], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(chosen[i].double(), exact[tokens[i]], rtol=1e-5, atol=1e-5)
    again = octavo.sample(logits.to(device), **on(device, given), num_logprobs=0)
    assert torch.equal(again[0].cpu(), tokens) and again[2].shape == again[3].shape == (rows, 0)


def test_more_logprobs_than_tokens_with_a_logit(device, small_tiles):
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, [4, 20]] = torch.tensor([0.0, 1.0])
    for result in (octavo.sample(logits.to(device), num_logprobs=4), by_reference(logits, num_logprobs=4)):
        tokens, chosen, ids, values = (x.cpu() for x in result)
        assert tokens.tolist() == [20] and ids.tolist() == [[20, 4, -1, -1]]
        expected = torch.tensor([0.0, 1.0]).log_softmax(0).flip(0)
        torch.testing.assert_close(values, torch.cat([expected, torch.full((2,), -torch.inf)])[None])
        torch.testing.assert_close(chosen, expected[:1])


def test_a_request_draws_the_same_in_any_batch(device, small_tiles):
    logits, given = every_combination()
    rows = [5, 77, 127, 20]  # in another order, among others, alone
    logits, given = logits[rows], {k: v[rows] for k, v in given.items()}
    together = octavo.sample(logits.to(device), **on(device, given), num_logprobs=3)
    for order in ([3, 1, 0, 2], [2], [1, 1]):
        other = {k: v[order] for k, v in given.items()}
        for a, b in zip(
            octavo.sample(logits[order].to(device), **on(device, other), num_logprobs=3), together, strict=True
        ):
            assert torch.equal(a, b[order])


def test_seed_and_position_decide(device, small_tiles):
    logits = torch.zeros(6, VOCAB)
    seeds = torch.tensor([1, 1, 1 + 2**32, -1, 2**63 - 1, 1])
    positions = torch.tensor([0, 2**32, 0, 0, 0, 0])
    given = dict(seeds=seeds, positions=positions)
    tokens = octavo.sample(logits.to(device), **on(device, given)).cpu()
    assert torch.equal(tokens, by_reference(logits, **given)[0])
    assert tokens[0] == tokens[5] and len(set(tokens.tolist())) > 2


def test_philox_of_the_reference():
    """The known answers of Random123's kat_vectors for philox4x32-10, with counter and key as in `philox`."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert reference.sampling.philox(zero, zero, 0, 4)[0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_noise_is_gumbel():
    """Mean, variance and the tail of a million numbers; the largest come from the smallest E."""
    noise = reference.sampling.gumbel(torch.arange(10), torch.arange(10), 0, 100_000).double()
    assert abs(noise.mean() - 0.5772157) < 0.005 and abs(noise.var() - torch.pi**2 / 6) < 0.02
    tail = 1 - np.exp(-np.exp(-8.0))
    assert abs((noise > 8).double().mean() / tail - 1) < 0.2
    assert noise.isfinite().all()


@given(
    vocab=st.integers(1, 90),
    k=st.integers(-1, 95),
    p=st.sampled_from([-1.0, 0.0, 0.3, 0.9, 0.999, 1.0, 2.0]),
    min_p=st.sampled_from([0.0, 0.001, 0.3, 1.0, 2.0]),
    temperature=st.sampled_from([0.0, 1e-6, 1e-4, 0.3, 1.0, 50.0]),
    levels=st.sampled_from([1, 3, 1000]),
    gap=st.integers(0, 3),
)
def test_kept_tokens(vocab, k, p, min_p, temperature, levels, gap):
    """Vocabularies smaller than k, ties, odd strides: what is drawn is kept by the definitions, and the reference's."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with pytest.MonkeyPatch.context() as patch:
        use_tiles(patch, 8, 2, 2, 2, 16, 4, 4, 4)
        logits = (torch.randn(2, vocab + gap)[:, :vocab] * levels / 2).round() / levels * 4
        given = dict(
            seeds=torch.tensor([vocab, k]),
            positions=torch.tensor([0, 1]),
            top_k=torch.full((2,), k, dtype=torch.int32),
            top_p=torch.full((2,), p),
            min_p=torch.full((2,), min_p),
            temperature=torch.full((2,), temperature),
        )
        tokens = octavo.sample(logits.to(device), **on(device, given)).cpu()
        assert torch.equal(tokens, by_reference(logits, **given)[0])
    if temperature < 1e-5:
        assert torch.equal(tokens, logits.argmax(-1))
    elif p not in (0.3, 0.9, 0.999):  # at rounding, either side is right
        for i in range(2):
            assert probabilities(logits[i], given, i)[tokens[i]] > 0


@pytest.mark.parametrize("device_of", ["kernel", "reference"])
def test_ties_are_kept_together(device, small_tiles, device_of):
    """All that are tied with the last of the top k, or stand at top-p's end, take part."""
    rows = 24
    logits = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0]).expand(rows, -1).contiguous()
    seeds = dict(seeds=torch.arange(rows), positions=torch.zeros(rows, dtype=torch.int64))
    hot = torch.full((rows,), 9.0)  # so that all of them come up
    probs = (logits[0] / 9).softmax(-1)
    top_k = dict(top_k=torch.full((rows,), 2, dtype=torch.int32))
    top_p = dict(top_p=torch.full((rows,), float(probs[0] + probs[1] / 2)))
    for filters in (top_k, top_p, {**top_k, "min_p": torch.full((rows,), 0.01)}):
        given = dict(**seeds, **filters, temperature=hot)
        if device_of == "reference":
            tokens = by_reference(logits, **given)[0]
        else:
            tokens = octavo.sample(logits.to(device), **on(device, given))
        assert set(tokens.tolist()) == {0, 1, 2, 3}


def long_rows():
    """Rows whose filters leave more than there is room for, by name: logits, k, p, min-p."""
    vocab, tile, sample = 3000, 16, 64
    g = torch.Generator().manual_seed(5)

    def flat(scale=1.0):
        return torch.randn(vocab, generator=g) * scale

    tiles = -(-vocab // tile)
    seen = torch.zeros(tiles, dtype=torch.bool)
    seen[torch.arange(sample) * tiles // sample] = True
    seen = seen.repeat_interleave(tile)[:vocab]
    peaked = flat()
    peaked[torch.arange(0, vocab, 400)] += 12
    return {
        "top-p": (flat(), 0, 0.9, 0.0),
        "low top-p": (flat(), 0, 0.3, 0.0),
        "steep": (flat(3.0), 0, 0.9, 0.0),
        "all but the tail": (flat(), 0, 0.9999, 0.0),
        "the top alone": (flat(), 0, 1e-6, 0.0),
        "beyond the peaks": (peaked, 0, 0.9997, 0.0),
        "large k": (flat(), 1000, 1.0, 0.0),
        "large k, gathered at once": (flat(), 100, 1.0, 0.0),
        "k, then p": (flat(), 100, 0.5, 0.0),
        "large k, then p above what was gathered": (flat(), 1500, 0.3, 0.0),
        "large k, then p among what was gathered": (flat(), 1000, 0.99, 0.0),
        "min-p, then p": (flat(), 0, 0.8, 0.01),
        "all three": (flat(), 2000, 0.8, 0.003),
        "k of which min-p leaves fewer": (flat(), 2500, 0.8, 0.05),
        "min-p": (flat(), 0, 1.0, 0.01),
        "ties": (flat().mul(2).round(), 0, 0.7, 0.0),
        "ties at k": (flat().mul(2).round(), 700, 0.9, 0.0),
        "all tied": (torch.full((vocab,), -3.0), 5, 0.5, 0.0),
        "nearly constant": (flat(1e-6), 0, 0.5, 0.0),
        "masked": (flat().masked_fill(torch.arange(vocab) % 7 > 1, -torch.inf), 0, 0.9, 0.0),
        "large where the sample does not look": (torch.where(seen, 0, 4) + flat(), 0, 0.6, 0.0),
        "large where it looks": (torch.where(seen, 4, 0) + flat(), 0, 0.9, 0.0),
        "k by chance": (torch.where(seen, -9, 0) + flat(0.1), 1500, 0.9, 0.0),
    }


def test_rows_with_more_than_there_is_room_for(device, monkeypatch):
    use_tiles(monkeypatch, 16, 256, 8, 16, 256, 64, 4, 4)
    divided, calls = threshold.divided, []
    if INTERPRET:
        monkeypatch.setattr(threshold, "divided", lambda *args: calls.append(args) or divided(*args))
    rows = list(long_rows().values())
    logits = torch.stack([row[0] for row in rows])
    given = dict(
        seeds=torch.arange(len(rows)),
        positions=torch.arange(len(rows)),
        top_k=torch.tensor([row[1] for row in rows], dtype=torch.int32),
        top_p=torch.tensor([row[2] for row in rows]),
        min_p=torch.tensor([row[3] for row in rows]),
    )
    tokens, logprobs, *_ = octavo.sample(
        logits.to(device), **on(device, given), num_logprobs=0, processed_logprobs=True
    )
    expected, expected_logprobs, *_ = by_reference(logits, **given, num_logprobs=0, processed_logprobs=True)
    wrong = [name for name, a, b in zip(long_rows(), tokens.cpu(), expected, strict=True) if a != b]
    assert not wrong
    # These rest on the mass of what was kept, so they tell whether the threshold is the right one.
    torch.testing.assert_close(logprobs.cpu(), expected_logprobs, rtol=1e-5, atol=1e-5)
    assert calls or not INTERPRET, "no bracket missed"


def measured_rows():
    """Rows with top-p alone, by name: logits, p. Of flat ones a small p rejects most of what is drawn."""
    found = {name: (logits, p) for name, (logits, k, p, min_p) in long_rows().items() if k == 0 and min_p == 0.0}
    flat = torch.randn(3000, generator=torch.Generator().manual_seed(6))
    steps = flat.round()
    by_size = torch.sort(flat, descending=True).values
    return found | {
        "little more than the share": (flat, 0.1201),
        "half": (flat, 0.5),
        "just under all": (flat, 1 - 2**-24),
        "steps, few kept": (steps, 0.2),
        "steps, the end within one": (steps, 0.6),
        "steps, all but the last": (steps, 0.9999),
        "largest first": (by_size, 0.9),
        "largest last": (by_size.flip(0), 0.9),
        "two values": (torch.where(flat > 1.0, 1.0, 0.0), 0.35),
        "too little to measure": (flat, 0.1),
    }


def test_top_p_alone_without_its_threshold(device, monkeypatch):
    """The tokens of the reference, by passes that end early, in the end or not at all, or that are too few."""
    use_tiles(monkeypatch, 16, 256, 8, 16, 256, 64, 4, 4)
    passes, searched = [], []
    masses_up_to, find_threshold = draw.masses_up_to, choose.find_threshold

    def measure(*args):
        result = masses_up_to(*args)
        row, up_to_x, enough = (value.handle.data.item() for value in (args[7], result[0], args[5]))
        passes.append((row, up_to_x > enough))
        return result

    if INTERPRET:
        monkeypatch.setattr(draw, "masses_up_to", measure)
        monkeypatch.setattr(choose, "find_threshold", lambda *args: searched.append(args) or find_threshold(*args))
    rows = [row for row in measured_rows().values() for _ in range(4)]
    names = [f"{name}, {i}" for name in measured_rows() for i in range(4)]
    logits = torch.stack([row[0] for row in rows])
    given = dict(
        seeds=torch.arange(len(rows)) * 31,
        positions=torch.arange(len(rows)),
        top_p=torch.tensor([row[1] for row in rows]),
        temperature=torch.ones(len(rows)),
    )
    given["temperature"][5] = 0.0  # greedy
    tokens = octavo.sample(logits.to(device), **on(device, given)).cpu()
    expected = by_reference(logits, **given)[0]
    assert [name for name, a, b in zip(names, tokens, expected, strict=True) if a != b] == []
    if INTERPRET:
        assert len(searched) == sum(p < reference.sampling.SHARE for _, p in rows)
        count = np.bincount([row for row, _ in passes], minlength=len(rows))
        assert {0, 1, 2} <= set(count.tolist()) and {True, False} == {kept for _, kept in passes}


def test_top_p_alone_draws_from_the_exact_distribution(device, small_tiles):
    """With ties at its end, and so small a p that the three tokens of a pass are often left out."""
    rows = 300
    logits = (logits_of(scale=1.0) * 2).round() / 2
    given = settings(("temperature",), rows) | dict(top_p=torch.full((rows,), 0.3))
    tokens = octavo.sample(logits.expand(rows, -1).contiguous().to(device), **on(device, given)).cpu()
    assert torch.equal(tokens, by_reference(logits.expand(rows, -1), **given)[0])
    assert chance(tokens, probabilities(logits[0], given)) > LIMIT


def test_a_filter_that_keeps_all_changes_no_draw(device, monkeypatch):
    use_tiles(monkeypatch, 16, 32, 4, 4, 64, 64, 4, 4)
    vocab, rows = 512, 4
    logits = torch.zeros(rows, vocab)
    given = dict(seeds=torch.arange(rows) * 2**33 - 5, positions=torch.arange(rows) * 2**31)
    drawn = octavo.sample(logits.to(device), **on(device, given)).cpu()
    filtered = octavo.sample(logits.to(device), **on(device, given | dict(min_p=torch.full((rows,), 0.5)))).cpu()
    assert torch.equal(drawn, filtered) and torch.equal(drawn, by_reference(logits, **given)[0])


@pytest.mark.parametrize("way", ["draw_by_tiles_apart", "draw_from_candidates", "draw_from_tiles"])
def test_each_way_to_draw(device, small_tiles, monkeypatch, way):
    """Kept are the 4 largest, which hold much or little of the mass, and are gathered or too many in one column."""
    rows, taken = 30, set()
    kept = torch.arange(4) if way == "draw_from_candidates" else torch.arange(0, 32, 8)
    logits = torch.zeros(VOCAB).index_fill(0, kept, 1.0)
    given = dict(
        seeds=torch.arange(rows),
        positions=torch.arange(rows),
        top_k=torch.full((rows,), 4, dtype=torch.int32),
        temperature=torch.full((rows,), 0.3 if way == "draw_by_tiles_apart" else 9.0),
    )
    for name in ("draw_by_tiles_apart", "draw_from_candidates", "draw_from_tiles"):
        draw = getattr(choose, name)
        if INTERPRET:
            monkeypatch.setattr(choose, name, lambda *args, name=name, draw=draw: taken.add(name) or draw(*args))
    tokens = octavo.sample(logits.expand(rows, -1).contiguous().to(device), **on(device, given)).cpu()
    assert torch.equal(tokens, by_reference(logits.expand(rows, -1), **given)[0])
    assert chance(tokens, probabilities(logits, given)) > LIMIT
    assert taken == {way} or not INTERPRET


def test_more_ties_than_candidates(device, small_tiles):
    logits = torch.zeros(3, VOCAB)
    logits[:, 5] = torch.tensor([0.0, 1.0, -1.0])
    given = dict(
        seeds=torch.arange(3),
        positions=torch.arange(3),
        top_k=torch.tensor([1, 2, 39], dtype=torch.int32),
        top_p=torch.tensor([0.5, 0.5, 0.9]),
    )
    tokens = octavo.sample(logits.to(device), **on(device, given)).cpu()
    assert torch.equal(tokens, by_reference(logits, **given)[0])


def test_zeros_of_either_sign_are_tied(device, small_tiles):
    logits = torch.tensor([[-0.0, 0.0, -1.0, -0.0, 0.0, -2.0]]).repeat(2, 7)
    given = dict(
        seeds=torch.arange(2),
        positions=torch.arange(2),
        top_k=torch.tensor([0, 1], dtype=torch.int32),
        top_p=torch.tensor([-1.0, 1.0]),
    )
    for sign in (1, -1):
        row = torch.where(logits == 0, sign * logits, logits)
        tokens = octavo.sample(row.to(device), **on(device, given)).cpu()
        assert torch.equal(tokens, by_reference(row, **given)[0]) and (row.gather(1, tokens[:, None]) == 0).all()


def test_greedy_takes_the_first_of_the_largest(device, dtype, small_tiles):
    logits = torch.randn(3, VOCAB).to(dtype)
    logits[1, 9] = logits[1, 33] = 50.0
    expected = [int(logits[0].argmax()), 9, int(logits[2].argmax())]
    assert octavo.sample(logits.to(device)).tolist() == expected == by_reference(logits)[0].tolist()


def test_rows_without_a_distribution_are_reported(device, small_tiles):
    """NaN, +inf, nothing allowed, all -inf, a negative or NaN temperature: -1 in that row, the others as before."""
    rows = 9
    logits, given = logits_of(rows=rows), settings(FEATURES, rows)
    before = by_reference(logits, **given)[0]
    logits[0, 3] = torch.nan
    logits[1, VOCAB - 1] = torch.inf
    given["allowed_mask"][1] = -1
    given["allowed_mask"][2] = 0
    logits[3] = -torch.inf
    given["temperature"][4] = -0.5
    given["temperature"][5] = torch.nan
    given["allowed_mask"][6] = ~(1 << 3)
    logits[6, 3] = torch.nan  # not allowed, and reported all the same
    given["temperature"][7] = 0.0
    logits[7, 11] = torch.nan
    for result in (
        octavo.sample(logits.to(device), **on(device, given), num_logprobs=2),
        by_reference(logits, **given, num_logprobs=2),
    ):
        tokens, chosen, ids, values = (x.cpu() for x in result)
        assert tokens[:8].tolist() == [-1] * 8 and tokens[8] == before[8]
        assert (ids[:8] == -1).all() and (ids[8] >= 0).all()
        assert chosen[:8].isnan().all() and values[:8].isnan().all()
        assert chosen[8].isfinite() and values[8].isfinite().all()


def test_no_rows(device):
    logits = torch.empty(0, 100, device=device)
    assert octavo.sample(logits).shape == (0,)
    none = torch.empty(0, dtype=torch.int64, device=device)
    out = octavo.sample(logits, seeds=none, positions=none, top_p=torch.empty(0, device=device), num_logprobs=3)
    assert [tuple(x.shape) for x in out] == [(0,), (0,), (0, 3), (0, 3)]
    assert [tuple(x.shape) for x in by_reference(logits, seeds=none, positions=none, num_logprobs=3)] == [
        (0,),
        (0,),
        (0, 3),
        (0, 3),
    ]


def test_strides_and_other_dtypes(device, small_tiles):
    rows = 3
    logits, given = logits_of(rows=rows), settings(FEATURES, rows)
    expected = octavo.sample(logits.to(device), **on(device, given))
    wide = {k: torch.cat([v, v], -1)[..., : v.shape[-1]] if v.dim() == 2 else v for k, v in on(device, given).items()}
    wide |= dict(output_counts=wide["output_counts"].to(torch.int16), bias_ids=wide["bias_ids"].to(torch.int32))
    twice = torch.cat([logits, logits], 1).to(device)[:, :VOCAB]
    assert torch.equal(octavo.sample(twice, **wide), expected)


def test_opcheck_and_compile(device, small_tiles):
    logits, given = logits_of(rows=2), on(device, settings(FEATURES, 2))
    logits = logits.to(device)
    args = (logits, *(given.get(name) for name in ARGUMENTS[:-1]), 2, False)
    check_op("sample", octavo.sample, args, logits, **given, num_logprobs=2)
    check_op("sample", octavo.sample, (logits, *[None] * len(ARGUMENTS), False), logits)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(logits=torch.zeros(2, 8, dtype=torch.int32)), TypeError, "logits: dtype int32 is not accepted"),
        (
            dict(logits=torch.zeros(8)),
            ValueError,
            r"logits: shape \(8,\) has 1 dimensions; expected 2: \[rows, vocab\]",
        ),
        (dict(logits=torch.zeros(8, 2).t()), ValueError, "logits: the last dimension has stride 2"),
        (dict(logits=torch.zeros(2, 0)), ValueError, "logits: vocab 0; expected at least 1"),
        (dict(temperature=1.0), TypeError, "temperature: expected a torch.Tensor, got float"),
        (dict(temperature=torch.ones(2).double()), TypeError, "temperature: dtype float64"),
        (dict(top_k=torch.ones(2)), TypeError, "top_k: dtype float32 is not accepted; expected int32"),
        (
            dict(top_p=torch.ones(3)),
            ValueError,
            r"top_p: shape \(3,\); expected \(2,\): \[rows\], as many as logits has",
        ),
        (dict(min_p=torch.ones(2, device="meta")), ValueError, "min_p: on meta, but logits is on cpu"),
        (dict(seeds=None), ValueError, "seeds: None; expected a tensor, since positions is given and needs it"),
        (dict(positions=None), ValueError, "positions: None; expected a tensor, since seeds is given and needs it"),
        (dict(presence_penalty=torch.ones(2)), ValueError, "output_counts: None; .* presence_penalty is given"),
        (dict(output_counts=torch.ones(2, 7, dtype=torch.int32)), ValueError, r"output_counts: shape \(2, 7\)"),
        (dict(prompt_mask=torch.ones(2, 1, dtype=torch.int32)), ValueError, "repetition_penalty: None; .*prompt_mask"),
        (dict(bias_ids=torch.ones(2, 3, dtype=torch.int32)), ValueError, "bias_values: None; .*bias_ids"),
        (dict(bias_values=torch.ones(2, 3)), ValueError, r"bias_values: shape \(2, 3\)"),
        (dict(allowed_mask=torch.ones(2, 2, dtype=torch.int32)), ValueError, r"allowed_mask: .* expected \(2, 1\)"),
        (dict(num_logprobs=9), ValueError, "num_logprobs: 9; expected 0 to 8"),
        (dict(num_logprobs=-1), ValueError, "num_logprobs: -1; expected 0 to 8"),
    ],
)
def test_errors(change, error, message):
    index = torch.zeros(2, dtype=torch.int64)
    args = dict(logits=torch.zeros(2, 8), seeds=index, positions=index.clone()) | change
    with pytest.raises(error, match=message):
        octavo.sample(**args)


@pytest.mark.gpu
@pytest.mark.parametrize("features", COMBINATIONS, ids=lambda c: "+".join(c) or "none")
def test_real_vocabulary_draws_from_the_exact_distribution(features):
    vocab, rows = 128256, 512
    logits = logits_of(vocab, scale=1.0)
    logits[0, torch.arange(0, vocab, 4001)] += 9.0
    given = on("cuda", settings(features, rows, vocab))
    device_logits = logits.cuda().expand(rows, -1)
    tokens = []
    for position in range(16):
        given["positions"].fill_(position)
        tokens.append(octavo.sample(device_logits, **given))
    row = {k: v[:1].cpu() for k, v in given.items()}
    assert chance(torch.cat(tokens), probabilities_by_sorting(logits[0], row)) > LIMIT


def probabilities_by_sorting(row, given):
    """`probabilities` for large vocabularies without equal logits."""
    filters = {k: v for k, v in given.items() if k in ("temperature", "min_p", "top_k")}
    counts = {k: v for k, v in given.items() if k not in ("top_p", *filters)}
    x = torch.from_numpy(edited(row, counts))
    p = torch.from_numpy(probabilities(x, filters))
    if "top_p" in given:
        ordered, order = p.sort(descending=True)
        p[order[ordered.cumsum(0) - ordered >= float(given["top_p"][0])]] = 0
    return (p / p.sum()).numpy()


@pytest.mark.gpu
def test_flat_distributions_take_the_long_way():
    """Masses and counts spread over all tiles, and k beyond the candidates."""
    logits = torch.randn(6, 128256)
    given = dict(
        seeds=torch.arange(6),
        positions=torch.arange(6),
        top_k=torch.tensor([0, 0, 3000, 100_000, 1000, 3000], dtype=torch.int32),
        top_p=torch.tensor([0.9, 0.3, 1.0, 0.5, 0.9, 0.9]),
    )
    tokens = octavo.sample(logits.cuda(), **on("cuda", given)).cpu()
    assert torch.equal(tokens, by_reference(logits, **given)[0])


@pytest.mark.gpu
def test_graph_capture_and_replay_with_other_settings():
    logits = torch.randn(4, 32000, device="cuda", dtype=torch.bfloat16)
    given = on("cuda", settings(FEATURES, 4, 32000))
    octavo.sample(logits, **given, num_logprobs=2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = octavo.sample(logits, **given, num_logprobs=2)
    logits.copy_(torch.randn_like(logits))
    given["positions"] += 1
    given["top_k"].copy_(torch.tensor([0, 1, 100, 5000]))
    given["temperature"][2] = 0
    graph.replay()
    for replayed, eager in zip(out, octavo.sample(logits, **given, num_logprobs=2), strict=True):
        assert torch.equal(replayed, eager)


@pytest.mark.gpu
def test_offsets_beyond_int32():
    logits = torch.empty(2, 2**31 + 64, device="cuda", dtype=torch.float16)[:, :64]
    logits.normal_()
    assert torch.equal(octavo.sample(logits), logits.argmax(-1))


def launches(dtype):
    """Every tile choice that ships, on meta tensors: tests/test_compile.py compiles them."""
    rows = 4
    for vocab, kind, features, logprobs in (
        (128256, dtype, (), (None, False)),
        (128256, dtype, FEATURES[:4], (None, False)),
        # What edits logits takes long to compile, so not for every dtype.
        (128256, torch.bfloat16, FEATURES, (5, False)),
        (262144, torch.float32, FEATURES, (5, True)),
    ):
        if kind != dtype and dtype == torch.float16:
            continue
        logits = torch.empty(rows, vocab, device="meta", dtype=kind)
        given = {k: v.to("meta") for k, v in settings(features, rows, 64).items()}
        for name, width in (("output_counts", vocab), ("prompt_mask", vocab // 32), ("allowed_mask", vocab // 32)):
            if name in given:
                given[name] = torch.empty(rows, width, device="meta", dtype=torch.int32)
        sampling._sample_cuda(logits, *[given.get(name) for name in ARGUMENTS[:-1]], *logprobs)
        sampling._sample_cuda(logits, *[None] * len(ARGUMENTS), False)
