"""Sums of a kernel over many ways to split one pooled sample in two, from one pass over its pairs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen.reference import mmd

BLOCK = 1 << 20  # elements of a block: 8 MiB of float64


def split_sums(
    z: Tensor, member: Tensor, kind: str, parameters: Sequence[float], diagonal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ k over pairs inside the members, inside the others, and between them (each pair once): three of [S] float64.

    z: [P, D] the pooled points; member: [P, S] float64 of zeros and ones, a column for each split; diagonal: whether
    the pairs i = j count.

    With K the kernel's matrix, a a column and 1 ones, inside is aᵀKa, between aᵀK1 − aᵀKa, and what is left of 1ᵀK1 is
    the rest: K·A in slabs of rows is all that needs pairs, and the work is P²·S multiplications and P² kernel values.
    """
    z = z.double()
    if kind != "polynomial":
        z = z - z.mean(0)
    z = mmd.in_reach(z)
    norm = (z * z).sum(1)
    inside = z.new_zeros(member.shape[1])
    touched, total = torch.zeros_like(inside), z.new_zeros(())
    rows = max(1, BLOCK // max(len(z), member.shape[1]))
    for start in range(0, len(z), rows):
        part = slice(start, start + rows)
        if kind in mmd.ROOTED:
            q = torch.cdist(z[part], z, compute_mode="donot_use_mm_for_euclid_dist").square_()
        elif kind == "polynomial":
            q = z[part] @ z.T
        else:
            q = torch.addmm(norm[part, None] + norm, z[part], z.T, alpha=-2).clamp_(min=0)
        if kind != "polynomial":
            q.diagonal(start).mul_(0)  # a point is at no distance from itself, unless it is NaN
        (k,) = mmd._kernel(q, kind, parameters, 0)
        if not diagonal:
            k.diagonal(start).zero_()
        inside += (member[part] * (k @ member)).sum(0)
        degree = k.sum(1)
        touched += degree @ member[part]
        total += degree.sum()
    between = touched - inside
    return inside, total - inside - 2 * between, between
