"""The operator's two kernels, forward and backward, for every activation, layout, variant and fusion.

    norm(x) = (x - mean[c]) / sqrt(variance[c] + eps) * weight[c] + bias[c]
    v = input_norm(x) * layer_scale[c] + residual
    u = sum_norm(v)
    y = act(s(u)) + shortcut

Each factor is off unless given (a None pointer is a compile-time constant). The backward kernel recomputes u and s from
x: it reads x and the output's gradient and writes the input's gradient, nothing else is kept. Of the shortcut it knows
nothing: that one's gradient is y's. A tensor is vectors of V elements (`layout`), of which a program takes VECTORS; the
elements beyond the last whole vector go to the first program.

Floor 0, imported only where a kernel is launched: importing this module imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import (
    affine,
    channel_index,
    load_channel,
    norm_scale,
    norm_shift,
    part_of_tensor,
    place_in_slabs,
    sparsify,
    sparsify_gradient,
)

# Sizes stay unspecialised: a new shape compiles nothing.
_SIZES = [
    "vectors", "tail", "period", "period_multiplier", "period_shift", "inner", "inner_multiplier", "inner_shift",
    "slab", "slab_multiplier", "slab_shift", "outer_stride", "steepness", "gate_steepness", "input_eps", "sum_eps",
]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    x_ptr, y_ptr, sum_ptr, residual_ptr, shortcut_ptr,  # n elements, x perhaps in slabs
    centre_ptr, threshold_ptr, weight_ptr,  # [C], as what follows
    input_mean_ptr, input_variance_ptr, input_weight_ptr, input_bias_ptr, layer_scale_ptr,
    sum_mean_ptr, sum_variance_ptr, sum_weight_ptr, sum_bias_ptr,
    vectors, tail, period, period_multiplier, period_shift, inner, inner_multiplier, inner_shift,
    slab, slab_multiplier, slab_shift, outer_stride, steepness, input_eps, sum_eps,
    ACTIVATION: tl.constexpr, A: tl.constexpr, B: tl.constexpr, WEIGHT_STRIDE: tl.constexpr, VARIANT: tl.constexpr,
    CHANNELS: tl.constexpr, STRIDED: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr,
    V: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """y = act(s(u)) + shortcut, and v where ``sum_ptr`` is given."""
    for part in tl.static_range(2 if TAIL else 1):
        vec, lane, mask = part_of_tensor(vectors, tail, part, V, VECTORS)
        channel = channel_index(
            vec, lane, period, period_multiplier, period_shift, inner, inner_multiplier, inner_shift, CHANNELS, WIDE, V
        )
        x_offsets, offsets = place_in_slabs(
            vec, lane, slab, slab_multiplier, slab_shift, outer_stride, STRIDED, WIDE, V
        )
        x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0)
        centre = load_channel(centre_ptr, channel, CHANNELS)
        threshold = load_channel(threshold_ptr, channel, CHANNELS)
        weight = load_channel(weight_ptr, channel, CHANNELS, WEIGHT_STRIDE)
        input_scale = norm_scale(input_variance_ptr, input_weight_ptr, input_eps, channel, CHANNELS)
        input_shift = norm_shift(
            input_mean_ptr, input_variance_ptr, input_weight_ptr, input_bias_ptr, input_eps, channel, CHANNELS
        )
        v = affine(x.to(tl.float32), input_scale, input_shift)
        v = affine(v, load_channel(layer_scale_ptr, channel, CHANNELS), None)
        if residual_ptr is not None:
            v += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if sum_ptr is not None:
            # The caller sees v in its own dtype, so y is the function of exactly that.
            rounded = v.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + offsets, rounded, mask=mask)
            v = rounded.to(tl.float32)
        sum_scale = norm_scale(sum_variance_ptr, sum_weight_ptr, sum_eps, channel, CHANNELS)
        sum_shift = norm_shift(sum_mean_ptr, sum_variance_ptr, sum_weight_ptr, sum_bias_ptr, sum_eps, channel, CHANNELS)
        u = affine(v, sum_scale, sum_shift)
        s = sparsify(u, centre, threshold, steepness, VARIANT)
        y = ACTIVATION(s, s, weight, A, B)[0]  # and of the gradient, that of anything, the compiler leaves nothing
        if shortcut_ptr is not None:
            y += tl.load(shortcut_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def backward_kernel(
    x_ptr, grad_x_ptr, grad_v_ptr, grad_ptr, grad_sum_ptr, residual_ptr,  # n elements, x perhaps in slabs
    centre_ptr, threshold_ptr, weight_ptr,  # [C], as what follows
    input_mean_ptr, input_variance_ptr, input_weight_ptr, input_bias_ptr, layer_scale_ptr,
    sum_mean_ptr, sum_variance_ptr, sum_weight_ptr, sum_bias_ptr,
    vectors, tail, period, period_multiplier, period_shift, inner, inner_multiplier, inner_shift,
    slab, slab_multiplier, slab_shift, outer_stride, steepness, gate_steepness, input_eps, sum_eps,
    ACTIVATION: tl.constexpr, A: tl.constexpr, B: tl.constexpr, WEIGHT_STRIDE: tl.constexpr, VARIANT: tl.constexpr,
    BACKWARD: tl.constexpr, FROM_SUM: tl.constexpr,
    CHANNELS: tl.constexpr, STRIDED: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr,
    V: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """grad_v = grad_y * act'(s(u)) * s'(u) * sum_norm' + grad_sum,   grad_x = grad_v * layer_scale * input_norm'."""
    for part in tl.static_range(2 if TAIL else 1):
        vec, lane, mask = part_of_tensor(vectors, tail, part, V, VECTORS)
        channel = channel_index(
            vec, lane, period, period_multiplier, period_shift, inner, inner_multiplier, inner_shift, CHANNELS, WIDE, V
        )
        x_offsets, offsets = place_in_slabs(
            vec, lane, slab, slab_multiplier, slab_shift, outer_stride, STRIDED, WIDE, V
        )
        x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0)
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        centre = load_channel(centre_ptr, channel, CHANNELS)
        threshold = load_channel(threshold_ptr, channel, CHANNELS)
        weight = load_channel(weight_ptr, channel, CHANNELS, WEIGHT_STRIDE)
        input_scale = norm_scale(input_variance_ptr, input_weight_ptr, input_eps, channel, CHANNELS)
        input_shift = norm_shift(
            input_mean_ptr, input_variance_ptr, input_weight_ptr, input_bias_ptr, input_eps, channel, CHANNELS
        )
        layer_scale = load_channel(layer_scale_ptr, channel, CHANNELS)
        v = x.to(tl.float32)
        if not FROM_SUM:
            v = affine(affine(v, input_scale, input_shift), layer_scale, None)
            if residual_ptr is not None:
                v += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        sum_scale = norm_scale(sum_variance_ptr, sum_weight_ptr, sum_eps, channel, CHANNELS)
        sum_shift = norm_shift(sum_mean_ptr, sum_variance_ptr, sum_weight_ptr, sum_bias_ptr, sum_eps, channel, CHANNELS)
        u = affine(v, sum_scale, sum_shift)
        s = u  # exact, and not the smooth variant: s differs from u only where the gradient is zero
        if BACKWARD != "exact" or VARIANT == "smooth":
            s = sparsify(u, centre, threshold, steepness, VARIANT)
        grad_s = ACTIVATION(s, grad, weight, A, B)[1]
        grad_u = sparsify_gradient(grad_s, u, centre, threshold, gate_steepness, VARIANT, BACKWARD)
        grad_v = affine(grad_u, sum_scale, None)
        if grad_sum_ptr is not None:
            grad_v += tl.load(grad_sum_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if grad_v_ptr is not None:
            tl.store(grad_v_ptr + offsets, grad_v.to(grad_v_ptr.dtype.element_ty), mask=mask)
        grad_x = affine(affine(grad_v, layer_scale, None), input_scale, None)
        tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
