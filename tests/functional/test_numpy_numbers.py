"""Numpy's numbers mean what Python's do, to the bit: they are no float and no int, and their products are their own."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from fastgen import functional as F
from fastgen import metrics, nn, search
from fastgen.functional.langevin_mala import langevin_accept_
from fastgen.models.frame import WFRAME
from fastgen.models.frame_compare import CompareFRAME
from fastgen.models.gmmn import GMMN
from fastgen.models.imle_image import RSIMLE
from fastgen.models.row_adam import RowAdam
from fastgen.models.run import arguments_of
from fastgen.models.wae import WAEMMD
from fastgen.nn.trunks import least_sides

Of = Callable[[Any], Any]


def numpys(value: Any) -> Any:
    return np.int64(value) if isinstance(value, int) else np.float32(value)


def pythons(value: Any) -> Any:
    return value if isinstance(value, int) else float(np.float32(value))


def points(n: int, d: int = 3) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(n))


def image() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def stepped(of: Of) -> Tensor:
    scales = {"step_size": of(0.1), "noise_scale": of(0.3), "prior_scale": of(0.7), "grad_clip": of(0.9)}
    x = points(4).double()
    F.langevin_step_(x, 2 * x, **scales, clamp=(of(-1.1), of(1.3)), seed=of(3), step=of(5))
    return x


def accepted(of: Of) -> Tensor:
    x, y, energy = points(4).double(), points(4).double() + 0.1, torch.zeros(4).double()
    scales = {"step_size": of(0.1), "noise_scale": of(0.3), "prior_scale": of(0.7)}
    return langevin_accept_(x, x.clone(), energy, y, y.clone(), energy.clone(), **scales, seed=of(3), step=of(5))[0]


def sampled(of: Of, **more: Any) -> Tensor:
    sampler = nn.LangevinSampler(
        lambda x: x.square().sum(1), n_steps=of(4), burn_in=of(1), thin=of(1), prior_scale=of(0.7), **more
    )
    return sampler(points(4).double(), seed=of(7), step=of(2), return_trajectory=True)


def replayed(of: Of) -> Tensor:
    buffer = nn.ReplayBuffer(
        of(6), (of(2), of(3)), reinit_probability=of(0.4), value_range=(of(-0.1), of(0.3)), seed=of(9)
    )
    return buffer.sample(of(4))[0]


def learned(of: Of) -> Tensor:
    z = torch.nn.Parameter(points(4).double())
    z.grad = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), points(2).double() + 1, (4, 3), check_invariants=True)
    optimiser = RowAdam([z], lr=of(0.1), betas=(of(0.8), of(0.9)), eps=of(1e-3), project=None)
    optimiser.step()
    return z.detach()


def arguments(of: Of) -> Any:
    models = (
        WAEMMD(latent_dim=of(3), lr=of(0.1), seed=of(4)),
        GMMN(hidden=(of(8), of(9)), drop=of(0.1), seed=of(4)),
        RSIMLE(radius=of(1.3), pool=of(3)),
        WFRAME(beta=of(0.3)),
        CompareFRAME(seeds=of(1), beta=of(0.3), bound=of(2.5), options={"width": of(4), "step_size": of(0.1)}),
    )
    return [json.dumps(vars(model).get("arguments", vars(model).get("settings"))) for model in models]


CALLS: dict[str, Callable[[Of], Any]] = {
    "step": stepped,
    "noise": lambda of: F.langevin_noise((of(2), of(5)), seed=of(3), step=of(5)),
    "accept": accepted,
    "sampler": lambda of: sampled(of, step_size=of(0.1)),
    "schedule": lambda of: sampled(of, step_size=[of(0.1 / (k + 1)) for k in range(4)]),
    "schedule as a function": lambda of: sampled(of, step_size=of(0.1), noise_scale=lambda k: of(0.3 / (k + 1))),
    "replay": replayed,
    "nearest": lambda of: F.nearest(points(9), points(40), of(3)),
    "rejection": lambda of: F.nearest(points(2), points(400), exclude_radius=of(0.1)),
    "streaming": lambda of: (
        search.StreamingNearest(points(9), exclude_radius=of(0.1)).update(points(400), first_id=of(7)).result()
    ),
    "streamed array": lambda of: (
        search.StreamingNearest(points(9).numpy(), block=of(4)).update(points(40)).result()
    ),
    "faiss": lambda of: search.FaissIndex(block=of(16)).add(points(40)).search(points(9), of(3)),
    "perceptual": lambda of: search.perceptual_nearest(
        image(), image().flip(0), lambda x: x.flatten(1), k=of(1), chunk=of(1),
        sketch=lambda x: x[..., 0].flatten(1), candidates=of(2),
    ),
    "quantizer": lambda of: nn.VectorQuantizer(of(3), of(8), decay=of(0.9), eps=of(1e-3), seed=of(5))(points(20))[0],
    "imq": lambda of: F.mmd(points(9), points(11), kernel=F.IMQ((of(0.3), of(2)), base=of(0.7))),
    "rbf": lambda of: F.mmd(points(9), points(11), kernel=F.RBF((of(0.3), of(2)))),
    "laplacian": lambda of: F.mmd(points(9), points(11), kernel=F.Laplacian((of(0.3), of(2)))),
    "rq": lambda of: F.mmd(points(9), points(11), kernel=F.RationalQuadratic((of(0.3), of(2)), of(0.7))),
    "polynomial": lambda of: F.mmd(points(9), points(11), kernel=F.Polynomial(of(2), of(0.3), of(0.7))),
    "wae": lambda of: F.wae_mmd(points(9), points(9).flip(0) + 1, prior_scale=of(0.7)),
    "permutations": lambda of: F.mmd_permutation_test(points(9), points(11), n_permutations=of(20), seed=of(4)),
    "median": lambda of: F.median_squared_distance(points(9), rank=of(5)),
    "projection": lambda of: F.lpips_projection([image()], [torch.rand(3)], dim=of(64), seed=of(2**62 + 1)),
    "features": lambda of: F.feature_distance([image()], [image().flip(0)], layer_weight=[of(0.3)]),
    "pyramid": lambda of: F.laplacian_pyramid_loss(image(), image().flip(0), levels=of(2)),
    "manifold": lambda of: metrics.manifold(points(30), points(31), k=of(2), block=of(8)),
    "two samples": lambda of: metrics.two_sample(points(30), points(31)[:30], k=of(3)),
    "row_adam": learned,
    "models": arguments,
}  # fmt: skip


def flat(value: Any) -> list[Any]:
    return [t for part in value for t in flat(part)] if isinstance(value, (tuple, list)) else [value]


@pytest.mark.parametrize("name", CALLS)
def test_the_same_to_the_bit(name: str) -> None:
    results = []
    for of in (numpys, pythons):
        torch.manual_seed(0)
        results.append(flat(CALLS[name](of)))
    for numpy_s, python_s in zip(*results, strict=True):
        assert type(numpy_s) is type(python_s)
        assert torch.equal(numpy_s, python_s) if isinstance(numpy_s, Tensor) else numpy_s == python_s


def test_kernels_keep_pythons() -> None:
    third = np.float32(1 / 3)
    more = F.Polynomial(np.int64(2), third, third), F.IMQ([third], third), F.RationalQuadratic([third], third)  # type: ignore[arg-type]
    for kernel in (*more, F.RBF([third]), F.Laplacian([third])):  # type: ignore[arg-type]
        assert "np." not in repr(kernel)
        assert hash(kernel) == hash(type(kernel)(**vars(kernel)))


def test_sizes_of_a_compiled_graph_stay_free() -> None:
    traced = CompileCounter()

    @partial(torch.compile, fullgraph=True, backend=traced, dynamic=True)
    def call(x: Tensor) -> Tensor:
        return F.langevin_noise((x.shape[0], 4), seed=3) + F.mmd(x, x + 1, kernel=F.Polynomial(2, 0.3, 0.7))

    for n in (7, 9, 11):
        expected = F.mmd(points(n), points(n) + 1, kernel=F.Polynomial(2, 0.3, 0.7))
        assert torch.equal(call(points(n)), F.langevin_noise((n, 4), seed=3) + expected)
    assert traced.frame_count == 1


def test_numpy_numbers_in_a_list_of_options() -> None:
    given = {"a": np.int32(3), "b": (np.float64(0.5), [np.bool_(True)]), "c": None, "d": metrics.Certainty(1, 2)}
    options = arguments_of({**given, "self": 1})
    assert json.loads(json.dumps(options)) == {"a": 3, "b": [0.5, [True]], "c": None, "d": [1, 2]}


def test_pooling_made_with_them() -> None:
    pool = torch.nn.MaxPool2d(np.int64(2))  # type: ignore[arg-type]
    assert least_sides([pool, pool]) == least_sides([torch.nn.MaxPool2d(2)] * 2)
