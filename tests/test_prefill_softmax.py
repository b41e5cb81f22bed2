"""The softmax of Hopper's prefill kernel, its source run in Python: tensors are torch's.

Its PTX is executed for the 128 lanes of a warpgroup at once, which have numbers as products leave them.
"""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from gluon_in_python import _code

ROWS, BLOCK_N, D, PACK = 64, 128, 64, 4


class Rows(torch.Tensor):
    type = SimpleNamespace(layout=None)


def _places(count):
    """Row and column of each lane's numbers, [128, count]."""
    thread, i = torch.arange(128)[:, None], torch.arange(count)
    warp, lane = thread // 32, thread % 32
    return warp * 16 + lane // 4 + (i // 2 % 2) * 8, i // 4 * 8 + lane % 4 * 2 + i % 2


def _assembly(code, constraints, args, dtype, is_pure, pack):
    at = _places(pack)
    out, read = (x.as_subclass(torch.Tensor).expand(args[0].shape)[at].T for x in args)
    assert constraints.split(",")[: 2 * pack] == ["=f"] * pack + [str(i) for i in range(pack)]
    registers = {f"${i}": x for i, x in enumerate([*out, *out, *read])}
    registers["%laneid"] = torch.arange(128) % 32
    active = torch.ones(128, dtype=torch.bool)
    operations = {
        "mov.u32": lambda a: a,
        "and.b32": torch.bitwise_and,
        "shl.b32": torch.bitwise_left_shift,
        "sub.s32": torch.sub,
        "mul.f32": torch.mul,
        "setp.gt.s32": torch.gt,
        "setp.le.s32": torch.le,
        "setp.neu.f32": torch.ne,
        "setp.neu.or.f32": lambda a, b, p: (a != b) | p,
        "selp.f32": lambda a, b, p: torch.where(p, a, b),
        "vote.sync.any.pred": lambda p, mask: p.view(4, 32).any(1, keepdim=True).expand(4, 32).reshape(128),
    }
    for line in code.replace("{", "").replace("}", "").replace("SKIP:", "").split(";"):
        operation, _, rest = line.strip().partition(" ")
        if operation == "@!p":
            assert rest == "bra SKIP"
            active = registers["p"]
        elif operation and operation != ".reg":
            result, *names = (name.strip() for name in rest.split(","))
            value = operations[operation](*(registers[n] if n in registers else _constant(n) for n in names))
            registers[result] = torch.where(active, value, registers[result]) if result[0] == "$" else value
    result = torch.empty_like(args[0])
    result[at] = torch.stack([registers[f"${i}"] for i in range(pack)], 1)
    return result


@functools.cache
def _constant(text):
    if text.startswith("0f"):
        return torch.tensor(int(text[2:], 16) - (int(text[2], 16) >= 8) * 2**32, dtype=torch.int32).view(torch.float32)
    return torch.tensor(int(text, 0))


GL = SimpleNamespace(
    constexpr=lambda value: value,
    int32=torch.int32,
    float32=torch.float32,
    SliceLayout=lambda dim, layout: None,
    convert_layout=lambda x, layout: x,
    exp2=torch.exp2,
    expand_dims=torch.unsqueeze,
    inline_asm_elementwise=_assembly,
    max=torch.amax,
    maximum=lambda a, b: torch.maximum(a, torch.as_tensor(b)),
    minimum=lambda a, b: torch.minimum(a, torch.as_tensor(b)),
    permute=torch.permute,
    reshape=torch.reshape,
    split=lambda x: x.unbind(-1),
    sum=lambda x, dim: x.sum(dim),
    where=torch.where,
    zeros_like=torch.zeros_like,
)


def _same(function):
    return function


KERNEL = dict(
    gl=GL,
    gluon=SimpleNamespace(jit=_same, constexpr_function=_same),
    field=lambda entries, done, name, num_warps: entries[name],
    **{name: name for name in ("POSITION", "START", "END")},
)
exec(_code("attention/prefill_softmax.py"), KERNEL)


def attention(scores, values, position, window=None, lazy=True, edge=lambda tile: True):
    """Outputs and log-sum-exps of a warpgroup, in base 2, by the steps of `prefill_compute.py`; the largest weight."""
    row = torch.arange(ROWS)
    entries = dict(POSITION=position, START=0, END=scores.shape[1])
    top = torch.full((ROWS,), -math.inf).as_subclass(Rows)
    total = KERNEL["sums_of_lanes"](torch.zeros(ROWS, BLOCK_N))
    acc = torch.zeros(ROWS, D).as_subclass(Rows)
    largest = 0.0
    times = KERNEL["rows_times_if_any"] if lazy else KERNEL["rows_times"]
    masks = window is None, window is not None
    for tile in reversed(range(scores.shape[1] // BLOCK_N)):
        keys = slice(tile * BLOCK_N, (tile + 1) * BLOCK_N)
        weights, top, total, rescale = KERNEL["softmax"](
            scores[:, keys].as_subclass(Rows), top, total.as_subclass(Rows), tile, entries, 0, row, window, 1.0, 0.0,
            edge(tile), True, masks[1], masks[1], False, PACK, BLOCK_N, lazy,
        )  # fmt: skip
        acc = times(acc, rescale) + weights @ values[keys]
        largest = max(largest, weights.max().item())
    total = total.sum(1)
    return acc / torch.where(total == 0, 1.0, total)[:, None], top + total.log2(), largest


def seen(keys, position, window):
    """Which keys a row sees."""
    at, j = position + torch.arange(ROWS)[:, None] // PACK, torch.arange(keys)
    return (j <= at) & (j > at - (window or math.inf))


KINDS = {
    "noise": lambda scores, back: scores * 3,
    "slow growth": lambda scores, back: scores + back / 128 * 5,
    "a jump": lambda scores, back: scores + (back > 300) * 40.0,
    "a fall": lambda scores, back: scores - back / 128 * 5,
}
KEYS = 5 * BLOCK_N


def scores_of(kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(ROWS, KEYS, generator=generator)
    return KINDS[kind](scores, KEYS - 1 - torch.arange(KEYS)), torch.randn(KEYS, D, generator=generator)


@pytest.mark.parametrize("position", [KEYS - 16, 300, -3], ids=str)
@pytest.mark.parametrize("window", [None, 200, 1], ids=str)
@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "not lazy"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_softmax(kind, lazy, window, position):
    scores, values = scores_of(kind)
    out, log, largest = attention(scores, values, position, window, lazy)
    mask = seen(KEYS, position, window)
    exact = (scores.double() * math.log(2)).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(out.double(), exact.softmax(1).nan_to_num() @ values.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log.double() * math.log(2), exact.logsumexp(1), rtol=1e-6, atol=1e-5)
    assert largest <= (2**8 if lazy else 1), "what fp16 is to hold"
    assert out[~mask.any(1)].eq(0).all() and (log == -math.inf).equal(~mask.any(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_a_row_has_the_same_bits_beside_others(kind, other):
    """A warp multiplies the sums of all its rows where one of them asks for it."""
    scores, values = scores_of(kind)
    alone = attention(scores, values, KEYS - 16)
    others = torch.arange(ROWS) % 3 == 0
    scores[others] = scores_of(other, seed=1)[0][others] * 5
    beside = attention(scores, values, KEYS - 16)
    for a, b in zip(alone[:2], beside[:2], strict=True):
        assert torch.equal(a[~others], b[~others]) and not torch.equal(a[others], b[others])


def test_tiles_that_every_row_sees_need_no_mask():
    scores, values = scores_of("noise")
    masked = attention(scores, values, KEYS - 16)
    plain = attention(scores, values, KEYS - 16, edge=lambda tile: tile == KEYS // BLOCK_N - 1)
    assert all(map(torch.equal, masked[:2], plain[:2]))


def test_sums_are_rescaled_only_where_a_row_asks_for_it():
    x = torch.randn(ROWS, D).as_subclass(Rows)
    factor = torch.ones(ROWS).as_subclass(Rows)
    x[40, 3] = torch.nan
    assert torch.equal(KERNEL["rows_times_if_any"](x, factor).nan_to_num(), x.nan_to_num())
    factor[[5, 63]] = torch.tensor([0.5, 0.25]).as_subclass(Rows)
    assert torch.equal(KERNEL["rows_times_if_any"](x, factor).nan_to_num(), (x * factor[:, None]).nan_to_num())
