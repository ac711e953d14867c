"""The kernels of MMD as functions of u = d²/base, or of the product where the kernel is polynomial: value and slope."""

import triton
import triton.language as tl

NAMES = ("imq_pairs", "imq", "rbf", "rational_quadratic", "laplacian", "energy", "polynomial")
KINDS = {name: i for i, name in enumerate(NAMES)}  # a polynomial of degree p is POLYNOMIAL + p − 1
IMQ_PAIRS, IMQ, RBF, RATIONAL_QUADRATIC, LAPLACIAN, ENERGY, POLYNOMIAL = map(tl.constexpr, KINDS.values())


@triton.jit
def _reciprocal(x, PTX: tl.constexpr):
    """1/x for normal x, inf or NaN: one special-function instruction where the machine has it inline."""
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def _horner(x, parameters, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Σ parameters[FIRST + i] xⁱ, i < COUNT."""
    total = parameters[FIRST + COUNT - 1]
    for i in tl.static_range(1, COUNT):
        total = total * x + parameters[FIRST + COUNT - 1 - i]
    return total


@triton.jit
def _add_group(k, w, v, parameters, FIRST: tl.constexpr, SIZE: tl.constexpr, PTX: tl.constexpr):
    """IMQ's k and w with the terms of a group, whose polynomials are from FIRST on: Π t, Σ Π' t and Σ a Π' t², where
    Π' leaves the term itself out."""
    s = v * _reciprocal(_horner(v, parameters, FIRST, SIZE + 1), PTX)
    k += s * _horner(v, parameters, FIRST + SIZE + 1, SIZE)
    w += s * s * _horner(v, parameters, FIRST + 2 * SIZE + 1, 2 * SIZE - 1)
    return k, w


@triton.jit
def _exponential(before, r, rate, SQUARINGS: tl.constexpr):
    """2^(−rate·r), where so many SQUARINGS are made of the one before."""
    if SQUARINGS == 0:
        e = tl.exp2(-rate * r)
    else:
        e = before * before
        for _ in tl.static_range(SQUARINGS - 1):
            e *= e
    return e


@triton.jit
def _power(x, alpha, PTX: tl.constexpr):
    """(1 + x)^−α for x ≥ 0 and `alpha` = α/ln 2, and 1/(1 + x); inf and NaN give NaN. A large α multiplies what the
    logarithm is off by: right to its last digit it has to be, for the least x too."""
    t = 1.0 + x
    shrink = _reciprocal(t, PTX)
    # t = 2ⁿ (1 + f), f from −1/3 to 1/3. What rounding took from t, x − (t − 1), belongs to its logarithm.
    bits = t.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    n = (exponent + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0  # the exponent, as a number
    p = 0.14026251 * f - 0.15388555
    p = p * f + 0.13995828
    p = p * f - 0.16415957
    p = p * f + 0.20011167
    p = p * f - 0.25007820
    p = p * f + 0.33333197
    p = p * f - 0.49999937
    log = n * 0.69314718 + ((x - (t - 1.0)) * shrink + (p * (f * f) + f))
    return tl.exp2(-alpha * log), shrink


@triton.jit
def _evaluate(u, parameters, KIND: tl.constexpr, FORM: tl.constexpr, PTX: tl.constexpr):
    """k and w = −dk/du for u = d²/base ≥ 0, of IMQ for 1 + u; inf gives 0 and 0, NaN gives NaN. `mmd_units.in_units`
    makes parameters and FORM, which says how the terms of a sum hang together."""
    if KIND == IMQ_PAIRS:
        # v = 1/(1 + u), z = v − v²:  k = v + Σ (2v + bz)/(1 + bz),  w = v² (1 + 2R + (1 − 4z) S),
        # R = Σ 1/(1 + bz), S = Σ b/(1 + bz)², all over their common denominator: polynomials in z.
        v = _reciprocal(u, PTX)
        y = 1.0 - v
        z = v * y
        s = v * _reciprocal(_horner(z, parameters, 0, 4), PTX)
        k = v + s * (_horner(z, parameters, 4, 3) + y * _horner(z, parameters, 7, 3))
        w = (s * s) * _horner(z, parameters, 10, 7)
    elif KIND == IMQ:
        # Of the least scale v = 1/(1 + u); of another, with a < 1, v/t, t = a + (1 − a)v, where nothing overflows. The
        # terms of a group have a common denominator: polynomials in v, none of whose coefficients is below zero.
        v = _reciprocal(u, PTX)
        k = v
        w = v * v
        for group in tl.static_range(len(FORM) - 1):
            k, w = _add_group(k, w, v, parameters, 4 * FORM[group], FORM[group + 1] - FORM[group], PTX)
    elif KIND == RATIONAL_QUADRATIC:
        # With u = d²/2ℓ²: Σ t^−α and Σ t^−(α+1), t = 1 + u/α; the α/ln 2 come first, then the 1/α.
        k = tl.zeros_like(u)
        w = tl.zeros_like(u)
        count: tl.constexpr = len(parameters) // 2
        for s in tl.static_range(count):
            e, shrink = _power(parameters[count + s] * u, parameters[s], PTX)
            k += e
            w += e * shrink
        dead = u == float("inf")
        k = tl.where(dead, 0.0, k)
        w = tl.where(dead, 0.0, w)
    elif KIND < POLYNOMIAL:
        r = tl.sqrt(u) if KIND != RBF else u
        # Of r = √u, whose slope 1/2r is taken for 0 at r = 0.
        half = tl.where(r == 0.0, 0.0, 0.5 * _reciprocal(r, PTX)) if KIND != RBF else 1.0
        if KIND == ENERGY:
            k = tl.where(u == float("inf"), 0.0, -r)
            w = half
        else:
            k = tl.zeros_like(u)
            w = tl.zeros_like(u)
            e = k
            for s in tl.static_range(len(parameters)):
                e = _exponential(e, r, parameters[s], FORM[s])
                k += e
                w += parameters[s] * e
            if KIND == LAPLACIAN:
                w *= half
    else:
        dead = u == float("inf")
        power = tl.where(dead, 0.0, 1.0)
        for _ in tl.static_range(KIND - POLYNOMIAL):
            power *= u
        k = tl.where(dead, 0.0, power * u)
        w = tl.where(dead, 0.0, power * (KIND - POLYNOMIAL + 1))
    return k, w


@triton.jit
def _slope(u, parameters, KIND: tl.constexpr, FORM: tl.constexpr, PTX: tl.constexpr):
    """w alone. Of WAE's scales so that no step of it is one of `_evaluate`'s: in branches beside each other a compiler
    would take what they share out of them, and keep it in registers that are not there."""
    if KIND == IMQ_PAIRS:
        v = _reciprocal(u, PTX)
        z = v - v * v
        s = v * _reciprocal(_horner(z, parameters, 0, 4), PTX)
        w = (s * s) * _horner(z, parameters, 10, 7)
    else:
        _, w = _evaluate(u, parameters, KIND, FORM, PTX)
    return w
