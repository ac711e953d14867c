"""The numbers that the MMD kernels are given for a kernel's parameters: in units of its base, terms put together."""

import functools
import itertools
import math
from collections.abc import Iterable, Sequence

GROUP = 4  # IMQ terms that share a reciprocal
LEAST_PRODUCT = 1e-9


@functools.lru_cache(maxsize=256)
def in_units(
    kind: str, parameters: tuple[float, ...], pairs: tuple[float, float, float, float] | None, second: bool = False
) -> tuple[str, float, tuple[float, ...], tuple[int, ...], float]:
    """Kernel, base, parameters in units of u = d²/base, how their terms hang together (FORM), and what the kernel's
    slope still has to be multiplied by; `second` for the Hessian too."""
    if kind == "imq" and pairs is not None:
        return "imq_pairs", pairs[0], _of_pairs(pairs[1:]), (), 1.0
    if kind == "rational_quadratic":
        lengthscale, *alphas = parameters
        return kind, 2 * lengthscale**2, (*(a / math.log(2) for a in alphas), *(1 / a for a in alphas)), (), 1.0
    if kind == "energy":
        return kind, 1.0, (0.0,), (), 1.0
    if kind == "polynomial":  # of the product of points times √γ; a square's own derivative is not there to double
        return kind, 1 / parameters[1], (float(parameters[2]),), (), 0.5
    ordered = sorted(parameters)
    if kind == "imq":
        return "imq", ordered[0], *_of_groups([ordered[0] / c for c in ordered[1:]], second), 1.0
    middle = ordered[len(ordered) // 2]
    rate = math.log(2) / middle
    rates = tuple(g / middle for g in ordered)
    return kind, rate if kind == "rbf" else rate**2, rates, squarings(ordered), math.log(2)


def _product_of(factors: Iterable[Sequence[float]]) -> list[float]:
    """A product of polynomials, each by its coefficients from the constant on."""
    product = [1.0]
    for factor in factors:
        found = [0.0] * (len(product) + len(factor) - 1)
        for i, a in enumerate(product):
            for j, b in enumerate(factor):
                found[i + j] += a * b
        product = found
    return product


def _sum_of(scale: Sequence[float], factors: Sequence[Sequence[float]], power: int) -> list[float]:
    """Σ_i scale_i Π_{j≠i} factor_j^power."""
    others = [_product_of([f for j, f in enumerate(factors) if j != i] * power) for i in range(len(factors))]
    return [sum(s * c for s, c in zip(scale, column, strict=True)) for column in zip(*others, strict=True)]


def _of_pairs(b: Sequence[float]) -> tuple[float, ...]:
    """With q_b = 1 + bz: q = Π q_b, 2 Σ Π' q, Σ b Π' q and q² + 2q Σ Π' q + (1 − 4z) Σ b Π' q², as polynomials in z."""
    q = [(1.0, each) for each in b]
    whole, twice, rest = _product_of(q), _sum_of([2.0] * len(q), q, 1), _sum_of(b, q, 1)
    parts = [_product_of(p) for p in ((whole, whole), (whole, twice), (_sum_of(b, q, 2), (1.0, -4.0)))]
    return (*whole, *twice, *rest, *(sum(c) for c in itertools.zip_longest(*parts, fillvalue=0.0)))


def _of_groups(a: Sequence[float], second: bool) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The polynomials of groups of IMQ terms, each a list; and the place in `a` where each group begins, and the end.
    Of `GROUP` terms at most, and of a product whose cube still is a number in float32."""
    groups: list[list[float]] = []
    largest = -(-len(a) // -(-len(a) // GROUP)) if a else 0  # 3 + 3 before 4 + 2
    for each in a:
        if groups and len(groups[-1]) < largest and math.prod(groups[-1]) * each > LEAST_PRODUCT:
            groups[-1].append(each)
        else:
            groups.append([each])
    found: list[float] = []
    bends: list[float] = []
    for group in groups:
        t = [(each, 1 - each) for each in group]
        found += [*_product_of(t), *_sum_of([1.0] * len(t), t, 1), *_sum_of(group, t, 2)]
        bends += _sum_of([2 * each**2 for each in group], t, 3)
    ends = (0, *itertools.accumulate(len(group) for group in groups))
    return (*found, *bends * second), ends


def squarings(rates: Sequence[float]) -> tuple[int, ...]:
    """How often each exponential is that of the rate before squared, 0 where it is made anew: twice in a row at most,
    since each squaring doubles the relative error."""
    found: list[int] = []
    row = 0
    for before, rate in zip((math.inf, *rates), rates, strict=False):
        steps = next((s for s in (1, 2) if math.isclose(rate, before * 2**s, rel_tol=1e-12)), 0)
        row = row + steps if steps and row + steps <= 2 else 0
        found.append(steps if row else 0)
    return tuple(found)
