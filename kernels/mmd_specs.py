"""What of MMD's kernels is compiled ahead of time."""

from typing import Any

from fastgen.kernels import mmd, mmd_slab, mmd_small
from fastgen.kernels.aot import TARGETS, Spec
from fastgen.kernels.mmd_kernels import KINDS
from fastgen.kernels.mmd_launch import ALL, CHUNK, EXACT, ROWS, XX, XY, YY, blocks, halves, resident
from fastgen.kernels.mmd_units import in_units

# Of scales that are no pairs seven too, the ladders of `F.RBF` and `F.Laplacian`.
LISTED: dict[str, tuple[float, ...]] = {
    "imq_pairs": (),
    "imq": (0.1, 0.2, 0.4, 1.0, 2.0, 5.0, 10.0),
    "rbf": (1.0, 4.0, 16.0, 64.0, 256.0),
    "rational_quadratic": (1.0, 0.2, 0.5, 1.0, 2.0, 5.0),
    "laplacian": (1.0, 2.0, 4.0, 8.0, 16.0),
    "energy": (),
    "polynomial": (3.0, 1.0, 1.0),
}


def specs() -> list[Spec]:
    """First WAE's kernel at D = 64 in the default precision."""
    integers = ("n", "m", "d", "padded_n", "padded", "partials", "first_tile", "first_row", "local_row", "first_column")
    types: dict[str, Any] = dict.fromkeys((*integers, "rows", "columns", "count", "pulled"), "i32")
    floats = ("z_ptr", "v_ptr", "norm_ptr", "along_ptr", "weight_ptr", "gx_ptr", "gy_ptr", "slope_ptr", "bend_ptr")
    types |= dict.fromkeys((*floats, "o_ptr", "out_ptr"), "*fp32")
    types |= dict.fromkeys(("coefficients_ptr", "partial_ptr"), "*fp64")
    types |= dict.fromkeys(("gradient_scale", "bend_scale", "scale", "limit"), "fp32")
    divisible = ("d", "partials", "padded_n", "padded", "rows", "columns", "pulled")
    divisible += ("first_tile", "first_row", "local_row", "first_column")
    listed = []

    def add(name: str, kernel: Any, constants: dict[str, Any], more: dict[str, Any], never: Any = ()) -> None:
        warps, stages = constants["num_warps"], constants["num_stages"]
        options = {"maxnreg": constants["maxnreg"]} if "maxnreg" in constants else {}
        known = {**types, **more}
        signature = {a: "constexpr" if a in constants else known.get(a, "constexpr") for a in kernel.arg_names}
        constants = {a: v for a, v in constants.items() if a in kernel.arg_names}
        here = tuple(a for a in divisible if a in signature)
        listed.append(Spec(name, kernel, signature, constants, warps, stages, options, here, never=never))

    absent = {"weight_ptr": None, "coefficients_ptr": None}
    by_stage = {
        "grad": mmd._mmd_grad_kernel,
        "value": mmd._mmd_value_kernel,
        "slope": mmd_slab._mmd_slope_kernel,
        "bend": mmd_slab._mmd_slope_kernel,
        "pull": mmd_slab._mmd_pull_kernel,
    }

    def launch(
        stage: str, name: str, dp: int, precision: str = "bf16x3", weighted: bool = False, both: bool = False
    ) -> None:
        degree = 3 if name == "polynomial" else 1
        pairs = (1.0, 8.1, 3.2, 0.5) if name == "imq_pairs" else None
        *_, parameters, form, _ = in_units(name.removesuffix("_pairs"), LISTED[name], pairs, stage == "bend")
        title = f"{stage} {name} D={dp} {precision}{' weighted' * weighted}{' both' * both}"
        more: dict[str, Any] = {"parameters": ("fp32",) * len(parameters)}

        def on(target: str) -> dict[str, Any] | None:
            """The constants there; None where it takes slabs instead."""
            deep = dp > resident(name, precision, target)
            if stage == "grad" and deep:
                return None
            constants = {
                "KIND": KINDS[name] + degree - 1,
                "FORM": form,
                "ESTIMATOR": 0,
                "TERMS": XX | YY | XY,
                "BOTH": both,
                "INNER": name == "polynomial",
                "DC": min(dp, CHUNK) if deep or stage in ("slope", "bend") else dp,
                "DP": dp,
                "PRECISION": precision,
                **blocks(stage, dp, name, precision, target, weighted),
            }
            if not weighted:
                constants |= absent
            if halves(stage, precision, deep):
                constants |= {"norm_ptr": None}
            if stage == "slope":
                constants |= dict.fromkeys(("v_ptr", "along_ptr"))
            if stage == "bend":
                constants |= {"partial_ptr": None}
            return constants

        usual = on("sm_90")
        assert usual is not None
        different = [target for target in ("sm_80", "sm_100", "gfx942") if on(target) != usual]
        lacking = ["gfx942"] * (precision == "tf32x3")  # a precision that AMD does not have
        if "norm_ptr" in usual:
            more["z_ptr"] = "*bf16"
        add(title, by_stage[stage], usual, more, (*different, *lacking))
        for target in different:
            if (constants := on(target)) is not None:
                rest = tuple(other for other in TARGETS if other != target)
                add(f"{title} {target}", by_stage[stage], constants, more, rest)

    for precision in ("bf16x3", "tf32x3", "tf32", "ieee", "bf16x6"):
        for stage in ("grad", "value"):
            launch(stage, "imq_pairs", 64, precision)
    for stage in ("slope", "pull"):
        launch(stage, "imq_pairs", 512)
    for dtype in ("fp32", "bf16"):
        constants = {"CENTRED": True, "BLOCK": ROWS, "DC": 64, "DP": 64, "num_warps": 4, "num_stages": 2}
        more = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}"}
        add(f"pack {dtype}", mmd._mmd_pack_kernel, constants, more)
        halved = {**constants, "norm_ptr": None}
        add(f"pack {dtype} halves", mmd._mmd_pack_kernel, halved, {**more, "z_ptr": "*bf16"})
    for stage in ("grad", "value"):
        for dp in (16, 32, 128):
            launch(stage, "imq_pairs", dp)
        launch(stage, "imq_pairs", 64, weighted=True)
        for name in ("imq", "rbf", "rational_quadratic"):
            launch(stage, name, 64)
        for name in EXACT:
            launch(stage, name, 64, "bf16x6")
        launch(stage, "polynomial", 128, "bf16x6")
    for stage, dp in (("grad", 16), ("grad", 64), ("grad", 128), ("slope", 512)):
        launch(stage, "imq_pairs", dp, both=True)
    launch("slope", "rational_quadratic", 512)
    launch("slope", "polynomial", 512, "bf16x6")
    for stage in ("slope", "value", "pull"):
        launch(stage, "laplacian", 128, "bf16x6")
    launch("value", "imq_pairs", 512)
    for name in ("imq", "rbf", "rational_quadratic"):
        launch("bend", name, 64)
    launch("bend", "polynomial", 64, "bf16x6")
    launch("bend", "imq", 512, weighted=True)
    launch("pull", "imq", 16)
    return [*listed, *small_specs()]


def small_specs() -> list[Spec]:
    """Of small samples; first WAE's kernel at its eight coordinates."""
    listed = []

    def add(name: str, d: int, sides: int = 1, precision: str = "bf16x3", dtype: str = "fp32", weighted: bool = False):
        kind = name.removesuffix("_pairs")
        pairs = (1.0, 8.1, 3.2, 0.5) if name == "imq_pairs" else None
        plan = mmd_small._plan(d, sides, precision, pairs, kind, LISTED[name], "unbiased", ALL, True)
        constants = {k: v for k, v in plan.constants.items() if not k.startswith("num_")}
        absent = [] if weighted else ["x_weight_ptr", "y_weight_ptr", "coefficients_ptr"]
        constants |= dict.fromkeys((*absent, *("gx_ptr", "gy_ptr")[sides:]))
        types: dict[str, Any] = dict.fromkeys(("x_ptr", "y_ptr"), f"*{dtype}")
        types |= dict.fromkeys(("coefficients_ptr", "partial_ptr"), "*fp64")
        types |= {"counter_ptr": "*i32", "parameters": ("fp32",) * len(plan.numbers[-1])}
        types |= dict.fromkeys(("n", "m", "d"), "i32") | dict.fromkeys(("scale", "gradient_scale"), "fp32")
        kernel = mmd_small._mmd_small_kernel
        signature = {a: "constexpr" if a in constants else types.get(a, "*fp32") for a in kernel.arg_names}
        title = f"small {name} D={d} sides={sides} {precision} {dtype}{' weighted' * weighted}"
        lacking = ("gfx942",) * (precision == "tf32x3")  # a precision that AMD does not have
        warps, stages = plan.constants["num_warps"], plan.constants["num_stages"]
        divisible = ("d",) * (d % 16 == 0)
        found = Spec(title, kernel, signature, constants, warps, stages, divisible=divisible, never=lacking)
        listed.append(found)

    add("imq_pairs", 8)
    for sides in (0, 1, 2):
        add("imq_pairs", 64, sides)
    for d in (20, 64):
        for precision in ("tf32x3", "tf32", "ieee", "bf16x6"):
            add("imq_pairs", d, precision=precision)
        for name in LISTED:
            add(name, d, 2, dtype="bf16", weighted=True)
    return listed
