"""Triton device functions of the activations: value and derivative, one table row each.

Everything works on float32 tiles in registers. The forms hold in the interpreter, in PTX and on AMD alike (no
libdevice), stay finite where the function is, and pass NaN as torch does: a ReLU written with `tl.maximum` or
with `tl.where(s > 0, s, 0)` would turn NaN into 0, so comparisons ask for what is to be changed. Values go to the
function's limit at infinity.

Floor 0, imported only where a kernel is launched: importing this module imports triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Row(NamedTuple):
    """The device functions of one activation; names and constants as in `reference.ACTIVATIONS`.

    Attributes:
        value: ``(s, weight, A, B) -> y``; A and B are the activation's constants, compile-time values.
        gradient: ``(grad, s, weight, A, B) -> grad_s``.
    """

    value: Any
    gradient: Any


@triton.jit
def identity(s, weight, A: tl.constexpr, B: tl.constexpr):
    return s


@triton.jit
def identity_gradient(grad, s, weight, A: tl.constexpr, B: tl.constexpr):
    return grad


@triton.jit
def not_below_float32(s):
    """s with -inf replaced by the smallest float32; times a gate that is zero there, -inf would give NaN, not zero."""
    return tl.maximum(s, -3.4028234663852886e38, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu(s, weight, A: tl.constexpr, B: tl.constexpr):
    return tl.where(s < 0, 0.0, s)


@triton.jit
def relu_gradient(grad, s, weight, A: tl.constexpr, B: tl.constexpr):
    return tl.where(s <= 0, 0.0, grad)


@triton.jit
def relu6(s, weight, A: tl.constexpr, B: tl.constexpr):
    return tl.where(s < 0, 0.0, tl.where(s > 6, 6.0, s))


@triton.jit
def relu6_gradient(grad, s, weight, A: tl.constexpr, B: tl.constexpr):
    return tl.where((s <= 0) | (s >= 6), 0.0, grad)


@triton.jit
def leaky_relu(s, weight, A: tl.constexpr, B: tl.constexpr):
    return tl.where(s > 0, s, s * A)


@triton.jit
def leaky_relu_gradient(grad, s, weight, A: tl.constexpr, B: tl.constexpr):
    return tl.where(s > 0, grad, grad * A)


@triton.jit
def prelu(s, weight, A: tl.constexpr, B: tl.constexpr):
    return tl.where(s > 0, s, s * weight)


@triton.jit
def prelu_gradient(grad, s, weight, A: tl.constexpr, B: tl.constexpr):
    return tl.where(s > 0, grad, grad * weight)


@triton.jit
def elu(s, weight, A: tl.constexpr, B: tl.constexpr):
    # expm1 by its series near 0, where exp(s) - 1 would cancel; at -0.3 both are within 3e-7 of it, relatively.
    series = s * (1 + s * (1 / 2 + s * (1 / 6 + s * (1 / 24 + s * (1 / 120 + s * (1 / 720))))))
    return tl.where(s > 0, s, A * tl.where(s > -0.3, series, tl.exp(s) - 1))


@triton.jit
def elu_gradient(grad, s, weight, A: tl.constexpr, B: tl.constexpr):
    # d/ds A (exp(s) - 1) = A exp(s)
    return tl.where(s <= 0, grad * (A * tl.exp(s)), grad)


@triton.jit
def normal_cdf(s):
    """Phi(s), to 4e-8 in float32: Phi(-|s|) = exp2 of a polynomial in |s|, fitted over [0, 7] and falling beyond.

    erf costs 31 instructions on sm_90, more than memory waits for in half precision; this costs 17, and where s is
    negative it keeps the digits that 1 + erf(s) cancels. The polynomial minimises the largest error of Phi itself.
    """
    a = tl.abs(s)
    high = -0.0002578826618507208 + a * (
        6.894016372270752e-05 + a * (-9.44159122927943e-06 + a * (6.932640813169368e-07 + a * -2.1475282645267035e-08))
    )
    middle = -0.4592131725696103 + a * (
        -0.05246628451980088 + a * (0.006987928407173312 + a * (-3.845423516660303e-05 + a * high))
    )
    tail = tl.exp2(-0.9999999863480574 + a * (-1.151105072814765 + a * middle))
    return tl.where(s < 0, tail, 1 - tail)


@triton.jit
def gelu(s, weight, A: tl.constexpr, B: tl.constexpr):
    s = not_below_float32(s)
    return s * normal_cdf(s)


@triton.jit
def gelu_gradient(grad, s, weight, A: tl.constexpr, B: tl.constexpr):
    # d/ds s Phi(s) = Phi(s) + s phi(s),   phi(s) = exp(-s^2 / 2) / sqrt(2 pi)
    return grad * (normal_cdf(s) + s * (0.3989422804014327 * tl.exp(-0.5 * s * s)))


@triton.jit
def gelu_tanh(s, weight, A: tl.constexpr, B: tl.constexpr):
    s = not_below_float32(s)
    # (1 + tanh z) / 2 = sigmoid(2 z),   2 z = 2 sqrt(2 / pi) (s + 0.044715 s^3)
    return s * tl.sigmoid(s * (1.5957691216057308 + 0.07135481282553487 * s * s))


@triton.jit
def gelu_tanh_gradient(grad, s, weight, A: tl.constexpr, B: tl.constexpr):
    # d/ds s sigmoid(v) = sigmoid(v) + s v' sigmoid(v) (1 - sigmoid(v)),   v = 2 z as above
    s = tl.clamp(s, -100.0, 100.0, propagate_nan=tl.PropagateNan.ALL)  # beyond, infinity times zero
    square = s * s
    gate = tl.sigmoid(s * (1.5957691216057308 + 0.07135481282553487 * square))
    return grad * (gate + s * (1.5957691216057308 + 0.2140644384766046 * square) * (gate * (1 - gate)))


@triton.jit
def silu(s, weight, A: tl.constexpr, B: tl.constexpr):
    s = not_below_float32(s)
    return s * tl.sigmoid(s)


@triton.jit
def silu_gradient(grad, s, weight, A: tl.constexpr, B: tl.constexpr):
    # d/ds s sigmoid(s) = sigmoid(s) (1 + s (1 - sigmoid(s)))
    gate = tl.sigmoid(s)
    return grad * (gate * (1 + s * (1 - gate)))


@triton.jit
def hardswish(s, weight, A: tl.constexpr, B: tl.constexpr):
    s = not_below_float32(s)
    return s * tl.minimum(tl.maximum(s + 3, 0.0), 6.0) * (1 / 6)


@triton.jit
def hardswish_gradient(grad, s, weight, A: tl.constexpr, B: tl.constexpr):
    # d/ds s (s + 3) / 6 = s / 3 + 1 / 2 between -3 and 3
    return tl.where(s <= -3, 0.0, tl.where(s < 3, grad * (s * (1 / 3) + 0.5), grad))


@triton.jit
def mish(s, weight, A: tl.constexpr, B: tl.constexpr):
    s = not_below_float32(s)
    # tanh(log(1 + e)) = n / (n + 2),   e = exp(s), n = e (e + 2); it is 1 in float32 from s = 9 on
    e = tl.exp(tl.where(s > 20, 20.0, s))
    n = e * (e + 2)
    return s * (n / (n + 2))


@triton.jit
def mish_gradient(grad, s, weight, A: tl.constexpr, B: tl.constexpr):
    # d/ds s t = t + s (1 - t^2) sigmoid(s),   t = n / (n + 2),   1 - t^2 = 4 (1 + e)^2 / (n + 2)^2
    clamped = tl.where(s > 20, 20.0, s)
    e = tl.exp(clamped)
    n = e * (e + 2)
    inverse = 1 / (n + 2)
    return grad * (n * inverse + clamped * (4 * e * (1 + e) * inverse) * inverse)


@triton.jit
def log1p_to_one(e):
    """log(1 + e) for e in [0, 1], within 2e-7 of it relatively: a minimax polynomial, half the cost of `tl.log`."""
    high = 0.19106007523142032 + e * (
        -0.13663246278291655 + e * (0.07822594736576569 + e * (-0.02950523091723868 + e * 0.0052326912238453704))
    )
    low = -0.49999493149215485 + e * (0.33319096898279565 + e * (-0.2484298260574686 + e * high))
    return e * (0.9999999698819193 + e * low)


@triton.jit
def softplus(s, weight, A: tl.constexpr, B: tl.constexpr):
    # log(1 + exp(z)) = max(z, 0) + log1p(exp(-|z|)),   z = A s
    z = s * A
    return tl.where(z > B, s, (tl.maximum(z, 0.0) + log1p_to_one(tl.exp(-tl.abs(z)))) * (1 / A))


@triton.jit
def softplus_gradient(grad, s, weight, A: tl.constexpr, B: tl.constexpr):
    # d/ds log(1 + exp(A s)) / A = sigmoid(A s)
    return tl.where(s * A > B, grad, grad * tl.sigmoid(s * A))


@triton.jit
def psilu(s, weight, A: tl.constexpr, B: tl.constexpr):
    s = not_below_float32(s)
    return s * tl.sigmoid(s * weight)


@triton.jit
def psilu_gradient(grad, s, weight, A: tl.constexpr, B: tl.constexpr):
    # d/ds s sigmoid(w s) = sigmoid(w s) (1 + w s (1 - sigmoid(w s)))
    gate = tl.sigmoid(s * weight)
    return grad * (gate * (1 + s * weight * (1 - gate)))


@triton.jit
def pssilu(s, weight, A: tl.constexpr, B: tl.constexpr):
    return s * (tl.sigmoid(s * weight) - A) * (1 / (1 - A))


@triton.jit
def pssilu_gradient(grad, s, weight, A: tl.constexpr, B: tl.constexpr):
    # d/ds s (g - A) / (1 - A) = (g - A + w s g (1 - g)) / (1 - A),   g = sigmoid(w s)
    gate = tl.sigmoid(s * weight)
    return grad * (gate - A + s * weight * gate * (1 - gate)) * (1 / (1 - A))


ACTIVATIONS: dict[str, Row] = {
    "identity": Row(identity, identity_gradient),
    "relu": Row(relu, relu_gradient),
    "relu6": Row(relu6, relu6_gradient),
    "leaky_relu": Row(leaky_relu, leaky_relu_gradient),
    "prelu": Row(prelu, prelu_gradient),
    "elu": Row(elu, elu_gradient),
    "gelu": Row(gelu, gelu_gradient),
    "gelu_tanh": Row(gelu_tanh, gelu_tanh_gradient),
    "silu": Row(silu, silu_gradient),
    "swish": Row(silu, silu_gradient),
    "hardswish": Row(hardswish, hardswish_gradient),
    "mish": Row(mish, mish_gradient),
    "softplus": Row(softplus, softplus_gradient),
    "psilu": Row(psilu, psilu_gradient),
    "pssilu": Row(pssilu, pssilu_gradient),
}


def compile_time_constants(constants: Sequence[float]) -> dict[str, float]:
    """Return an activation's constants as the kernels' A and B."""
    first, second = (*map(float, constants), 0.0, 0.0)[:2]
    return {"A": first, "B": second}


def weight_stride(weight: Tensor | None) -> int:
    """Return 1 for a slope per channel, 0 for one that all channels share."""
    return 0 if weight is None or weight.numel() == 1 else 1
