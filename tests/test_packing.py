import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import octavo


def packed_by_loops(q: np.ndarray) -> np.ndarray:
    """The layout's definition, a word at a time."""
    n, k = q.shape
    words = np.zeros((-(-n // 64), -(-k // 128), 64, 32), np.uint16)
    for row in range(n):
        for col in range(k):
            word = (row // 64, col // 128, row % 64, col % 32)
            words[word] |= np.uint16(q[row, col]) << (col % 128 // 32 * 4)
    return words.view(np.int16)


def weights(n, k, device="cpu"):
    return torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device)


@pytest.mark.parametrize(("n", "k"), [(1, 32), (63, 128), (64, 160), (65, 96), (130, 576)])
def test_pack_against_loops(device, n, k):
    q = weights(n, k, device)
    packed = octavo.int4_pack(q)
    assert packed.is_contiguous() and packed.device == q.device
    assert torch.equal(packed.cpu(), torch.from_numpy(packed_by_loops(q.cpu().numpy())))


@pytest.mark.parametrize(("n", "k"), [(1, 4544), (49155, 64), (576, 1536)])
def test_unpack_inverts_pack(device, n, k):
    q = weights(n, k, device)
    unpacked = octavo.int4_unpack(octavo.int4_pack(q), n, k)
    assert unpacked.is_contiguous() and torch.equal(unpacked, q)


@given(n=st.integers(0, 140), planes=st.integers(1, 9), transposed=st.booleans())
def test_round_trip_of_any_shape(n, planes, transposed):
    q = weights(planes * 32, n).t() if transposed else weights(n, planes * 32)
    packed = octavo.int4_pack(q)
    assert torch.equal(octavo.int4_unpack(packed, n, planes * 32), q)
    # What pads the last tiles is 0, whatever torch.empty held.
    everything = octavo.int4_unpack(packed, packed.shape[0] * 64, packed.shape[1] * 128)
    assert everything[n:].sum() == 0 and everything[:, planes * 32 :].sum() == 0


def test_pack_on_meta_gives_the_shape():
    assert octavo.int4_pack(torch.empty(100, 4544, dtype=torch.uint8, device="meta")).shape == (2, 36, 64, 32)


@pytest.mark.parametrize(
    ("q", "error", "message"),
    [
        (torch.zeros(4, 32), TypeError, "q: dtype float32 is not accepted"),
        (torch.zeros(32, dtype=torch.uint8), ValueError, r"q: shape \(32,\) has 1 dimensions; expected 2"),
        (torch.zeros(4, 48, dtype=torch.uint8), ValueError, "k: 48 inputs; expected a positive multiple of 32"),
        (torch.zeros(4, 0, dtype=torch.uint8), ValueError, "k: 0 inputs"),
        (torch.full((4, 32), 16, dtype=torch.uint8), ValueError, "q: the largest value is 16; expected 0 to 15"),
    ],
)
def test_pack_errors(q, error, message):
    with pytest.raises(error, match=message):
        octavo.int4_pack(q)


@pytest.mark.parametrize(
    ("packed", "n", "k", "error", "message"),
    [
        (torch.zeros(1, 1, 64, 32), 64, 128, TypeError, "packed: dtype float32"),
        (
            torch.zeros(1, 1, 64, 32, dtype=torch.int16),
            65,
            128,
            ValueError,
            r"packed: shape .* expected \(2, 1, 64, 32",
        ),
        (torch.zeros(1, 1, 64, 32, dtype=torch.int16), 64, 100, ValueError, "k: 100 inputs"),
    ],
)
def test_unpack_errors(packed, n, k, error, message):
    with pytest.raises(error, match=message):
        octavo.int4_unpack(packed, n, k)
