"""What a provider's output may differ from the exact result."""

import torch

from octavo.bench.check import difference, not_finite


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
