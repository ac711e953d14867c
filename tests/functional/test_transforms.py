"""torch.func's transforms of the public functions: to the bit what torch.autograd gives, and right by naive float64."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastgen import functional as F
from fastgen.functional import transforms

DTYPES = [torch.float32, torch.float64]
GRADS = ["grad", "grad_and_value", "vjp"]
Arguments = tuple[Tensor, ...]
Oracles = Callable[[str], ModuleType]


class Case(NamedTuple):
    family: str
    ours: Callable[..., Tensor]
    naive: Callable[[ModuleType], Callable[..., Tensor]]  # of the oracle: the same in float64
    shapes: list[tuple[tuple[int, ...], ...]]
    vmap: str  # what a vmap of it says


def mmd_oracle(oracle: ModuleType, kernel: Any = None) -> Callable[..., Tensor]:
    kernel = kernel or F.IMQ()

    def naive(x: Tensor, y: Tensor, p: Tensor | None = None, q: Tensor | None = None) -> Tensor:
        kind, parameters = kernel._op(x.shape[-1])
        value: Tensor = oracle.value(x, y, kind, tuple(parameters), "unbiased", p, q)
        return value

    return naive


def wae_rbf_oracle(oracle: ModuleType) -> Callable[..., Tensor]:
    def naive(qz: Tensor, pz: Tensor) -> Tensor:
        half = (len(qz) ** 2 - len(qz)) // 2
        h = sum((qz[:, None] - z).square().sum(-1).flatten().sort(descending=True).values[half - 1] for z in (pz, qz))
        return mmd_oracle(oracle, F.RBF((1.0,)))(qz * h**-0.5, pz * h**-0.5)

    return naive


def projection_oracle(oracle: ModuleType) -> Callable[..., Tensor]:
    """Linear in the normalised maps: what it makes of each coordinate alone is its matrix."""

    def naive(f: Tensor) -> Tensor:
        c, h, w = f.shape[1:]
        each = torch.eye(c * h * w, dtype=torch.float64).view(-1, c, h, w)
        matrix = oracle.projection(each, torch.arange(1, c + 1).double(), 64, 0, 0, "lpips")
        unit = f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10)
        return unit.flatten(1) @ matrix

    return naive


def nearest_naive(query: Tensor, database: Tensor) -> Tensor:
    return (query[:, None] - database).square().sum(-1).sort().values[:, :2]


POINTS = [((7, 3), (5, 3)), ((2, 6, 2), (2, 9, 2)), ((1, 4, 5), (1, 3, 5))]
MAPS = [(1, 4, 1, 1), (3, 5, 2, 3)]
NO_MMD = r"fastgen mmd: vmap is not built; what works: points of shape \[B, N, D\]"
CASES = {
    "mmd": Case("mmd", F.mmd, mmd_oracle, POINTS, NO_MMD),
    "mmd_x_weight": Case(
        "mmd",
        lambda x, y, p: F.mmd(x, y, x_weight=p),
        mmd_oracle,
        [(*POINTS[0], (7,)), (*POINTS[1], (2, 6))],
        NO_MMD,
    ),
    "mmd_weights": Case(
        "mmd",
        lambda x, y, p, q: F.mmd(x, y, x_weight=p, y_weight=q),
        mmd_oracle,
        [(*POINTS[0], (7,), (5,)), (*POINTS[1], (2, 6), (2, 9))],
        NO_MMD,
    ),
    "wae_mmd": Case(
        "mmd",
        F.wae_mmd,
        lambda oracle: lambda x, y: oracle.wae_penalty(x, y, 2.0 * x.shape[1]),
        [((6, 2), (6, 2)), ((9, 5), (9, 5))],
        NO_MMD,
    ),
    "wae_mmd_rbf": Case(
        "mmd",
        lambda x, y: F.wae_mmd(x, y, kernel="rbf"),
        wae_rbf_oracle,
        [((6, 2), (6, 2))],
        "fastgen mmd_median: vmap is not built",
    ),
    "lpips_distance": Case(
        "perceptual",
        lambda f0, f1, w: F.lpips_distance([f0], [f1], [w]),
        lambda oracle: lambda f0, f1, w: oracle.lpips_layer(f0, f1, w, "lpips"),
        [(f, f, f[1:2]) for f in MAPS],
        "fastgen lpips_distance: vmap is not built",
    ),
    "lpips_projection": Case(
        "perceptual",
        lambda f: F.lpips_projection([f], [torch.arange(1.0, f.shape[1] + 1)], dim=64),
        projection_oracle,
        [(f,) for f in MAPS],
        "fastgen lpips_projection: vmap is not built",
    ),
    **{
        f"feature_distance_{distance}": Case(
            "perceptual",
            lambda f0, f1, distance=distance: F.feature_distance([f0], [f1], distance=distance),  # type: ignore[misc]
            lambda oracle, distance=distance: (  # type: ignore[misc]
                lambda f0, f1: oracle.feature_distance([f0], [f1], distance, [1.0])
            ),
            [(f, f) for f in MAPS],
            "fastgen feature_distance: vmap is not built",
        )
        for distance in ("l1", "l2")
    },
    "gram_matrix": Case(
        "perceptual",
        F.gram_matrix,
        lambda oracle: oracle.gram,
        [(f,) for f in MAPS],
        "fastgen gram_matrix: vmap is not built",
    ),
    "nearest": Case(
        "nearest",
        lambda q, b: F.nearest(q, b, 2).distance,
        lambda _: nearest_naive,
        [((1, 3), (2, 3)), ((5, 2), (11, 2))],
        "fastgen nearest: vmap is not built",
    ),
}
EACH = pytest.mark.parametrize("name", CASES)


def arguments(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> Arguments:
    return tuple(
        torch.rand(shape, dtype=dtype) if len(shape) < 2 else torch.randn(shape, dtype=dtype) for shape in shapes
    )


def weights_positive(name: str, args: Arguments) -> Arguments:
    return tuple(a.abs() if "weight" in name and i > 1 else a for i, a in enumerate(args))


def scalar(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Every number of the result counts, and differently."""

    def call(*args: Tensor) -> Tensor:
        value = fn(*args)
        factors = torch.arange(value.numel(), dtype=value.dtype).view(value.shape) / 16 + 0.5  # exact in float32 too
        return (value * factors).sum()

    return call


def by_func(how: str, call: Callable[..., Tensor], args: Arguments, which: tuple[int, ...]) -> Arguments:
    found: Arguments
    if how == "grad":
        found = torch.func.grad(call, argnums=which)(*args)
    elif how == "grad_and_value":
        found, value = torch.func.grad_and_value(call, argnums=which)(*args)
        assert not torch._C._functorch.is_functorch_wrapped_tensor(value)
        torch.testing.assert_close(value, call(*args), rtol=2e-5, atol=1e-6)
    else:
        all_args = list(args)

        def of(*chosen: Tensor) -> Tensor:
            for i, t in zip(which, chosen, strict=True):
                all_args[i] = t
            return call(*all_args)

        _, pull = torch.func.vjp(of, *(args[i] for i in which))
        found = pull(torch.ones((), dtype=call(*args).dtype))
    return found


@EACH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", GRADS)
def test_first_order(name: str, dtype: torch.dtype, how: str, oracles: Oracles) -> None:
    case = CASES[name]
    for shapes in case.shapes:
        args = weights_positive(name, arguments(shapes, dtype))
        call, naive = scalar(case.ours), scalar(case.naive(oracles(case.family)))
        n = len(args)
        for which in {tuple(range(n)), *((i,) for i in range(n))}:
            leaves = [a.clone().requires_grad_(i in which) for i, a in enumerate(args)]
            want = torch.autograd.grad(call(*leaves), [leaves[i] for i in which])
            got = by_func(how, call, args, which)
            wide = [a.double().clone().requires_grad_() for a in args]
            exact = torch.autograd.grad(naive(*wide), [wide[i] for i in which])
            for a, b, c in zip(got, want, exact, strict=True):
                assert torch.equal(a, b), (shapes, which)
                # F.nearest's distances are float32 of float64 points too, its gradients are not.
                tight = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 2e-5}
                torch.testing.assert_close(a.double(), c, **tight)


def penalty(grads: Arguments) -> Tensor:
    return torch.stack([g.square().sum() * (i + 1) for i, g in enumerate(grads)]).sum()


@EACH
@pytest.mark.parametrize("dtype", DTYPES)
def test_second_order(name: str, dtype: torch.dtype, oracles: Oracles) -> None:
    case = CASES[name]
    every = tuple(range(len(case.shapes[0])))
    for shapes in case.shapes:
        args = weights_positive(name, arguments(shapes, dtype))
        call, naive = scalar(case.ours), scalar(case.naive(oracles(case.family)))
        got = torch.func.grad(lambda *a, call=call: penalty(torch.func.grad(call, argnums=every)(*a)), argnums=every)(
            *args
        )
        for fn, leaves, tight in (
            (call, [a.clone().requires_grad_() for a in args], {"rtol": 1e-5, "atol": 1e-6}),
            (naive, [a.double().clone().requires_grad_() for a in args], {"rtol": 5e-3, "atol": 2e-3}),
        ):
            first = torch.autograd.grad(fn(*leaves), leaves, create_graph=True)
            want = torch.autograd.grad(penalty(first), leaves, allow_unused=True, materialize_grads=True)
            for a, b in zip(got, want, strict=True):
                if dtype == torch.float64:
                    tight = {"rtol": 1e-7, "atol": 1e-9}
                torch.testing.assert_close(a.to(b.dtype), b, **tight)


@EACH
def test_what_an_inner_transform_makes_of_an_outer_one(name: str, oracles: Oracles) -> None:
    """2·x, made inside, shows no flag of its own there: it asks for a gradient outside alone."""
    case = CASES[name]
    args = weights_positive(name, arguments(case.shapes[-1], torch.float64))

    def mixed(fn: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        def outer(x: Tensor) -> Tensor:
            def inner(*rest: Tensor) -> Tensor:
                return fn(2 * x, *rest)

            if len(args) == 1:
                return torch.func.grad(lambda t: t.square() * inner())(torch.ones((), dtype=x.dtype))
            return penalty(torch.func.grad(inner, argnums=tuple(range(len(args) - 1)))(*args[1:]))

        return outer

    got = torch.func.grad(mixed(scalar(case.ours)))(args[0])
    want = torch.func.grad(mixed(scalar(case.naive(oracles(case.family)))))(args[0])
    assert want.abs().max() > 1e-6 or name.endswith("l1")
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if len(case.shapes[-1]) == 2])
def test_one_tensor_for_two_arguments(name: str, oracles: Oracles) -> None:
    """Each is an argument of its own, also in a second derivative."""
    case = CASES[name]
    x = torch.randn(case.shapes[-1][0], dtype=torch.float64)
    v = torch.randn_like(x)
    if name == "nearest":
        v = v[:1].expand_as(v)

    def cross(fn: Callable[..., Tensor]) -> Arguments:
        def along(a: Tensor, b: Tensor) -> Tensor:
            return (torch.func.grad(fn)(a, b) * v).sum()

        found: Arguments = torch.func.grad(along, argnums=(0, 1))(x, x)
        return found

    for a, b in zip(cross(scalar(case.ours)), cross(scalar(case.naive(oracles(case.family)))), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@EACH
def test_no_grad_inside(name: str) -> None:
    case = CASES[name]
    args = weights_positive(name, arguments(case.shapes[-1], torch.float32))
    call = scalar(case.ours)

    def silent(*a: Tensor) -> Tensor:
        with torch.no_grad():
            value = call(*a)
        return value + 3 * a[0].sum()

    assert torch.equal(torch.func.grad(silent)(*args), torch.full_like(args[0], 3))


@EACH
def test_vmap_is_refused_by_name(name: str) -> None:
    case = CASES[name]
    args = weights_positive(name, arguments(case.shapes[0], torch.float32))
    every, call = tuple(range(len(args))), scalar(case.ours)
    stacked = [torch.stack([a, a]) for a in args]
    for fn in (case.ours, torch.func.grad(call, argnums=every)):
        with pytest.raises(NotImplementedError, match=case.vmap):
            torch.vmap(fn)(*stacked)
        with pytest.raises(NotImplementedError, match=case.vmap):
            torch.vmap(fn, in_dims=(None,) * (len(args) - 1) + (0,))(*args[:-1], stacked[-1])
    with pytest.raises(NotImplementedError, match=case.vmap):
        torch.func.grad(lambda *a: torch.vmap(case.ours)(*a).sum())(*stacked)
    # What is not batched passes through.
    got = torch.vmap(lambda _: torch.func.grad(call)(*args))(torch.zeros(2))
    assert torch.equal(got[0], torch.func.grad(call)(*args))


@pytest.mark.parametrize("name", ["mmd", "lpips_distance", "feature_distance_l2"])
def test_many_upstream_gradients_at_once_are_refused_by_name(name: str) -> None:
    case = CASES[name]
    args = arguments(case.shapes[1], torch.float32)
    with pytest.raises(NotImplementedError, match=case.vmap):
        torch.func.jacrev(case.ours)(*args)


@EACH
def test_tensors_kept_from_a_transform_that_is_over(name: str) -> None:
    case = CASES[name]
    args = weights_positive(name, arguments(case.shapes[-1], torch.float32))
    kept: list[Tensor] = []
    torch.func.grad(lambda a: (kept.append(1 * a), a.sum())[1])(args[0])
    call = scalar(case.ours)
    want = torch.func.grad(lambda a: call(args[0], *args[1:]) * a)(torch.ones(()))
    got = torch.func.grad(lambda a: call(kept[0], *args[1:]) * a)(torch.ones(()))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    if last := len(args) - 1:
        found, want = (torch.func.grad(call, argnums=last)(a, *args[1:]) for a in (kept[0], args[0]))
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-7)


def test_third_order_still_raises() -> None:
    x, y = torch.randn(5, 2), torch.randn(4, 2)

    def energy(order: int, a: Tensor) -> Tensor:
        if not order:
            return F.mmd(a, y)
        return torch.func.grad(lambda b: energy(order - 1, b))(a).square().sum()

    energy(2, x)
    with pytest.raises(NotImplementedError, match="third-order gradients are not built"):
        energy(3, x)


def test_twice_is_the_kernel_once_and_its_meaning_from_there() -> None:
    """Also where two of its arguments are one tensor."""
    x, calls = torch.randn(3, dtype=torch.float64), []

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        calls.append("kernel")
        return (a.detach() * b.detach() ** 2).clone()

    def meaning(a: Tensor, b: Tensor) -> Tensor:
        calls.append("meaning")
        return a * b**2

    def once(a: Tensor) -> Tensor:
        return transforms.twice(kernel, meaning, a, a).sum()  # type: ignore[no-any-return]

    torch.testing.assert_close(torch.func.grad(once)(x), 3 * x**2)
    assert calls == ["kernel", "meaning"]
    torch.testing.assert_close(torch.func.grad(lambda a: torch.func.grad(once)(a).sum())(x), 6 * x)
    calls.clear()
    once(x)  # with autograd's own graph the meaning at once
    with torch.no_grad():
        once(x)
    assert calls == ["meaning", "kernel"]


@EACH
@pytest.mark.parametrize("how", ["grad", "vjp", "twice"])
def test_compiled(name: str, how: str) -> None:
    """Transforms inside torch.compile, as a whole graph, and what autograd makes of their result outside of it: torch
    itself loses the second derivatives of a Function there, without a word."""
    case = CASES[name]
    args = weights_positive(name, arguments(case.shapes[-1], torch.float64))
    every, call = tuple(range(len(args))), scalar(case.ours)

    def found(*a: Tensor) -> Arguments:
        if how != "twice":
            return by_func(how, call, a, every)
        outer: Arguments = torch.func.grad(lambda *b: penalty(by_func("grad", call, b, every)), argnums=every)(
            *(t.detach() for t in a)
        )
        return outer

    torch._dynamo.reset()
    results = []
    for fn in (found, torch.compile(found, fullgraph=True, backend="aot_eager")):
        leaves = [a.clone().requires_grad_() for a in args]
        got = fn(*leaves)
        seconds = torch.autograd.grad(penalty(got), leaves, materialize_grads=True) if how != "twice" else ()
        results.append((*(g.detach() for g in got), *seconds))
    for a, b in zip(*results, strict=True):
        assert b.abs().max() > 0 or "l1" in name
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-11)


def test_compiled_within_a_transform_the_projection_still_wants_constant_weights() -> None:
    f, w = torch.randn(1, 3, 2, 2), torch.rand(3)

    def of_weight(w: Tensor) -> Tensor:
        return torch.func.grad(lambda w: F.lpips_projection([f], [w], dim=64).sum())(w)

    for fn in (of_weight, torch.compile(of_weight, backend="aot_eager")):
        with pytest.raises(Exception, match=r"weights\[0\].requires_grad=True is not built yet"):
            fn(w)


@EACH
def test_forward_mode_is_refused_by_name(name: str) -> None:
    case = CASES[name]
    args = weights_positive(name, arguments(case.shapes[-1], torch.float32))
    call = scalar(case.ours)
    what = name.partition("_l" if "feature" in name else "_x")[0]
    family = {"wae_mmd": "mmd", "wae_mmd_rbf": "median_squared_distance", "mmd_weights": "mmd"}.get(what, what)
    with pytest.raises(NotImplementedError, match=f"fastgen {family}: forward-mode AD is not built"):
        torch.func.jvp(call, args, args)
    for outer in (torch.func.jacfwd, torch.func.hessian):
        with pytest.raises(NotImplementedError, match=r"fastgen( \w+)?: forward-mode AD"):
            outer(lambda *a: penalty((torch.func.grad(call)(*a),)))(*args)


@pytest.mark.parametrize("name", ["lpips_distance", "lpips_projection", "feature_distance_l2"])
def test_many_upstream_gradients_of_torch_autograd(name: str) -> None:
    """is_grads_batched, by which a vectorized Jacobian is made, differentiated again."""
    case = CASES[name]
    x, *rest = arguments(case.shapes[1], torch.float64)
    found = []
    for vectorize in (False, True):
        leaf = x.clone().requires_grad_()
        jacobian = torch.autograd.functional.jacobian(
            lambda a: case.ours(a, *rest), leaf, vectorize=vectorize, create_graph=True
        )
        found.append((jacobian.detach(), *torch.autograd.grad(jacobian.square().sum(), leaf)))
    for a, b in zip(*found, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
