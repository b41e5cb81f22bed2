"""Gumbel noise that depends on a request's seed, the position of the token in it, and what the noise is for.

argmax(log p + noise) draws from p (Gumbel, 1954). Since the noise does not depend on the row or the batch, a request
draws the same tokens wherever it is computed. The bits are Philox 4x32-10 with the seed as key and (index / 4,
position, use) as counter, an index being a token's or a tile's: Salmon et al., "Parallel random numbers: as easy as 1,
2, 3" (2011), https://doi.org/10.1145/2063384.2063405.
"""

import triton
import triton.language as tl


@triton.jit
def _philox(seed, position, use, quad):
    """The four words of four neighbours; seed and position are int64."""
    low, high = position.to(tl.int32), (position >> 32).to(tl.int32)
    return tl.philox(seed, quad, quad * 0 + low, quad * 0 + high, quad * 0 + use)


@triton.jit
def _gumbel(words):
    # E = -log(1 - u) is exponential. Small E decide who wins, so u must be fine near 0 and 1 - u must not round them.
    u = tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    series = u * (1.0 + u * (0.5 + u * (0.3333333333333333 + u * 0.25)))
    return -tl.log(tl.where(u < 0.015625, series, -tl.log(1.0 - u)))


@triton.jit
def gumbel(seed, position, use, first, COUNT: tl.constexpr):
    """Noise `[COUNT]` of the indices `first` (a multiple of 4) and on."""
    r0, r1, r2, r3 = _philox(seed, position, use, first // 4 + tl.arange(0, COUNT // 4))
    # One call of Philox serves four neighbours, which lie in one thread's registers: nothing is moved.
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))  # [COUNT / 4, 2, 2]
    return _gumbel(tl.reshape(words, [COUNT]))


@triton.jit
def gumbel_of(seed, position, use, index):
    """Noise of any indices: the same bits, at up to four times the cost of each."""
    r0, r1, r2, r3 = _philox(seed, position, use, index >> 2)
    place = index & 3
    return _gumbel(tl.where(place < 2, tl.where(place == 0, r0, r1), tl.where(place == 2, r2, r3)))
