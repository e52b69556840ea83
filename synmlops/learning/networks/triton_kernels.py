"""The kernels that `gpu.py` starts, in Triton; there stands what they compute.

A program works on a tile, all channels of some voxels, or on a stretch of a line of voxels along x.
"""

import triton
import triton.language as tl

# of these, one that is 1 would be made a constant, which is no tensor
_SIZES = ("depth", "height", "length", "depth_1", "height_1", "length_1", "depth_2", "height_2", "length_2")


@triton.jit
def _activated(u, KIND: tl.constexpr):
    if KIND == 1:
        u = tl.maximum(u, 0.0)
    if KIND == 2:
        u = tl.where(u > 0, u, tl.exp(tl.minimum(u, 0.0)) - 1)
    return u


@triton.jit
def moments(
    x, parts, voxels, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr
):
    """Write the sums of what a program has seen, and of its square."""
    part, sample = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, WIDTH)
    x += sample.to(tl.int64) * voxels * CHANNELS
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    square = tl.zeros([ROWS, WIDTH], tl.float32)
    for step in range(STEPS):
        row = (part * STEPS + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < voxels)[:, None] & (column < CHANNELS)[None, :]
        at = row.to(tl.int64)[:, None] * CHANNELS + column[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        total += value
        square += value * value
    parts += (sample * tl.num_programs(0) + part) * 2 * CHANNELS
    tl.store(parts + column, tl.sum(total, 0), mask=column < CHANNELS)
    tl.store(parts + CHANNELS + column, tl.sum(square, 0), mask=column < CHANNELS)


@triton.jit
def scale_shift(
    x, other, scale, shift, y, voxels,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, ALONE: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Scale, shift, add and activate a tile."""
    sample = tl.program_id(1)
    column, row = tl.arange(0, WIDTH), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_channel = column < CHANNELS
    inside = (row < voxels)[:, None] & is_channel[None, :]
    at = (sample.to(tl.int64) * voxels + row)[:, None] * CHANNELS + column[None, :]
    a = tl.load(scale + sample * CHANNELS + column, mask=is_channel, other=0.0)
    b = tl.load(shift + sample * CHANNELS + column, mask=is_channel, other=0.0)
    u = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * a[None, :] + b[None, :]
    if not ALONE:
        u += tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, _activated(u, KIND).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _before(grad, y, KIND: tl.constexpr):
    """Take a gradient back through the activation that gave y."""
    if KIND == 1:
        grad = tl.where(y > 0, grad, 0.0)
    if KIND == 2:
        grad = tl.where(y > 0, grad, grad * (y + 1))
    return grad


@triton.jit
def scale_shift_sums(
    grad, y, x, before, parts, voxels,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, KEEP: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Write the sums of what a program has seen of the gradient, and of that times x."""
    part, sample = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, WIDTH)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    product = tl.zeros([ROWS, WIDTH], tl.float32)
    for step in range(STEPS):
        row = (part * STEPS + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < voxels)[:, None] & (column < CHANNELS)[None, :]
        at = (sample.to(tl.int64) * voxels + row)[:, None] * CHANNELS + column[None, :]
        d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        if KIND > 0:
            d = _before(d, tl.load(y + at, mask=inside, other=0.0).to(tl.float32), KIND)
        if KEEP:
            tl.store(before + at, d.to(before.dtype.element_ty), mask=inside)
        total += d
        product += d * tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    parts += (sample * tl.num_programs(0) + part) * 2 * CHANNELS
    tl.store(parts + column, tl.sum(total, 0), mask=column < CHANNELS)
    tl.store(parts + CHANNELS + column, tl.sum(product, 0), mask=column < CHANNELS)


@triton.jit
def scale_shift_gradient(
    grad, y, x, scale, constant, slope, of_x, voxels,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Give the gradient of a tile that was scaled and shifted."""
    sample = tl.program_id(1)
    column, row = tl.arange(0, WIDTH), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_channel = column < CHANNELS
    inside = (row < voxels)[:, None] & is_channel[None, :]
    at = (sample.to(tl.int64) * voxels + row)[:, None] * CHANNELS + column[None, :]
    a = tl.load(scale + sample * CHANNELS + column, mask=is_channel, other=0.0)
    b = tl.load(constant + sample * CHANNELS + column, mask=is_channel, other=0.0)
    c = tl.load(slope + sample * CHANNELS + column, mask=is_channel, other=0.0)
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if KIND > 0:
        d = _before(d, tl.load(y + at, mask=inside, other=0.0).to(tl.float32), KIND)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    d = d * a[None, :] + b[None, :] + c[None, :] * value
    tl.store(of_x + at, d.to(of_x.dtype.element_ty), mask=inside)


@triton.jit
def pad(
    x, padded, depth, height, length, depth_to, height_to, length_to, wide_z, wide_y, wide_x,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fill a stretch of a padded line."""
    row = tl.program_id(0).to(tl.int64)
    line = row // height_to
    y = tl.minimum(tl.maximum(row % height_to - wide_y, 0), height - 1)
    z = tl.minimum(tl.maximum(line % depth_to - wide_z, 0), depth - 1)
    source = ((line // depth_to * depth + z) * height + y) * length
    to = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = to < length_to * CHANNELS
    voxel = tl.minimum(tl.maximum(to // CHANNELS - wide_x, 0), length - 1)
    value = tl.load(x + (source + voxel) * CHANNELS + to % CHANNELS, mask=inside)
    tl.store(padded + row * length_to * CHANNELS + to, value, mask=inside)


@triton.jit
def _place(i, of, low, ALIGNED: tl.constexpr):
    """Where voxel i of so many lies among `low` voxels: the one before it, the next, and how far between."""
    if ALIGNED:
        at = i.to(tl.float32) * ((low - 1).to(tl.float32) / tl.maximum(of - 1, 1).to(tl.float32))
    else:
        at = (i.to(tl.float32) + 0.5) * (low.to(tl.float32) / of.to(tl.float32)) - 0.5
        at = tl.maximum(at, 0.0)
    before = tl.minimum(at.to(tl.int32), low - 1)
    return before, tl.minimum(before + 1, low - 1), at - before.to(tl.float32)


@triton.jit
def _interpolated(
    low, sample, z, y, x, channel, inside, depth, height, length, depth_l, height_l, length_l,
    CHANNELS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    z0, z1, fz = _place(z, depth, depth_l, ALIGNED)
    y0, y1, fy = _place(y, height, height_l, ALIGNED)
    x0, x1, fx = _place(x, length, length_l, ALIGNED)
    low += sample.to(tl.int64) * depth_l * height_l * length_l * CHANNELS + channel
    r00, r01 = (z0 * height_l + y0) * length_l, (z0 * height_l + y1) * length_l
    r10, r11 = (z1 * height_l + y0) * length_l, (z1 * height_l + y1) * length_l
    v000 = tl.load(low + (r00 + x0) * CHANNELS, mask=inside, other=0.0).to(tl.float32)
    v001 = tl.load(low + (r00 + x1) * CHANNELS, mask=inside, other=0.0).to(tl.float32)
    v010 = tl.load(low + (r01 + x0) * CHANNELS, mask=inside, other=0.0).to(tl.float32)
    v011 = tl.load(low + (r01 + x1) * CHANNELS, mask=inside, other=0.0).to(tl.float32)
    v100 = tl.load(low + (r10 + x0) * CHANNELS, mask=inside, other=0.0).to(tl.float32)
    v101 = tl.load(low + (r10 + x1) * CHANNELS, mask=inside, other=0.0).to(tl.float32)
    v110 = tl.load(low + (r11 + x0) * CHANNELS, mask=inside, other=0.0).to(tl.float32)
    v111 = tl.load(low + (r11 + x1) * CHANNELS, mask=inside, other=0.0).to(tl.float32)
    near = (v000 * (1 - fx) + v001 * fx) * (1 - fy) + (v010 * (1 - fx) + v011 * fx) * fy
    far = (v100 * (1 - fx) + v101 * fx) * (1 - fy) + (v110 * (1 - fx) + v111 * fx) * fy
    return near * (1 - fz) + far * fz


@triton.jit(do_not_specialize=_SIZES)
def upsample_add(
    base, first, second, result, depth, height, length, depth_1, height_1, length_1,
    depth_2, height_2, length_2,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, TWO: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Fill a stretch of a line with base and what lies between the voxels of the others."""
    row = tl.program_id(0)
    y, z, sample = row % height, row // height % depth, row // height // depth
    to = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = to < length * CHANNELS
    x, channel = to // CHANNELS, to % CHANNELS
    at = row.to(tl.int64) * length * CHANNELS + to
    u = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
    u += _interpolated(
        first, sample, z, y, x, channel, inside, depth, height, length, depth_1, height_1, length_1,
        CHANNELS, ALIGNED,
    )  # fmt: skip
    if TWO:
        u += _interpolated(
            second, sample, z, y, x, channel, inside, depth, height, length, depth_2, height_2, length_2,
            CHANNELS, ALIGNED,
        )  # fmt: skip
    tl.store(result + at, u.to(result.dtype.element_ty), mask=inside)
