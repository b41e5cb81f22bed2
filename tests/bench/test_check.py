"""What a provider's output may differ from the exact result."""

import pytest
import torch

from octavo.bench.check import Quantized, Requantized, difference, not_finite


def test_tolerance_of_half_precision():
    exact = torch.randn(64, 512, dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert difference(exact.to(dtype), exact) is None
        eps = torch.finfo(dtype).eps
        if dtype != torch.float32:
            assert "rms error" in difference((exact * (1 + 4 * eps)).to(dtype), exact)
        assert "error" in difference((exact * (1 + 20 * eps)).to(dtype), exact)
    tf32 = (exact.float().view(torch.int32) & ~0x1FFF).view(torch.float32)
    assert difference(tf32, exact) is not None


def test_copies_and_integers_are_held_bit_for_bit():
    words = torch.randint(0, 2**31 - 1, (8, 8), dtype=torch.int32)
    copied = torch.randn(8, 8).bfloat16()
    assert difference((words, copied), (words.clone(), copied.clone())) is None
    other = words.clone()
    other[1, 1] += 1
    assert difference(other, words) == "1 of 64 elements differ"
    assert "elements differ" in difference(torch.nextafter(copied, copied + 1), copied)
    assert "dtype" in difference(words.long(), words)
    assert "shape" in difference(words[:4], words)
    assert difference(words, (words, words)) == "1 tensors, expected 2"


def test_what_is_not_finite():
    x = torch.ones(4, 4)
    assert not_finite((x, torch.arange(3))) is None
    x[1, 1], x[2, 2] = float("nan"), float("-inf")
    assert not_finite((torch.arange(3), x)) == "2 of 16 elements are not finite"


LIMITS = {torch.int8: 127, torch.float8_e4m3fn: 448}


def quantised(x, dtype, parts=1, scale=None):
    """As it should be, in fp64."""
    rows = x.unflatten(-1, (parts, -1)) if parts else x
    if scale is None:
        scale = (rows.abs().amax(-1, keepdim=True) if parts else rows.abs().amax()) / LIMITS[dtype]
    q = (rows / scale).clamp(-LIMITS[dtype], LIMITS[dtype])
    q = (q.round() if dtype == torch.int8 else q.float()).to(dtype)
    return q.flatten(-2) if parts else q, (scale.squeeze(-1) if parts else scale.view(1)).float()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("parts", [0, 1, 4])
def test_quantised_numbers_are_the_nearest(dtype, parts):
    x = torch.randn(16, 64, dtype=torch.float64)
    exact = Quantized(x, dtype, parts=parts)
    q, scale = quantised(x, dtype, parts)
    assert difference((q, scale), exact) is None
    assert difference((q, scale, x.float()), (exact, x)) is None
    # What a provider that rounds to bf16 before makes of them.
    assert difference(quantised(x.bfloat16().double(), dtype, parts), exact) is None
    words = q.view(torch.uint8)
    one_wrong = words.clone()
    small = (q.float().abs() < 20).flatten().nonzero()[0]
    one_wrong.view(-1)[small] ^= 2
    assert difference((one_wrong.view(dtype), scale), exact) == "output 0: 1 of 1024 elements differ"
    truncated = (x / scale.double().repeat_interleave(64 // max(parts, 1), -1)).trunc().to(torch.int8)
    if dtype == torch.int8:
        assert "elements differ" in difference((truncated, scale), exact)
    assert "scales differ" in difference((q, scale * 1.02), exact)
    assert "scales differ" in difference((q, scale * float("nan")), exact)
    assert "expected" in difference((q.float(), scale), exact)
    assert difference(q, exact) == "1 tensors, expected 2"
    swapped = q.view(torch.uint8).flip(0).view(dtype)
    assert "elements differ" in difference((swapped, scale), exact) or "scales" in difference((swapped, scale), exact)


@pytest.mark.parametrize("dtype", LIMITS)
def test_numbers_quantised_by_a_given_scale(dtype):
    x, scale = torch.randn(16, 64, dtype=torch.float64), torch.tensor([2.0 / LIMITS[dtype]])
    exact = Quantized(x, dtype, scale)
    q = quantised(x, dtype, scale=scale.double())[0]
    assert difference(q, exact) is None and difference((q,), exact) is None
    assert difference((q, scale), exact) == "2 tensors, expected 1"
    assert "elements differ" in difference(quantised(1.1 * x, dtype, scale=scale.double())[0], exact)
    if dtype == torch.float8_e4m3fn:
        q[0, 0] = float("nan")
        assert difference(q, exact) == "1 of 1024 elements differ"


def test_what_was_quantised_on_the_way_may_be_twice_its_noise_off():
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(64, 256, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.02
    exact = Requantized(values, 0.02)
    assert difference((values + 1.5 * noise).bfloat16(), exact) is None
    assert "rms error" in difference((values + 3 * noise).bfloat16(), exact)
    assert "rms error" in difference((values + 1.5 * noise).bfloat16(), values)
    wrong = values.clone()
    wrong[3, 4] += 1
    assert "largest error" in difference(wrong.bfloat16(), exact)
