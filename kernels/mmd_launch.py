"""How the MMD kernels are launched: which points they take, their blocks, the slabs of what does not fit on chip."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from fastgen.kernels import tuned
from fastgen.kernels.mmd_units import in_units
from torch import Tensor

ROWS = 128  # BLOCK_M of every configuration: each set is padded to whole tiles of it
CHUNK = 64  # coordinates that a product takes at a time beyond
SLAB = 1 << 24  # slopes that are in memory at a time: 64 MiB
SLAB_COLUMNS = 4096
LARGEST_BATCH = 65535  # of CUDA's second grid axis
LARGEST_DEGREE = 16  # the power is made of as many multiplications
ROOTED = ("laplacian", "energy")
EXACT = (*ROOTED, "polynomial")
COSTLY = ("rational_quadratic", *ROOTED)  # kernels that need more registers than WAE's seven scales do
LARGEST = 1.25e34  # square of a point: beyond, a distance that overflows would be taken for one that does not count
XX, YY, XY = 1, 2, 4
ALL = XX | YY | XY


def fits(dtype: torch.dtype, kind: str, parameters: Sequence[float], second: bool = False) -> bool:
    """Whether the kernels take points of that dtype, where `second` for a Hessian's product: else the reference runs.

    Between close points the two parts of a rooted kernel's second derivative cancel: that is work for float64."""
    if dtype == torch.float64 or (second and kind in ROOTED):
        return False
    return kind != "polynomial" or parameters[0] <= LARGEST_DEGREE


def generation(x: Tensor) -> str:
    """Which of the targets of `aot` decides: registers of Ampere and of small Blackwells hold what is multiplied too,
    large ones keep what tensor cores add up in a memory of its own; AMD's compiler takes no limit of registers;
    everything else is launched as Hopper is."""
    if torch.version.hip is not None:
        return "gfx942"
    if not x.is_cuda:
        return "sm_90"
    return _generation(torch.cuda.current_device())


@functools.cache
def _generation(device: int) -> str:
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_80" if major in (8, 12) else "sm_100" if major in (10, 11) else "sm_90"


def resident(kind: str, precision: str, on: str) -> int:
    """Coordinates up to which rows and their gradient stay on chip."""
    if on == "sm_100":
        return 32 if precision in ("bf16x6", "tf32x3") else 64
    return 64 if kind in COSTLY or on == "sm_80" else 128


def halves(kernel: str, precision: str, deep: bool) -> bool:
    """Whether a kernel gets its points as pairs of bfloat16."""
    return precision == "bf16x3" and not deep and kernel in ("grad", "value")


def product_precision(kind: str, precision: str) -> str:
    """That of the products of points, where another is asked for. d² has to be right to a few units in its last place
    before its root is taken, and so has a polynomial, of which MMD² is a small difference."""
    return "bf16x6" if kind in EXACT and precision in ("tf32", "bf16x3") else precision


def at_zero(kind: str, parameters: Sequence[float], estimator: str) -> int:
    """What a pair i = i adds to the biased estimator beside the sums, which leave it out: its distance is zero."""
    if estimator != "biased" or kind in ("energy", "polynomial"):
        return 0
    return len(parameters) - (kind == "rational_quadratic")


def blocks(
    kernel: str, dp: int, kind: str = "imq", precision: str = "bf16x3", on: str = "sm_90", weighted: bool = False
) -> dict[str, int]:
    """Blocks, num_warps, num_stages and perhaps maxnreg of `_mmd_<kernel>_kernel`: "grad", "value", "slope", "pull", or
    "bend", which is `_mmd_slope_kernel` for the Hessian. What was searched for was searched with WAE's kernel in the
    default precision: what needs more registers or shared memory might not run with it."""
    narrow = {"BLOCK_M": ROWS, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    if kernel == "bend":
        return {**narrow, "BLOCK_N": 16} if on == "sm_80" else narrow
    if kind == "rational_quadratic" and kernel in ("value", "slope"):
        return narrow
    if kernel == "pull":
        return {**narrow, "BLOCK_N": min(dp, 64), "BLOCK_K": 32}
    searched = kind not in COSTLY and precision == "bf16x3" and not weighted
    if searched and (found := tuned.find(f"mmd_{kernel}", f"D={dp}")) is not None:
        return {"BLOCK_M": ROWS, **found}
    if kernel == "grad" and precision == "tf32x3" and on == "sm_80":
        return {**narrow, "BLOCK_N": 16}
    if kernel != "grad" and precision in ("tf32x3", "bf16x6") and on == "sm_80":
        return {**narrow, "BLOCK_N": 16} if 64 < dp <= 128 or kind == "polynomial" else narrow
    few = kind not in COSTLY and not weighted and dp <= 64
    if kernel == "grad" and precision == "bf16x3" and few and on == "sm_90":
        # Loads two tiles ahead, and half of the registers: two programs on a multiprocessor, one of which computes
        # while the other waits for its tensor cores.
        return {**narrow, "num_stages": 3, "maxnreg": 128}
    return narrow if kernel == "grad" or 64 < dp <= 128 else {**narrow, "BLOCK_N": 64}


class _Packed:
    """Both samples as Z = [X; Y], in float32 or in halves, and what every launch is told of them."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        precision: str,
        pairs: tuple[float, float, float, float] | None,
        kind: str,
        parameters: Sequence[float],
        estimator: str,
        x_weight: Tensor | None,
        y_weight: Tensor | None,
        coefficients: Tensor | None,
        second: bool = False,
    ) -> None:
        from fastgen.kernels import mmd as kernels
        from fastgen.kernels.mmd_kernels import KINDS

        self.n, self.d = x.shape[-2:]
        self.m = y.shape[-2]
        self.items = x.shape[:-2].numel()
        self.dp = -(-self.d // 128) * 128 if self.d > 128 else max(16, 1 << (self.d - 1).bit_length())
        self.padded_n, padded_m = (-(-k // ROWS) * ROWS for k in (self.n, self.m))
        self.padded = self.padded_n + padded_m
        self.kind, self.precision = kind, product_precision(kind, precision)
        self.on = generation(x)
        self.deep = self.d > resident(kind, self.precision, self.on)
        name, base, self.parameters, form, slope = in_units(kind, tuple(parameters), pairs, second)
        self.inner = kind == "polynomial"
        self.scale = base**-0.5
        self.gradient_scale = 4 * slope * self.scale
        self.norm: Tensor | None
        self.bend_scale = 1.0 if self.inner else 2 * slope
        degree = int(parameters[0]) if self.inner else 1
        self.options = {
            "KIND": KINDS[name] + degree - 1,
            "FORM": form,
            "ESTIMATOR": kernels.ESTIMATORS[estimator],
            "DP": self.dp,
            "PRECISION": self.precision,
            "PTX": x.is_cuda and torch.version.hip is None,
        }
        if halves("grad", self.precision, self.deep or second):
            width = 2 * self.dp + kernels.PARTS.value
            self.z = x.new_empty(self.items, self.padded, width, dtype=torch.bfloat16)
            self.norm = None
        else:
            self.z = x.new_empty(self.items, self.padded, self.dp, dtype=torch.float32)
            self.norm = x.new_empty(self.items, self.padded, dtype=torch.float32)
        self.pack(x, y, self.z, self.norm, LARGEST, not self.inner)
        self.weight: Tensor | None = None
        if x_weight is not None or y_weight is not None:
            self.weight = x.new_zeros(self.items, self.padded, dtype=torch.float32)
            self.weight[:, : self.n] = 1 if x_weight is None else x_weight
            self.weight[:, self.padded_n : self.padded_n + self.m] = 1 if y_weight is None else y_weight
        self.coefficients = None
        if coefficients is not None:
            self.coefficients = coefficients.to(torch.float64).expand(self.items, 3).contiguous()

    def pack(self, x: Tensor, y: Tensor, z: Tensor, norm: Tensor | None, limit: float, centred: bool) -> None:
        from fastgen.kernels import mmd as kernels

        kernels._mmd_pack_kernel[(self.padded // ROWS, self.items)](
            x.contiguous(),
            y.contiguous(),
            z,
            norm,
            self.n,
            self.m,
            self.d,
            self.padded_n,
            self.padded,
            self.scale,
            limit,
            CENTRED=centred,
            BLOCK=ROWS,
            DC=min(self.dp, CHUNK) if self.deep else self.dp,
            DP=self.dp,
            num_warps=4,
        )

    def slabs(self, side: int, terms: int) -> Iterator[tuple[int, int, int, int]]:
        """(first row, rows, first column, columns) of slabs that cover the pairs of X's or Y's rows."""
        begin, end = ((0, self.padded_n), (self.padded_n, self.padded))[side]
        left = 0 if terms & (XX, XY)[side] else self.padded_n
        right = self.padded if terms & (XY, YY)[side] else self.padded_n
        rows, columns = self.slab
        for row in range(begin, end, rows):
            for column in range(left, right, columns):
                yield row, min(rows, end - row), column, min(columns, right - column)

    def squares(self, side: int) -> Tensor:
        """Σp² of x's or y's weights, [items]."""
        assert self.weight is not None
        return (self.weight[:, : self.padded_n], self.weight[:, self.padded_n :])[side].double().square().sum(-1)

    @property
    def slab(self) -> tuple[int, int]:
        """Rows and columns of the largest slab, whole tiles."""
        budget = SLAB // max(1, self.items)
        columns = min(self.padded, SLAB_COLUMNS, max(ROWS, budget // ROWS // ROWS * ROWS))
        rows = min(max(self.padded_n, self.padded - self.padded_n), max(ROWS, budget // columns // ROWS * ROWS))
        return rows, columns

    def through_slabs(
        self,
        out: Sequence[Tensor],
        terms: int,
        directions: tuple[Tensor, Tensor] | None,
        partial: Tensor | None,
    ) -> None:
        """Adds to `out`, of x and perhaps of y, the gradients, or with `directions` their change along them."""
        from fastgen.kernels import mmd_slab as kernels

        v, along = directions if directions is not None else (None, None)
        scratch = [self.z.new_empty(self.items, *self.slab) for _ in range(1 if v is None else 2)]
        blocks_slope = blocks("slope" if v is None else "bend", self.dp, self.kind, self.precision, self.on)
        blocks_pull = blocks("pull", self.dp)
        for side, result in enumerate(out):
            for row, rows, column, columns in self.slabs(side, terms):
                kernels._mmd_slope_kernel[(rows // ROWS, columns // blocks_slope["BLOCK_N"], self.items)](
                    self.z,
                    v,
                    self.norm,
                    along,
                    self.weight,
                    self.coefficients,
                    scratch[0],
                    scratch[-1],
                    partial,
                    self.n,
                    self.m,
                    self.d,
                    self.padded_n,
                    self.padded,
                    row,
                    column,
                    *self.slab,
                    0 if partial is None else partial.shape[1],
                    self.bend_scale,
                    self.parameters,
                    BOTH=len(out) == 2,
                    DC=min(self.dp, CHUNK),
                    **self.options,
                    **blocks_slope,
                )
                # The Hessian's first slab pulls along the directions, its second one along the points.
                for slab, points in zip(scratch, (self.z,) if v is None else (v, self.z), strict=True):
                    kernels._mmd_pull_kernel[(rows // ROWS, self.dp // blocks_pull["BLOCK_N"], self.items)](
                        slab,
                        points,
                        self.weight,
                        result,
                        result.shape[-2],
                        self.d,
                        self.padded,
                        row,
                        row - side * self.padded_n,
                        column,
                        *self.slab,
                        columns,
                        self.gradient_scale,
                        INNER=self.inner,
                        DP=self.dp,
                        PRECISION=self.precision,
                        **blocks_pull,
                    )


def mmd(
    x: Tensor,
    y: Tensor,
    sides: int,
    precision: str,
    pairs: tuple[float, float, float, float] | None,
    kind: str,
    parameters: Sequence[float],
    estimator: str,
    x_weight: Tensor | None = None,
    y_weight: Tensor | None = None,
    coefficients: Tensor | None = None,
    terms: int = XX | YY | XY,
) -> tuple[Tensor, ...]:
    """MMD² and the unit gradients of the first `sides` of x and y, in float32; [N, D] or [B, N, D]."""
    from fastgen.kernels import mmd as kernels
    from fastgen.kernels import mmd_small

    whole = (x, y, x_weight, y_weight, coefficients)
    if (parts := _parts(whole)) is not None:
        options = (sides, precision, pairs, kind, parameters, estimator)
        found = [mmd(a, b, *options, p, q, c, terms) for a, b, p, q, c in parts]
        return tuple(torch.cat(each) for each in zip(*found, strict=True))
    with torch.cuda.device_of(x):
        if mmd_small.fits(x, y):
            return mmd_small.mmd(x, y, sides, precision, pairs, kind, parameters, estimator, *whole[2:], terms)
        packed = _Packed(x, y, precision, pairs, kind, parameters, estimator, x_weight, y_weight, coefficients)
        tiles_x, tiles = packed.padded_n // ROWS, packed.padded // ROWS
        graded = (0, tiles_x, tiles)[sides]  # tiles of rows with a gradient; the value kernel takes the rest
        last = max(graded, tiles if terms & YY else tiles_x)  # beyond it no row has a pair that is not met already
        make = x.new_zeros if packed.deep else x.new_empty
        gradients = [make(p.shape, dtype=torch.float32) for p in (x, y)[:sides]]
        # One partial sum for each tile of rows.
        partial = make(packed.items, last, dtype=torch.float64)
        samples = (packed.z, packed.norm, packed.weight, packed.coefficients)
        sizes = (packed.n, packed.m, packed.d, packed.padded_n, packed.padded)
        total = 0
        if graded and packed.deep:
            slots = packed.slab[1] // blocks("slope", packed.dp, kind, packed.precision, packed.on)["BLOCK_N"]
            of_slabs = x.new_zeros(packed.items, graded, slots, dtype=torch.float64)
            packed.through_slabs(gradients, terms, None, of_slabs)
            total = of_slabs.sum((1, 2))
        elif graded:
            kernels._mmd_grad_kernel[(graded, packed.items)](
                *samples,
                gradients[0],
                gradients[-1],
                partial,
                *sizes,
                last,
                packed.gradient_scale,
                packed.parameters,
                TERMS=terms,
                BOTH=sides == 2,
                **packed.options,
                **blocks("grad", packed.dp, kind, packed.precision, packed.on, packed.weight is not None),
            )
        if graded < last:
            kernels._mmd_value_kernel[(last - graded, packed.items)](
                *samples,
                partial,
                *sizes,
                graded,
                last,
                packed.parameters,
                TERMS=terms,
                DC=CHUNK if packed.deep else packed.dp,
                **packed.options,
                **blocks("value", packed.dp, kind, packed.precision, packed.on),
            )
        total = total + partial.sum(-1)
        if own := at_zero(kind, parameters, estimator):
            for side, size in enumerate((packed.n, packed.m)):
                if terms & (XX, YY)[side]:
                    squares = size if packed.weight is None else packed.squares(side)
                    a = 1 / size**2 if packed.coefficients is None else packed.coefficients[:, side]
                    total = total + own * a * squares
    return total.to(torch.float32).reshape(x.shape[:-2]), *gradients


def hessian_product(
    x: Tensor,
    y: Tensor,
    vx: Tensor,
    vy: Tensor | None,
    precision: str,
    kind: str,
    parameters: Sequence[float],
    estimator: str,
    x_weight: Tensor | None = None,
    y_weight: Tensor | None = None,
    coefficients: Tensor | None = None,
    terms: int = XX | YY | XY,
) -> tuple[Tensor, Tensor]:
    """How MMD²'s gradients change along (vx, vy), in float32; without vy that of y is empty."""
    whole = (x, y, vx, vy, x_weight, y_weight, coefficients)
    if (parts := _parts(whole)) is not None:
        options = (precision, kind, parameters, estimator)
        found = [hessian_product(a, b, va, vb, *options, p, q, c, terms) for a, b, va, vb, p, q, c in parts]
        hx, hy = zip(*found, strict=True)
        return torch.cat(hx), hy[0] if vy is None else torch.cat(hy)
    with torch.cuda.device_of(x):
        packed = _Packed(x, y, precision, None, kind, parameters, estimator, x_weight, y_weight, coefficients, True)
        v = torch.empty_like(packed.z)
        packed.pack(vx, torch.zeros_like(y) if vy is None else vy, v, None, LARGEST, False)
        out = [p.new_zeros(p.shape, dtype=torch.float32) for p in ((x,) if vy is None else (x, y))]
        packed.through_slabs(out, terms, (v, (packed.z * v).sum(-1)), None)
    return out[0], out[1] if vy is not None else x.new_empty(0, dtype=torch.float32)


def _parts(whole: tuple[Tensor | None, ...]) -> list[tuple[Any, ...]] | None:
    """A batch beyond the grid as several that are not; the first tensor is points, weights may be without a batch."""
    points = whole[0]
    assert points is not None
    if points.ndim == 2 or len(points) <= LARGEST_BATCH:
        return None
    count = len(points)

    def part(tensor: Tensor | None, start: int) -> Tensor | None:
        whole_batch = tensor is None or tensor.ndim == 1
        return tensor if whole_batch else tensor[start : start + LARGEST_BATCH]  # type: ignore[index]

    return [tuple(part(t, start) for t in whole) for start in range(0, count, LARGEST_BATCH)]
