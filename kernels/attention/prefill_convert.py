"""The warpgroup of the prefill kernel (`prefill.py`) that converts a float8 cache to the dtype of the queries.

Beside queries of 16 bits, the tensor cores take keys and values of 16 bits, from shared memory. They come as float8,
half the bytes; a tile is read into registers and written again where the products look for it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from octavo.kernels.attention.prefill_tiles import (
    END,
    HEAD,
    HIGH,
    LOW,
    START,
    VALID,
    field,
    release_entry,
    wait_for_entry,
)

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.constexpr_function
def _layout(columns):
    """Of eight numbers side by side a thread: neither their 8 bytes nor, converted, their 16 are read in conflict."""
    lanes = min(columns // 8, 16)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.jit
def _widened(x, dtype: gl.constexpr):
    """Float8 in a type of 16 bits, exactly."""
    x = x.to(gl.float16)  # one instruction for two numbers
    if dtype == gl.bfloat16:
        x = x.to(gl.float32).to(gl.bfloat16)
    return x


@gluon.jit
def _convert(raw, raw_read, out, out_read, phase, out_full, flip, first, last):
    """One tile, with the bits of `flip` inverted, and zeros for what lies outside of rows `first` to `last`."""
    COLUMNS: gl.constexpr = raw.shape[1]
    ROWS: gl.constexpr = 4096 // COLUMNS  # at a time, for which there are registers
    layout: gl.constexpr = _layout(COLUMNS)
    mbarrier.wait(out_read, phase)
    if (flip == 0) & (first <= 0) & (last >= raw.shape[0]):
        for piece in gl.static_range(raw.shape[0] // ROWS):
            out.slice(piece * ROWS, ROWS).store(_widened(raw.slice(piece * ROWS, ROWS).load(layout), out.dtype))
    else:
        for piece in gl.static_range(raw.shape[0] // ROWS):
            row = gl.expand_dims(piece * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout)), 1)
            bits = raw.slice(piece * ROWS, ROWS).load(layout).to(gl.int8, bitcast=True) ^ flip
            bits = gl.where((row >= first) & (row < last), bits, gl.zeros([ROWS, COLUMNS], gl.int8, layout))
            out.slice(piece * ROWS, ROWS).store(_widened(bits.to(raw.dtype, bitcast=True), out.dtype))
    # What these threads have written, the tensor cores are to see. And only now, with what was read used, is the place
    # that it came from given back: neither a barrier nor an arrival waits for loads that are still under way.
    fence_async_shared()
    mbarrier.arrive(out_full, count=1)
    mbarrier.arrive(raw_read, count=1)


@gluon.jit
def convert(
    raw_keys, raw_values, keys, values, raw_keys_full, raw_values_full, raw_keys_read, raw_values_read, keys_full,
    values_full, queries_read, keys_read, values_read, entries, ring_full, ring_empty, k_scale_ptr, stride_k_scale,
    GROUP: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, RAW_KEYS: gl.constexpr, RAW_VALUES: gl.constexpr,
):
    """What the warpgroup does: in the order in which they are needed, keys of a step, and values of the one before."""
    done = 0
    step = 0
    first = 0
    last = 0
    valid = 1
    while valid == 1:
        wait_for_entry(ring_full, done)
        low = field(entries, done, LOW, 4)
        high = field(entries, done, HIGH, 4)
        start = field(entries, done, START, 4)
        end = field(entries, done, END, 4)
        head = field(entries, done, HEAD, 4)
        valid = field(entries, done, VALID, 4)
        release_entry(ring_empty, done)
        flip = gl.to_tensor(0).to(gl.int8)
        if k_scale_ptr is not None:
            # The softmax takes the scale for positive; the sign of a float8 is its first bit.
            flip = gl.where(gl.load(k_scale_ptr + head // GROUP * stride_k_scale) < 0.0, -128, 0).to(gl.int8)
        for back in range(1, high - low + 1):
            stage = step % STAGES
            raw_stage = step % RAW_KEYS
            mbarrier.wait(raw_keys_full.index(raw_stage), step // RAW_KEYS & 1)
            _convert(
                raw_keys.index(raw_stage), raw_keys_read.index(raw_stage), keys.index(stage), keys_read.index(stage),
                step // STAGES & 1 ^ 1, keys_full.index(stage), flip, 0, BLOCK_N,
            )
            if step > 0:
                before = step - 1
                before_stage = before % STAGES
                raw_stage = before % RAW_VALUES
                mbarrier.wait(raw_values_full.index(raw_stage), before // RAW_VALUES & 1)
                # Values are read in the step after the one that reads the keys beside them, which says so.
                _convert(
                    raw_values.index(raw_stage), raw_values_read.index(raw_stage), values.index(before_stage),
                    values_read.index(stage), step // STAGES & 1 ^ 1, values_full.index(before_stage),
                    gl.to_tensor(0).to(gl.int8), first, last,
                )
            if (back == 1) & (done > 0):
                # The last products of the queries before are those of the step before. The warp that loads cannot wait
                # for them: of a barrier one sees whether its last phase is an odd one, and that warp is steps ahead.
                mbarrier.wait(keys_read.index((step - 1) % STAGES), (step - 1) // STAGES & 1)
                mbarrier.arrive(queries_read.index(0), count=1)
            first = start - (high - back) * BLOCK_N
            last = end - (high - back) * BLOCK_N
            step += 1
        done += 1
