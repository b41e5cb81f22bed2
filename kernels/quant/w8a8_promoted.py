"""What the warpgroups of `w8a8_hopper.py` do where the tensor cores may not keep sums over all inputs.

So it is beside scales by blocks, and for fp8 products in full precision, of whose sums Hopper's tensor cores keep 14
bits: every 128 inputs they are taken out and added up in fp32.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from octavo.kernels.quant.stream_k import tile_at
from octavo.kernels.quant.w8a8_epilogue import finish_gluon, finish_halves, residual_of
from octavo.kernels.quant.w8a8_loads import multiply, scale_ptrs
from octavo.kernels.quant.w8a8_parts import leave_part, steps_of

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.jit
def promoted(acc, sums, scale, BLOCKS: gl.constexpr):
    """acc + sums · scale, in assembly, which stays where it is.

    LLVM would move sums behind the next products, where nothing waits for them, and registers have no room for both.
    """
    if BLOCKS:
        args = [acc, sums, gl.expand_dims(scale, 1)]
        return gl.inline_asm_elementwise("fma.rn.f32 $0, $2, $3, $1;", "=f,f,f,f", args, gl.float32, False, 1)
    else:
        return gl.inline_asm_elementwise("add.f32 $0, $1, $2;", "=f,f,f", [acc, sums], gl.float32, False, 1)


@gluon.jit
def _leave(
    acc, parts_ptr, part, first_m, first_n, epilogue, PARTS: gl.constexpr, BLOCKS: gl.constexpr, ACTIVATED: gl.constexpr
):
    """What becomes of sums of 128 outputs."""
    if PARTS > 1:
        leave_part(acc, parts_ptr, part, first_m, first_n, epilogue[1], epilogue[2], False)
    elif epilogue[11] is None:
        finish_gluon(acc, None, first_m, first_n, epilogue, False, BLOCKS, ACTIVATED)
    else:
        residual = residual_of(first_m, first_n, epilogue, acc.shape[0], acc.shape[1] // 2, False, ACTIVATED)
        finish_halves(acc, residual, first_m, first_n, epilogue, False, BLOCKS, ACTIVATED)


@gluon.jit
def compute_wide(
    group: gl.constexpr, epilogue, parts_ptr, x, weight, full, empty, m_tiles, n_tiles, steps, part_steps, BLOCK_M:
    gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, GROUP: gl.constexpr, BLOCKS:
    gl.constexpr, ACTIVATED: gl.constexpr,
):
    """Sums of 256 outputs, taken out at each step, of 128 at a time; the other warpgroup multiplies then."""
    ROWS: gl.constexpr = BLOCK_M // 2
    zeros = gl.zeros([ROWS, 128], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32]))
    TOKEN: gl.constexpr = gl.SliceLayout(1, zeros.type.layout)
    sums = zeros
    i = 0
    for work in range(gl.program_id(0), m_tiles * n_tiles * PARTS, gl.num_programs(0)):
        m, n = tile_at(work // PARTS, m_tiles, n_tiles, GROUP)
        first_m, first_n = m * BLOCK_M + group * ROWS, n * BLOCK_N
        first, end = steps_of(work % PARTS, steps, part_steps)
        left, right = zeros, zeros
        if BLOCKS:
            x_ptrs, left_ptr = scale_ptrs(epilogue, first_m, first_n, 0, ROWS, TOKEN)
            _, right_ptr = scale_ptrs(epilogue, first_m, gl.minimum(first_n + 128, epilogue[2] - 1), 0, ROWS, TOKEN)
            x_scale, left_scale = gl.load(x_ptrs + first), gl.load(left_ptr + first)
            right_scale = gl.load(right_ptr + first)
        for step in range(first, end):
            stage = i % STAGES
            mbarrier.wait(full.index(stage), i // STAGES & 1)
            rows = x.index(stage).slice(group * ROWS, ROWS)
            lower, upper = weight.index(stage).slice(0, 128), weight.index(stage).slice(128, 128)
            sums = warpgroup_mma(rows, lower.permute((1, 0)), sums, use_acc=False, is_async=True)
            if BLOCKS:
                of_left, of_right = x_scale * left_scale, x_scale * right_scale
                after = gl.minimum(step + 1, end - 1)
                x_scale, left_scale = gl.load(x_ptrs + after), gl.load(left_ptr + after)
                right_scale = gl.load(right_ptr + after)
            else:
                of_left, of_right = None, None
            sums = warpgroup_mma_wait(0, deps=[sums])
            left = promoted(left, sums, of_left, BLOCKS)
            sums = warpgroup_mma(rows, upper.permute((1, 0)), sums, use_acc=False, is_async=True)
            sums = warpgroup_mma_wait(0, deps=[sums])
            mbarrier.arrive(empty.index(stage), count=1)
            right = promoted(right, sums, of_right, BLOCKS)
            i += 1
        _leave(left, parts_ptr, work % PARTS, first_m, first_n, epilogue, PARTS, BLOCKS, ACTIVATED)
        _leave(right, parts_ptr, work % PARTS, first_m, first_n + 128, epilogue, PARTS, BLOCKS, ACTIVATED)


@gluon.jit
def _scales_at(x_ptrs, weight_ptr, step, BLOCKS: gl.constexpr):
    if BLOCKS:
        return gl.load(x_ptrs + step), gl.load(weight_ptr + step)
    else:
        return 0.0, 0.0


@gluon.jit
def _take(acc, sums, scales, empty, i, LATER: gl.constexpr, STAGES: gl.constexpr, BLOCKS: gl.constexpr):
    """Adds the sums of step i, behind which LATER more were issued."""
    sums = warpgroup_mma_wait(LATER, deps=[sums])
    mbarrier.arrive(empty.index(i % STAGES), count=1)
    scale = None
    if BLOCKS:
        scale = scales[0] * scales[1]
    return promoted(acc, sums, scale, BLOCKS), sums


@gluon.jit
def compute_small(
    group: gl.constexpr, epilogue, parts_ptr, x, weight, full, empty, m_tiles, n_tiles, steps, part_steps, BLOCK_M:
    gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, GROUP: gl.constexpr, BLOCKS:
    gl.constexpr, ACTIVATED: gl.constexpr,
):
    """Sums of 128 outputs, taken out while the next step's products run: registers have room for both."""
    ROWS: gl.constexpr = BLOCK_M // 2
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32]))
    TOKEN: gl.constexpr = gl.SliceLayout(1, zeros.type.layout)
    even, odd = zeros, zeros
    i = 0
    for work in range(gl.program_id(0), m_tiles * n_tiles * PARTS, gl.num_programs(0)):
        m, n = tile_at(work // PARTS, m_tiles, n_tiles, GROUP)
        first_m, first_n = m * BLOCK_M + group * ROWS, n * BLOCK_N
        first, end = steps_of(work % PARTS, steps, part_steps)
        acc = zeros
        x_ptrs, w_ptr = scale_ptrs(epilogue, first_m, first_n, first, ROWS, TOKEN)
        last = end - first - 1
        # Scales are read two steps ahead: the cache (L2) takes longer than one.
        of_even = _scales_at(x_ptrs, w_ptr, 0, BLOCKS)
        of_odd = _scales_at(x_ptrs, w_ptr, gl.minimum(last, 1), BLOCKS)
        evens = multiply(x, weight, full, even, i, group, ROWS, STAGES, True)
        for pair in range(last // 2):
            odds = multiply(x, weight, full, odd, i + 1, group, ROWS, STAGES, True)
            acc, even = _take(acc, evens, of_even, empty, i, 1, STAGES, BLOCKS)
            of_even = _scales_at(x_ptrs, w_ptr, 2 * pair + 2, BLOCKS)
            evens = multiply(x, weight, full, even, i + 2, group, ROWS, STAGES, True)
            acc, odd = _take(acc, odds, of_odd, empty, i + 1, 1, STAGES, BLOCKS)
            of_odd = _scales_at(x_ptrs, w_ptr, gl.minimum(last, 2 * pair + 3), BLOCKS)
            i += 2
        if last % 2 == 1:
            odds = multiply(x, weight, full, odd, i + 1, group, ROWS, STAGES, True)
            acc, even = _take(acc, evens, of_even, empty, i, 1, STAGES, BLOCKS)
            acc, odd = _take(acc, odds, of_odd, empty, i + 1, 0, STAGES, BLOCKS)
            i += 2
        else:
            acc, even = _take(acc, evens, of_even, empty, i, 0, STAGES, BLOCKS)
            i += 1
        _leave(acc, parts_ptr, work % PARTS, first_m, first_n, epilogue, PARTS, BLOCKS, ACTIVATED)
# fmt: on
