"""Triton device functions of the operator: which elements a program has, their channels, s(u) and its derivative.

Floor 0, imported only where a kernel is launched: importing this module imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def divided(n, multiplier, shift):
    """n // d for 0 <= n < 2^31, with what `layout.divider` made of d: no division, and no size compiled in."""
    high = tl.umulhi(n.to(tl.uint32), multiplier.to(tl.uint32))
    return (high >> shift.to(tl.uint32)).to(tl.int32)


@triton.jit
def part_of_tensor(vectors, tail, PART: tl.constexpr, V: tl.constexpr, VECTORS: tl.constexpr):
    """Return indices of vectors ``[n, 1]`` and of lanes ``[1, V]``, and the mask: of the whole vectors or of the tail.

    Masked by vectors, which is how the compiler knows that 128-bit accesses are whole.
    """
    lane = tl.arange(0, V)[None, :]
    if PART == 0:
        vec = (tl.program_id(0) * VECTORS + tl.arange(0, VECTORS))[:, None]
        mask = vec < vectors
    else:
        vec = vectors + tl.arange(0, 1)[:, None]
        mask = (lane < tail) & (tl.program_id(0) == 0)
    return vec, lane, mask


@triton.jit
def channel_index(
    vec, lane, period, period_multiplier, period_shift, inner, inner_multiplier, inner_shift,
    CHANNELS: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Return the channel of each vector or element, the one after it, and which elements have that one (``pair``)."""
    crosses = lane >= V
    if CHANNELS == "one":
        channel = vec * 0
        following = channel
    elif CHANNELS == "vector" or CHANNELS == "columns":
        place = vec - divided(vec, period_multiplier, period_shift) * period
        channel = divided(place, inner_multiplier, inner_shift) if CHANNELS == "vector" else place * V + lane
        following = channel
    else:
        if WIDE:  # the offset of a vector reaches 2^31, its place in the period does not
            vec = vec - divided(vec, period_multiplier, period_shift) * period
        start = vec * V
        start = start - divided(start, period_multiplier, period_shift) * period
        if CHANNELS == "pair":
            channel = divided(start, inner_multiplier, inner_shift)
            end = (channel + 1) * inner
            crosses = lane >= end - start
            following = tl.where(end == period, 0, channel + 1)
        else:
            place = start + lane
            channel = place - divided(place, period_multiplier, period_shift) * period
            if CHANNELS == "each":
                channel = divided(channel, inner_multiplier, inner_shift)
            following = channel
    return channel, following, crosses


@triton.jit
def place_in_slabs(
    vec, lane, slab, slab_multiplier, slab_shift, outer_stride,
    STRIDED: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Return offsets into x and into dense tensors; as products with V, which proves alignment to the compiler."""
    x_vec = vec
    if STRIDED:
        outer = divided(vec, slab_multiplier, slab_shift)
        x_vec = vec - outer * slab
        if WIDE:
            outer = outer.to(tl.int64)
        x_vec += outer * outer_stride
    if WIDE:
        vec, x_vec = vec.to(tl.int64), x_vec.to(tl.int64)
    return x_vec * V + lane, vec * V + lane


@triton.jit
def load_channel(ptr, index, CHANNELS: tl.constexpr, STRIDE: tl.constexpr = 1):
    """A per-channel vector in float32, broadcastable against the elements; None where its pointer is."""
    value = None
    if ptr is not None:
        channel, following, crosses = index
        value = tl.load(ptr + channel * STRIDE).to(tl.float32)
        if CHANNELS == "pair":
            value = tl.where(crosses, tl.load(ptr + following * STRIDE).to(tl.float32), value)
    return value


@triton.jit
def scale_of_channel(variance_ptr, weight_ptr, eps, channel):
    scale = tl.rsqrt(tl.load(variance_ptr + channel).to(tl.float32) + eps)
    if weight_ptr is not None:
        scale = scale * tl.load(weight_ptr + channel).to(tl.float32)
    return scale


@triton.jit
def shift_of_channel(mean_ptr, variance_ptr, weight_ptr, bias_ptr, eps, channel):
    shift = -tl.load(mean_ptr + channel).to(tl.float32) * scale_of_channel(variance_ptr, weight_ptr, eps, channel)
    if bias_ptr is not None:
        shift = shift + tl.load(bias_ptr + channel).to(tl.float32)
    return shift


@triton.jit
def norm_scale(variance_ptr, weight_ptr, eps, index, CHANNELS: tl.constexpr):
    """A batch norm's scale, weight / sqrt(variance + eps) or, folded, the weight alone; None without a norm.

    Computed in every program: no copy of it can be out of date in a replayed graph, or on another stream.
    """
    scale = load_channel(weight_ptr, index, CHANNELS)
    if variance_ptr is not None:
        channel, following, crosses = index
        scale = scale_of_channel(variance_ptr, weight_ptr, eps, channel)
        if CHANNELS == "pair":
            scale = tl.where(crosses, scale_of_channel(variance_ptr, weight_ptr, eps, following), scale)
    return scale


@triton.jit
def norm_shift(mean_ptr, variance_ptr, weight_ptr, bias_ptr, eps, index, CHANNELS: tl.constexpr):
    """A batch norm's shift, bias - mean * scale or, folded, the bias alone; None without a norm."""
    shift = load_channel(bias_ptr, index, CHANNELS)
    if mean_ptr is not None:
        channel, following, crosses = index
        shift = shift_of_channel(mean_ptr, variance_ptr, weight_ptr, bias_ptr, eps, channel)
        if CHANNELS == "pair":
            other = shift_of_channel(mean_ptr, variance_ptr, weight_ptr, bias_ptr, eps, following)
            shift = tl.where(crosses, other, shift)
    return shift


@triton.jit
def affine(v, scale, shift):
    """v * scale + shift, each where it is there."""
    if scale is not None:
        v = v * scale
    if shift is not None:
        v = v + shift
    return v


@triton.jit
def sparsify(u, centre, threshold, steepness, VARIANT: tl.constexpr):
    """s = centre where |u - centre| <= threshold, else u; NaN and a negative threshold are never inside.

    Without a band (``none``) s is u.
    """
    distance = u - centre
    s = u
    if VARIANT == "mean":
        s = tl.where(tl.abs(distance) <= threshold, centre, u)
    elif VARIANT == "edge":
        edge = tl.where(distance < 0, centre - threshold, centre + threshold)
        s = tl.where(tl.abs(distance) <= threshold, edge, u)
    elif VARIANT == "smooth":
        _, gate = smooth_gate(distance, threshold, steepness)
        s = tl.where((threshold >= 0) & (tl.abs(distance) < float("inf")), centre + distance * gate, u)
    return s


@triton.jit
def smooth_gate(distance, threshold, steepness):
    """|d| / threshold and sigmoid(steepness * (|d| / threshold - 1)).

    Divides per channel, by no less than float32's smallest normal.
    """
    relative = tl.abs(distance) * (1.0 / tl.maximum(threshold, 1.1754943508222875e-38))
    return relative, tl.sigmoid(steepness * (relative - 1.0))


@triton.jit
def sparsify_gradient(grad, u, centre, threshold, steepness, VARIANT: tl.constexpr, BACKWARD: tl.constexpr):
    """grad * ds/du: zero inside the band (exact), one (identity), or that of the smooth gate (smooth)."""
    distance = u - centre
    grad_u = grad
    if BACKWARD == "smooth" or (BACKWARD == "exact" and VARIANT == "smooth"):
        # d/du [d * g] = g + |d| / threshold * steepness * g * (1 - g),   d = u - centre
        relative, gate = smooth_gate(distance, threshold, steepness)
        # Far out this is infinity times zero; its limit is zero.
        tail = tl.where(gate < 1.0, relative * steepness * gate * (1.0 - gate), 0.0)
        grad_u = tl.where((threshold >= 0) & (tl.abs(distance) < float("inf")), grad * (gate + tail), grad)
    elif BACKWARD == "exact":
        grad_u = tl.where(tl.abs(distance) <= threshold, 0.0, grad)
    return grad_u
