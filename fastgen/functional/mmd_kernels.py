"""The kernels of the maximum mean discrepancy, as users name them; positive parameters are from 1e-100 to 1e100, those
of one sum within a factor of 1e12."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastgen import check

APART = 1e12  # beyond, the points of the one scale are all equal or all out of reach in another's float32


def _scale(name: str, value: Any) -> float:
    # Products of three of them, and their inverses, are finite and above zero in float64.
    return check.number(name, value, above=0, least=1e-100, most=1e100)


def _set(kernel: Any, name: str, value: Any) -> None:
    """Numbers are kept as Python's: products of numpy's would be rounded to their own type."""
    object.__setattr__(kernel, name, value)


def _positive(kernel: Any, name: str) -> None:
    values = getattr(kernel, name)
    if isinstance(values, (str, Tensor)) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected a tuple of numbers, got {check.describe(values)}")
    if not values:
        raise ValueError(f"{name}: expected at least one number, got none")
    values = tuple(_scale(name, v) for v in values)  # a list could be changed, and has no hash
    if max(values) > APART * min(values):
        raise ValueError(f"{name}: expected numbers within a factor of {APART:g}, got {min(values)} and {max(values)}")
    _set(kernel, name, values)


def _bandwidths(given: tuple[float, ...] | None, d: int) -> Sequence[float]:
    return [d**0.5 * b for b in (0.25, 0.5, 1.0, 2.0, 4.0)] if given is None else given


@dataclass(frozen=True)
class IMQ:
    """Inverse multiquadrics k(x, y) = Σ_s s·base / (s·base + ‖x − y‖²), summed over `scales` and not averaged.

    Args:
        scales: positive; WAE's seven by default, which have a faster kernel of their own (as has every list of seven
            that is closed under s → 1/s, if none is below 1/64).
        base: positive, in units of squared distance; None means 2·D, the mean squared distance of two points of a
            standard normal.

    Source: Tolstikhin et al., Wasserstein Auto-Encoders (2018), section 4, and its code's seven scales.
    """

    scales: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    base: float | None = None

    def __post_init__(self) -> None:
        _positive(self, "scales")
        if self.base is not None:
            _set(self, "base", _scale("base", self.base))

    def _op(self, d: int) -> tuple[str, list[float]]:
        base = 2.0 * d if self.base is None else float(self.base)
        return "imq", [s * base for s in self.scales]


@dataclass(frozen=True)
class RBF:
    """Gaussian kernels k(x, y) = Σ_b exp(−‖x − y‖² / 2b²), summed over `bandwidths`.

    Args:
        bandwidths: positive, in units of distance; None means √D·(1/4, 1/2, 1, 2, 4), a factor-two ladder about the
            typical distance √(2D) of two points of a standard normal.

    Source: Gretton et al., A Kernel Two-Sample Test (2012); sums over a ladder after Li et al., Generative Moment
    Matching Networks (2015), section 3.
    """

    bandwidths: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.bandwidths is not None:
            _positive(self, "bandwidths")

    def _op(self, d: int) -> tuple[str, list[float]]:
        return "rbf", [0.5 / (b * b) for b in _bandwidths(self.bandwidths, d)]


@dataclass(frozen=True)
class Laplacian:
    """Exponentials of the distance k(x, y) = Σ_b exp(−‖x − y‖₂ / b), summed over `bandwidths`.

    Args:
        bandwidths: positive, in units of distance; None means √D·(1/4, 1/2, 1, 2, 4), as for `RBF`.

    The distance is Euclidean (an L1 Laplacian is another kernel). Where two points coincide k has no derivative and the
    zero subgradient is taken.

    Source: the exponential kernel of Sriperumbudur et al., Hilbert Space Embeddings and Metrics on Probability Measures
    (JMLR 2010), table 2; GeomLoss's "laplacian" with blur = b, which clamps small distances.
    """

    bandwidths: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.bandwidths is not None:
            _positive(self, "bandwidths")

    def _op(self, d: int) -> tuple[str, list[float]]:
        return "laplacian", [1 / b for b in _bandwidths(self.bandwidths, d)]


@dataclass(frozen=True)
class Energy:
    """The negative distance k(x, y) = −‖x − y‖₂: MMD² is then the energy distance 2 E‖x − y‖ − E‖x − x′‖ − E‖y − y′‖.

    Where two points coincide k has no derivative and the zero subgradient is taken.

    Source: Székely and Rizzo, Energy statistics (2013); Sejdinovic et al., Equivalence of distance-based and RKHS-based
    statistics (2013).
    """

    def _op(self, d: int) -> tuple[str, list[float]]:
        return "energy", []


@dataclass(frozen=True)
class RationalQuadratic:
    """k(x, y) = Σ_α (1 + ‖x − y‖² / (2α·lengthscale²))^−α, summed over `alphas`.

    Args:
        alphas: positive exponents up to 1e12, those of MMD GANs by default.
        lengthscale: positive, in units of distance.

    Source: Bińkowski et al., Demystifying MMD GANs (2018), section 4 and its `mix_rq_kernel` (lengthscale 1).
    """

    alphas: tuple[float, ...] = (0.2, 0.5, 1.0, 2.0, 5.0)
    lengthscale: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "alphas")
        for alpha in self.alphas:
            check.number("alphas", alpha, above=0, least=1 / APART, most=APART)
        _set(self, "lengthscale", _scale("lengthscale", self.lengthscale))

    def _op(self, d: int) -> tuple[str, list[float]]:
        return "rational_quadratic", [float(self.lengthscale), *map(float, self.alphas)]


@dataclass(frozen=True)
class Polynomial:
    """k(x, y) = (gamma·⟨x, y⟩ + coef)^degree, the kernel of KID.

    Args:
        degree: at least 1.
        gamma: positive; None means 1/D.
        coef: at least 0.

    Source: Bińkowski et al., Demystifying MMD GANs (2018), section 4.
    """

    degree: int = 3
    gamma: float | None = None
    coef: float = 1.0

    def __post_init__(self) -> None:
        _set(self, "degree", check.integer("degree", self.degree, least=1))
        if self.gamma is not None:
            _set(self, "gamma", _scale("gamma", self.gamma))
        _set(self, "coef", check.number("coef", self.coef, least=0))

    def _op(self, d: int) -> tuple[str, list[float]]:
        return "polynomial", [float(self.degree), 1.0 / d if self.gamma is None else float(self.gamma), self.coef]


Kernel = IMQ | RBF | Laplacian | RationalQuadratic | Energy | Polynomial
KERNELS: dict[str, Kernel] = {
    "imq": IMQ(),
    "rbf": RBF(),
    "laplacian": Laplacian(),
    "rational_quadratic": RationalQuadratic(),
    "energy": Energy(),
    "polynomial": Polynomial(),
}


def resolve(kernel: Any) -> Kernel:
    """A kernel object, from itself or its name."""
    if isinstance(kernel, Kernel):
        return kernel
    if not isinstance(kernel, str):
        names = ", ".join(type(k).__name__ for k in KERNELS.values())
        raise TypeError(f"kernel: expected {names} or a name, got {check.describe(kernel)}")
    return KERNELS[check.choice("kernel", kernel, tuple(KERNELS))]
