"""Energy distance: the MMD of the kernel −‖x − y‖₂."""

from torch import Tensor

from fastgen import check
from fastgen.functional.mmd import ESTIMATORS, mmd
from fastgen.functional.mmd_kernels import Energy


def energy_distance(x: Tensor, y: Tensor, *, estimator: str = "biased") -> Tensor:
    """2 E‖x − y‖₂ − E‖x − x′‖₂ − E‖y − y′‖₂, the squared MMD with k(x, y) = −‖x − y‖₂.

    Args:
        x: [N, D] or [B, N, D] float64, float32, bfloat16 or float16.
        y: [M, D] or [B, M, D], of x's dtype and device; N ≠ M is fine.
        estimator: which pairs the three means are over, as in `mmd`: "biased" (all of them, as GeomLoss and SciPy
            have it; never negative but for rounding), "unbiased" (i ≠ j within x and within y), "u_statistic" (i ≠ j
            between them too, N = M).

    Returns:
        [] or [B], float64 for float64 points, else float32. GeomLoss's `SamplesLoss("energy")` is half of it,
        `scipy.stats.energy_distance` in one dimension its root.

    Raises:
        TypeError, ValueError: as `mmd`.

    Notes:
        Memory, determinism, differentiation and points that are not finite: as `mmd`. Two equal points have no gradient
        between them.

    Source: Székely and Rizzo, Energy statistics (2013), equation 6; Sejdinovic et al. (2013), on its being an MMD.
    """
    check.choice("estimator", estimator, ESTIMATORS)
    return mmd(x, y, kernel=Energy(), estimator=estimator)
