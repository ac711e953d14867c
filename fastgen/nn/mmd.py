"""`MMDLoss`: maximum mean discrepancy as a module."""

from typing import Any

from torch import Tensor, nn

from fastgen import check
from fastgen.functional.mmd import ESTIMATORS, PRECISIONS, mmd
from fastgen.functional.mmd_kernels import Kernel, resolve


class MMDLoss(nn.Module):
    """MMD² between two samples, `fastgen.functional.mmd` with its options kept.

    Args:
        kernel, estimator, precision, group: as `fastgen.functional.mmd`.
        cache_y: not built yet.

    Shapes:
        x [N, D] or [B, N, D], y [M, D] or [B, M, D] -> [] or [B].

    Raises, notes and source: as `fastgen.functional.mmd`. The options are checked when the module is made.
    """

    def __init__(
        self,
        kernel: Kernel | str = "imq",
        *,
        estimator: str = "unbiased",
        precision: str = "bf16x3",
        group: Any = None,
        cache_y: bool = False,
    ) -> None:
        super().__init__()
        if cache_y:
            check.not_built("cache_y", cache_y, "False")
        if group is not None:
            check.not_built("group", group, "None")
        self.kernel = resolve(kernel)
        self.estimator = check.choice("estimator", estimator, ESTIMATORS)
        self.precision = check.choice("precision", precision, PRECISIONS)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return mmd(x, y, kernel=self.kernel, estimator=self.estimator, precision=self.precision)

    def extra_repr(self) -> str:
        return f"{self.kernel}, estimator={self.estimator!r}, precision={self.precision!r}"
