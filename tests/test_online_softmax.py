"""Powers of two for the softmax of fp32: 2^x within one rounding, where a GPU's own instruction is allowed two more."""

import torch
import triton
import triton.language as tl

from octavo.kernels.attention.online_softmax import exp2_of


@triton.jit
def _exp2_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr, PRECISE: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, exp2_of(tl.load(x_ptr + at), PRECISE))


def powers(x: torch.Tensor, precise: bool = True) -> torch.Tensor:
    out = torch.empty_like(x)
    block = min(x.numel(), 1024)
    _exp2_kernel[(x.numel() // block,)](x, out, BLOCK=block, PRECISE=precise)
    return out


def test_precise(device):
    for low, high in ((-126, 127), (-2, 2), (-1e-3, 1e-3)):
        x = torch.linspace(low, high, 2**16, device=device)
        exact = x.double().exp2()
        assert ((powers(x).double() - exact).abs() / exact).max() <= 2**-23


def test_whole_numbers_are_exact(device):
    x = torch.arange(-128, 128, device=device).float()
    assert torch.equal(powers(x)[2:], x[2:].double().exp2().float())
    assert not powers(x)[:2].any(), "below the smallest normal number: 0"


def test_not_finite_and_small(device):
    for precise in (True, False):
        x = torch.tensor([-float("inf"), -3e38, -200.0, float("nan"), -0.0, 0.0, 1e-30, -1e-30], device=device)
        expected = torch.tensor([0, 0, 0, float("nan"), 1, 1, 1, 1], dtype=torch.float32, device=device)
        torch.testing.assert_close(powers(x, precise), expected, equal_nan=True, rtol=1e-6, atol=0)
