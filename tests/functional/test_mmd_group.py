"""F.mmd with group=: the same number and gradients on 1, 2 and 4 processes as on one."""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastgen import functional as F
from fastgen import nn
from fastgen.functional import mmd_group

KERNELS = {"imq": F.IMQ(), "energy": F.Energy(), "polynomial": F.Polynomial()}
CASES = list(itertools.product(KERNELS, ("unbiased", "biased", "u_statistic"), (False, True)))


def sample(estimator: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    n, m = 23, 23 if estimator == "u_statistic" else 31
    x, y = (torch.randn(k, 5, generator=generator, dtype=torch.float64) for k in (n, m))
    p, q = (torch.rand(k, generator=generator, dtype=torch.float64) + 0.1 for k in (n, m))
    return x, y + 0.3, p, q


def shard(points: Tensor, rank: int, world: int) -> Tensor:
    """Shards of different sizes: the first process has what is left over."""
    size = len(points) // (world + 1)
    first = len(points) - size * (world - 1)
    return points[:first] if rank == 0 else points[first + (rank - 1) * size : first + rank * size]


def work(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    found: list[Any] = []
    for name, estimator, weighted in CASES:
        x, y, p, q = (shard(t, rank, world) for t in sample(estimator))
        x, y, p, q = (t.clone().requires_grad_() for t in (x, y, p, q))
        weights = {"x_weight": p, "y_weight": q} if weighted else {}
        value = F.mmd(x, y, kernel=KERNELS[name], estimator=estimator, group=dist.group.WORLD, **weights)
        (value * 3).backward()
        alone = x.detach().clone().requires_grad_()
        loss = nn.MMDLoss(KERNELS[name], estimator=estimator, group=dist.group.WORLD)
        loss(alone, y.detach(), **{key: w.detach() for key, w in weights.items()}).backward()
        assert torch.allclose(alone.grad * 3, x.grad, rtol=1e-12, atol=1e-15)
        found.append((value.detach(), x.grad, y.grad, p.grad, q.grad))
    batches(rank, world)
    if world > 1:
        for bad in ({"kernel": "imq"}, {"estimator": "u_statistic"}):
            wrong = torch.zeros(5 + rank, 5 if bad.get("estimator") else 3 + rank, dtype=torch.float64)
            with pytest.raises(ValueError, match="on every process"):
                F.mmd(wrong, wrong[:4], group=dist.group.WORLD, **bad)
        torch.manual_seed(0)
        good, weight = torch.randn(6, 3), torch.rand(6) + 0.1
        for wrong_there, error, says in (
            ({"x_weight": -weight}, ValueError, "x_weight: expected no negative weight"),
            ({"x_weight": weight[:4]}, ValueError, r"x_weight: expected shape \[6\]"),
            ({"y": [1.0]}, TypeError, r"y: expected a torch\.Tensor, got list"),
            ({"estimator": "mean"}, ValueError, "estimator: expected one of"),
        ):
            given = {"x": good, "y": good, "x_weight": weight} | (wrong_there if rank == 1 else {})
            here = (
                (error, says)
                if rank == 1
                else (ValueError, r"group: expected good arguments on every process, .* \[1\]")
            )
            with pytest.raises(here[0], match=here[1]):
                F.mmd(**given, group=dist.group.WORLD)
        with pytest.raises(
            ValueError, match="group: expected the same kernel, estimator and precision on every process"
        ):
            F.mmd(good, good, kernel=F.RBF((1.0 + rank,)), group=dist.group.WORLD)
        learnt = weight.clone().requires_grad_(rank == 1)
        with pytest.raises(ValueError, match="group: expected the same use of weights on every process"):
            F.mmd(good, good, x_weight=learnt, group=dist.group.WORLD)
        with pytest.raises(ValueError, match="y_weight: expected weights that do not sum to zero over the processes"):
            F.mmd(good, good, y_weight=torch.zeros(6), group=dist.group.WORLD)
        # A shard of padding, far away or no number, without any weight: as if it were not there.
        own = good + rank
        padded = own if rank == 0 else torch.full_like(good, float("nan") if rank == 1 else 1e6)
        padded = padded.clone().requires_grad_()
        weight_there = weight if rank == 0 else torch.zeros(6)
        value = F.mmd(padded, own, x_weight=weight_there, group=dist.group.WORLD)
        value.backward()
        alone = good.clone().requires_grad_()
        whole = F.mmd(alone, torch.cat([good + other for other in range(world)]), x_weight=weight)
        whole.backward()
        assert abs(float(value.detach() - whole.detach())) < 1e-6
        assert torch.allclose(padded.grad, alone.grad if rank == 0 else torch.zeros(6, 3), rtol=1e-4, atol=1e-7)
        weight[2] = float("nan") if rank == 1 else 1.0
        assert F.mmd(good, good, x_weight=weight, group=dist.group.WORLD).isnan()
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


def batches(rank: int, world: int) -> None:
    """Gradients of one side's weights, of each batch or of all, one of them zero."""

    def own(t: Tensor, dim: int) -> Tensor:
        return shard(t.movedim(dim, 0), rank, world).movedim(0, dim)

    torch.manual_seed(1)
    x, y = torch.randn(3, 13, 4, dtype=torch.float64), torch.randn(3, 17, 4, dtype=torch.float64) + 0.3
    for p, tolerance in ((torch.rand(13), 1e-5), (torch.rand(3, 13, dtype=torch.float64), 1e-10)):
        p[..., 2] = 0
        for estimator in ("unbiased", "biased"):
            whole, part = p.clone().requires_grad_(), own(p, -1).clone().requires_grad_()
            F.mmd(x, y, estimator=estimator, x_weight=whole).sum().backward()
            options = {"estimator": estimator, "x_weight": part, "group": dist.group.WORLD}
            F.mmd(own(x, 1), own(y, 1), **options).sum().backward()
            assert part.grad.dtype == p.dtype
            torch.testing.assert_close(part.grad, own(whole.grad, -1), rtol=tolerance, atol=tolerance / 100)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_same_number_on_any_number_of_processes(
    world: int, tmp_path: Path, run_apart: Callable[..., list[Any]]
) -> None:
    if world == 1:
        work(0, 1, str(tmp_path))
    else:
        code = "import runpy; runpy.run_path(file)['work'](rank, world, folder)"
        for done in run_apart(code, world, tmp_path, file=__file__, world=world):
            assert done.returncode == 0, done.stderr
    shards = [torch.load(tmp_path / f"{world}-{rank}.pt") for rank in range(world)]
    for i, (name, estimator, weighted) in enumerate(CASES):
        x, y, p, q = sample(estimator)
        for leaf in (x, y, p, q):
            leaf.requires_grad_()
        weights = {"x_weight": p, "y_weight": q} if weighted else {}
        value = F.mmd(x, y, kernel=KERNELS[name], estimator=estimator, **weights)
        (value * 3).backward()
        for rank in range(world):
            torch.testing.assert_close(shards[rank][i][0], value.detach(), rtol=1e-12, atol=1e-13)
            assert torch.equal(shards[rank][i][0], shards[0][i][0])
        for side, leaf in ((1, x), (2, y), *(((3, p), (4, q)) if weighted else ())):
            got = torch.cat([shards[rank][i][side] for rank in range(world)])
            torch.testing.assert_close(got, leaf.grad, rtol=1e-10, atol=1e-13)


def test_what_is_no_group_raises() -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(TypeError, match=r"group: expected a torch\.distributed process group or None, got str 'world'"):
        F.mmd(x, x, group="world")
    with pytest.raises(TypeError, match=r"group: expected a torch\.distributed process group"):
        nn.MMDLoss(group=3)


@pytest.mark.parametrize(("takes", "device"), [("cuda", "cuda"), ("cpu", "cpu"), ("cuda cpu", "cpu")])
def test_counts_travel_on_a_device_that_the_group_takes(takes: str, device: str) -> None:
    """On GPUs init_process_group() without a name takes CUDA's tensors alone, and its backend is called "undefined"."""
    assert mmd_group._device(SimpleNamespace(_device_types=[torch.device(one) for one in takes.split()])) == device
