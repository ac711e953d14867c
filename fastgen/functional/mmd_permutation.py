"""Do two samples come from one distribution? A permutation test on their MMD, all permutations from one pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen import check
from fastgen.functional.mmd_kernels import RBF, Kernel, resolve
from fastgen.functional.mmd_median import median_squared_distance
from fastgen.reference.mmd import weights
from fastgen.reference.mmd_permutation import split_sums


class PermutationTest(NamedTuple):
    """statistic [] and null [n_permutations]: MMD² of the samples and of their permutations, float64; p_value []."""

    statistic: Tensor
    p_value: Tensor
    null: Tensor


@torch.no_grad()
def mmd_permutation_test(
    x: Tensor,
    y: Tensor,
    *,
    kernel: Kernel | str = "rbf",
    n_permutations: int = 1000,
    seed: int = 0,
    estimator: str = "unbiased",
) -> PermutationTest:
    """MMD² of two samples, of random splits of all their points into as many, and how rarely those are as large.

    p = (1 + #{null ≥ statistic}) / (1 + n_permutations): a test that rejects where p ≤ α is wrong with probability at
    most α where the distributions are one, for any sample size and any kernel.

    Args:
        x: [N, D] float64, float32, bfloat16 or float16.
        y: [M, D], of x's dtype and device; N ≠ M is fine.
        kernel: as `mmd`: an object, or a name for its defaults, whose scale is that of standard normal points.
            "median": one Gaussian, exp(−d²/m) with m the median of the pooled points' squared distances, for any scale
            of data; it does not know which point is whose, so the test stays exact. (NaN where it is zero: more than
            half of the pairs are of equal points.)
        n_permutations: at least 1; p is no smaller than 1/(1 + n_permutations).
        seed: of the permutations; the same seed, N and M give the same ones on every device.
        estimator: "unbiased" or "biased", as `mmd`. (A "u_statistic" depends on who is paired with whom.)

    Returns:
        PermutationTest(statistic, p_value, null), float64.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range.

    Notes:
        The kernel is computed once for each pair and not once for each permutation: with K its matrix over all N + M
        points, in slabs of rows, and A a 0/1 column for each split, everything follows from K·A. Memory is
        O((N + M)·(n_permutations + D)), arithmetic float64 throughout, on every device. A permutation that is within
        1e-12 of the statistic, relative to the sums it comes from, counts as equal to it. Points that are not finite
        give NaN for all three. Deterministic; not differentiable.

    Source: Gretton et al., A Kernel Two-Sample Test (JMLR 2012), section 4; the +1's after Phipson and Smyth (2010).
    """
    check.tensor("x", x, ndim=(2,))
    check.tensor("y", y, ndim=(2,))
    check.same("y", y, "x", x)
    check.choice("estimator", estimator, ("unbiased", "biased"))
    n_permutations = check.integer("n_permutations", n_permutations, least=1)
    seed = check.integer("seed", seed, least=0, most=2**63 - 1)
    if x.shape[1] != y.shape[1] or x.shape[1] < 1:
        raise ValueError(f"y: expected shape [M, {max(1, x.shape[1])}] to go with x, got {list(y.shape)}")
    least = 1 if estimator == "biased" else 2
    for name, points in (("x", x), ("y", y)):
        if len(points) < least:
            raise ValueError(
                f"{name}: expected at least {least} points for {estimator=}, got shape {list(points.shape)}"
            )
    n, m = len(x), len(y)
    z = torch.cat([x, y]).double()
    chosen: Any
    if kernel == "median":
        z = z / (median_squared_distance(z) / 2).sqrt()
        chosen = RBF((1.0,))
    else:
        chosen = resolve(kernel)
    kind, parameters = chosen._op(x.shape[1])

    random = torch.Generator("cpu").manual_seed(seed)
    shuffled = [torch.randperm(n + m, generator=random, device="cpu") for _ in range(n_permutations)]
    order = torch.stack([torch.arange(n + m, device="cpu"), *shuffled])
    member = torch.zeros(n + m, n_permutations + 1, dtype=torch.float64, device="cpu")
    member.scatter_(0, order[:, :n].T, 1.0)
    xx, yy, xy = split_sums(z, member.to(z.device), kind, parameters, estimator == "biased")
    a_xx, a_yy, a_xy = weights(n, m, estimator)
    value = a_xx * xx + a_yy * yy - 2 * a_xy * xy
    size = (a_xx * xx).abs() + (a_yy * yy).abs() + 2 * (a_xy * xy).abs()
    statistic, null = value[0], value[1:]
    as_large = (null >= statistic - 1e-12 * size[0]).sum()
    # A comparison with NaN is False, which would be the smallest p there is.
    p_value = (1 + as_large).double() / (1 + n_permutations) + 0 * value.sum()
    return PermutationTest(statistic, p_value, null)
