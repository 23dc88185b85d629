"""Triton device functions of the activations: ``(s, grad, weight, A, B) -> y, grad_s``, one function each.

A kernel takes the one of the two results that it wants, and the compiler drops the other. A and B are the activation's
constants, weight its learned slope or None. Everything works on float32 tiles in registers. The forms hold in the
interpreter, in PTX and on AMD alike (no libdevice), stay finite where the function is, and pass NaN as torch does: a
ReLU written with `tl.maximum` or with `tl.where(s > 0, s, 0)` would turn NaN into 0, so comparisons ask for what is to
be changed. Values go to the function's limit at infinity.

Floor 0, imported only where a kernel is launched: importing this module imports triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import reference


@triton.jit
def identity(s, grad, weight, A: tl.constexpr, B: tl.constexpr):
    return s, grad


@triton.jit
def not_below_float32(s):
    """s with -inf replaced by the smallest float32; times a gate that is zero there, -inf would give NaN, not zero."""
    return tl.maximum(s, -3.4028234663852886e38, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu(s, grad, weight, A: tl.constexpr, B: tl.constexpr):
    return tl.where(s < 0, 0.0, s), tl.where(s <= 0, 0.0, grad)


@triton.jit
def relu6(s, grad, weight, A: tl.constexpr, B: tl.constexpr):
    y = tl.where(s < 0, 0.0, tl.where(s > 6, 6.0, s))
    return y, tl.where((s <= 0) | (s >= 6), 0.0, grad)


@triton.jit
def leaky_relu(s, grad, weight, A: tl.constexpr, B: tl.constexpr):
    slope = A if weight is None else weight
    return tl.where(s > 0, s, s * slope), tl.where(s > 0, grad, grad * slope)


@triton.jit
def elu(s, grad, weight, A: tl.constexpr, B: tl.constexpr):
    # expm1 by its series near 0, where exp(s) - 1 would cancel; at -0.3 both are within 3e-7 of it, relatively.
    series = s * (1 + s * (1 / 2 + s * (1 / 6 + s * (1 / 24 + s * (1 / 120 + s * (1 / 720))))))
    y = tl.where(s > 0, s, A * tl.where(s > -0.3, series, tl.exp(s) - 1))
    # d/ds A (exp(s) - 1) = A exp(s)
    return y, tl.where(s <= 0, grad * (A * tl.exp(s)), grad)


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
def gelu(s, grad, weight, A: tl.constexpr, B: tl.constexpr):
    cdf = normal_cdf(s)
    # d/ds s Phi(s) = Phi(s) + s phi(s),   phi(s) = exp(-s^2 / 2) / sqrt(2 pi)
    return not_below_float32(s) * cdf, grad * (cdf + s * (0.3989422804014327 * tl.exp(-0.5 * s * s)))


@triton.jit
def gelu_tanh(s, grad, weight, A: tl.constexpr, B: tl.constexpr):
    finite = not_below_float32(s)
    # (1 + tanh z) / 2 = sigmoid(2 z),   2 z = 2 sqrt(2 / pi) (s + 0.044715 s^3)
    y = finite * tl.sigmoid(finite * (1.5957691216057308 + 0.07135481282553487 * finite * finite))
    # d/ds s sigmoid(v) = sigmoid(v) + s v' sigmoid(v) (1 - sigmoid(v)),   v = 2 z as above
    s = tl.clamp(s, -100.0, 100.0, propagate_nan=tl.PropagateNan.ALL)  # beyond, infinity times zero
    square = s * s
    gate = tl.sigmoid(s * (1.5957691216057308 + 0.07135481282553487 * square))
    return y, grad * (gate + s * (1.5957691216057308 + 0.2140644384766046 * square) * (gate * (1 - gate)))


@triton.jit
def silu(s, grad, weight, A: tl.constexpr, B: tl.constexpr):
    """Also with a learned slope w: y = s sigmoid(w s)."""
    v = s if weight is None else s * weight
    gate = tl.sigmoid(v)
    # d/ds s sigmoid(w s) = sigmoid(w s) (1 + w s (1 - sigmoid(w s)))
    return not_below_float32(s) * gate, grad * (gate * (1 + v * (1 - gate)))


@triton.jit
def pssilu(s, grad, weight, A: tl.constexpr, B: tl.constexpr):
    # d/ds s (g - A) / (1 - A) = (g - A + w s g (1 - g)) / (1 - A),   g = sigmoid(w s)
    gate = tl.sigmoid(s * weight)
    y = s * (gate - A) * (1 / (1 - A))
    return y, grad * (gate - A + s * weight * gate * (1 - gate)) * (1 / (1 - A))


@triton.jit
def hardswish(s, grad, weight, A: tl.constexpr, B: tl.constexpr):
    finite = not_below_float32(s)
    y = finite * tl.minimum(tl.maximum(finite + 3, 0.0), 6.0) * (1 / 6)
    # d/ds s (s + 3) / 6 = s / 3 + 1 / 2 between -3 and 3
    return y, tl.where(s <= -3, 0.0, tl.where(s < 3, grad * (s * (1 / 3) + 0.5), grad))


@triton.jit
def mish(s, grad, weight, A: tl.constexpr, B: tl.constexpr):
    # tanh(log(1 + e)) = n / (n + 2),   e = exp(s), n = e (e + 2); it is 1 in float32 from s = 9 on
    clamped = tl.where(s > 20, 20.0, s)
    e = tl.exp(clamped)
    n = e * (e + 2)
    y = not_below_float32(s) * (n / (n + 2))
    # d/ds s t = t + s (1 - t^2) sigmoid(s),   t = n / (n + 2),   1 - t^2 = 4 (1 + e)^2 / (n + 2)^2
    inverse = 1 / (n + 2)
    return y, grad * (n * inverse + clamped * (4 * e * (1 + e) * inverse) * inverse)


@triton.jit
def log1p_to_one(e):
    """log(1 + e) for e in [0, 1], within 2e-7 of it relatively: a minimax polynomial, half the cost of `tl.log`."""
    high = 0.19106007523142032 + e * (
        -0.13663246278291655 + e * (0.07822594736576569 + e * (-0.02950523091723868 + e * 0.0052326912238453704))
    )
    low = -0.49999493149215485 + e * (0.33319096898279565 + e * (-0.2484298260574686 + e * high))
    return e * (0.9999999698819193 + e * low)


@triton.jit
def softplus(s, grad, weight, A: tl.constexpr, B: tl.constexpr):
    # log(1 + exp(z)) = max(z, 0) + log1p(exp(-|z|)),   z = A s
    z = s * A
    y = tl.where(z > B, s, (tl.maximum(z, 0.0) + log1p_to_one(tl.exp(-tl.abs(z)))) * (1 / A))
    # d/ds log(1 + exp(A s)) / A = sigmoid(A s)
    return y, tl.where(z > B, grad, grad * tl.sigmoid(z))


ACTIVATIONS: dict[str, Any] = {  # names and constants as in `reference.ACTIVATIONS`
    "identity": identity,
    "relu": relu,
    "relu6": relu6,
    "leaky_relu": leaky_relu,
    "prelu": leaky_relu,
    "elu": elu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": silu,
    "swish": silu,
    "hardswish": hardswish,
    "mish": mish,
    "softplus": softplus,
    "psilu": silu,
    "pssilu": pssilu,
}


def activation_constexprs(name: str, constants: Sequence[float], weight: Tensor | None) -> dict[str, Any]:
    """Return the compile-time arguments of an activation, in the order in which all kernels take them."""
    defaults = [default for _, default in reference.ACTIVATIONS[name].constants]
    first, second = (*map(float, constants), *defaults[len(constants) :], 0.0, 0.0)[:2]
    stride = 0 if weight is None or weight.numel() == 1 else 1  # of a slope that all channels share: 0
    return {"ACTIVATION": ACTIVATIONS[name], "A": first, "B": second, "WEIGHT_STRIDE": stride}
