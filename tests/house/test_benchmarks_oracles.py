"""What the families' works take for right: a result that is off by one percent gets no time."""

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from fastgen import functional as F

CPU = torch.device("cpu")


def tiny(family: str) -> Any:
    """A small work of each family's own making."""
    from benchmarks import langevin, mmd, nearest, perceptual

    return {
        "mmd": lambda: mmd._imq(40, 50, 8, 2),
        "mmd, Gaussian": lambda: mmd._gaussian(40, 50, 8, 1),
        "langevin": lambda: langevin._step((16, 3, 8, 8), torch.float32, "step"),
        "langevin, noise": lambda: langevin._step((16, 3, 8, 8), torch.float32, "noise"),
        "perceptual": lambda: perceptual._epilogue_work(1, 16, False),
        "nearest": lambda: nearest._work(60, 80, 5),
    }[family]()


OPS = {
    "mmd": "mmd",
    "mmd, Gaussian": "mmd",
    "langevin": "langevin_step_",
    "langevin, noise": "langevin_noise",
    "perceptual": "lpips_distance",
    "nearest": "nearest",
}


@pytest.mark.parametrize("family", OPS)
def test_a_kernel_that_is_off_by_one_percent_gets_no_time(
    family: str, harness: ModuleType, monkeypatch: pytest.MonkeyPatch, measurer: Callable[..., Any]
) -> None:
    only = ["fastgen", "eager", "torch.cdist", "eager, as JEM", "eager, as UvA", "add"]
    sound = {r["provider"]: r for r in measurer().measure(tiny(family), only)}
    assert {r["status"] for r in sound.values()} == {"ok"}, sound
    right = getattr(F, OPS[family])

    def off(*args: Any, **kwargs: Any) -> Any:
        found = right(*args, **kwargs)
        if family == "nearest":
            return found._replace(distance=found.distance * 1.01)
        return found.mul_(1.01) if family == "langevin" else found * 1.01

    monkeypatch.setattr(F, OPS[family], off)
    broken = {r["provider"]: r for r in measurer().measure(tiny(family), only)}
    assert broken["fastgen"]["status"] == "wrong"
    assert "seconds" not in broken["fastgen"]
    assert broken["eager"]["status"] == "ok"


WORKS = {
    "mmd": lambda of: of._imq(40, 50, 8, 2),
    "mmd, Gaussian": lambda of: of._gaussian(40, 50, 8, 1),
    "langevin, step": lambda of: of._step((16, 3, 8, 8), torch.float32, "step"),
    "langevin, step in bf16": lambda of: of._step((256, 3, 32, 32), torch.bfloat16, "step"),
    "langevin, noise": lambda of: of._step((16, 3, 8, 8), torch.float32, "noise"),
    "langevin, chain": lambda of: of._chain("small", (8, 3, 32, 32)),
    "perceptual, epilogue": lambda of: of._epilogue_work(1, 16, True),
    "perceptual, LPIPS": lambda of: of._lpips_work("alex", 1, 64),
    "perceptual, GLANN's loss": lambda of: of._glann_work(1, 32),
    "perceptual, step": lambda of: of._step_work(2, 28),
    "nearest": lambda of: of._work(60, 80, 5),
    "nearest, streamed": lambda of: of._streamed_work(60, 80, 5),
    "nearest, far off": lambda of: of._offset_work(60, 80, 5),
    "nearest, masked": lambda of: of._masked_work(60, 80, 5),
}


@pytest.mark.parametrize("kind", WORKS)
def test_one_percent_of_any_part_is_refused(kind: str, harness: ModuleType) -> None:
    """Of the value and of each gradient, whatever the family: by a share of all of it that a provider is off by."""
    import importlib

    work = WORKS[kind](importlib.import_module(f"benchmarks.{kind.split(',')[0]}"))
    provider = work.provider("fastgen")

    def off(part: int, inputs: Any) -> Callable[[], Any]:
        run = provider.setup(inputs)

        def wrong() -> Any:
            result = run()
            parts = [t.clone() for t in harness.tensors(result)]
            parts[part] = parts[part] * 1.01
            return tuple(parts) if isinstance(result, tuple) else parts[0]

        return wrong

    def status(setup: Callable[[Any], Any]) -> str:
        changed = dataclasses.replace(work, providers={"fastgen": dataclasses.replace(provider, setup=setup)})
        row = harness.Measurer(CPU, rounds=1, at_least=0.0).measure(changed)[0]
        assert ("seconds" in row) == (row["status"] == "ok")
        return str(row["status"])

    inputs = work.inputs(CPU)
    expected = work.oracle(inputs)
    work = dataclasses.replace(work, oracle=lambda inputs: expected)
    parts = [t for t in harness.tensors(provider.setup(inputs)()) if t.is_floating_point()]
    assert status(provider.setup) == "ok"
    for part in range(len(parts)):
        assert status(lambda inputs, part=part: off(part, inputs)) == "wrong", part


def test_a_small_part_of_a_step_that_is_off_is_seen(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, measurer: Callable[..., Any]
) -> None:
    """One percent of the noise, or of the step, is much less than one percent of the state."""
    right = F.langevin_step_
    for name in ("noise_scale", "step_size"):

        def off(*args: Any, name: str = name, **kwargs: Any) -> Any:
            return right(*args, **(kwargs | {name: kwargs[name] * 1.01}))

        monkeypatch.setattr(F, "langevin_step_", off)
        assert measurer().measure(tiny("langevin"), ["fastgen"])[0]["status"] == "wrong", name


def test_a_wrong_row_does_not_hide_behind_the_right_distance(harness: ModuleType) -> None:
    from benchmarks import nearest

    work = nearest._work(60, 80, 5)
    inputs = work.inputs(CPU)
    distance, index = work.provider("fastgen").setup(inputs)()
    order = torch.cdist(*(t.double() for t in inputs)).argsort(1)
    assert torch.equal(order[:, 0], index)
    expected = work.oracle(inputs)
    for at in (range(60), range(59, 60)):
        wrong = index.clone()
        wrong[list(at)] = order[list(at), 1]
        assert work.error((distance, index), expected) < 1e-6
        assert work.error((distance, wrong), expected) > work.tolerance
        assert work.facts((distance, wrong), expected)["right"] == pytest.approx(1 - len(at) / 60)
    query = 100 * torch.eye(3, 5)
    twins = query, torch.cat([query + 1, query + 1])  # the same distance twice: either is right
    expected = nearest.oracle(lambda inputs: [inputs[1]], twins)
    assert nearest.error((torch.full((3,), 5.0), torch.tensor([0, 4, 2])), expected) < 1e-6


def test_moments_of_a_clipped_normal(harness: ModuleType) -> None:
    from benchmarks.langevin import clipped_moments, distribution_error

    mean = torch.linspace(-2, 2, 9, dtype=torch.float64)
    first, second = clipped_moments(mean, 0.7, -1.0, 1.0)
    t = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    weight = torch.exp(-0.5 * t * t) * (t[1] - t[0]) / (2 * torch.pi) ** 0.5
    clipped = (mean[:, None] + 0.7 * t).clamp(-1, 1)
    want = (clipped * weight).sum(1)
    torch.testing.assert_close(first, want, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(second, ((clipped - want[:, None]) ** 2 * weight).sum(1), rtol=1e-5, atol=1e-7)
    mean, variance = torch.randn(200_000).double(), torch.full((200_000,), 0.04).double()
    draw = mean + 0.2 * torch.randn(200_000)
    assert distribution_error(draw, (mean, variance)) < 0.005
    assert distribution_error(draw * 1.01, (mean, variance)) > 0.008
    assert distribution_error(mean + (draw - mean) * 1.02, (mean, variance)) > 0.015


def test_the_mmd_oracle_is_autograd_of_the_plain_code(harness: ModuleType) -> None:
    from benchmarks import mmd

    for kind, work in (("imq", mmd._imq(7, 9, 3, 2)), ("rbf", mmd._gaussian(9, 7, 3, 2))):
        inputs = work.inputs(CPU)
        x, y = (t.detach().double().requires_grad_() for t in inputs)
        value = (mmd._mmd if kind == "imq" else mmd._mmd_gaussian)(x, y)
        wanted = torch.autograd.grad(value, (x, y))
        got, _, gradients = work.oracle(inputs)
        torch.testing.assert_close(got, value.detach(), rtol=1e-9, atol=1e-12)
        for (index, gradient), want in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(gradient, want[index], rtol=1e-9, atol=1e-12)


def test_counts_of_the_lpips_trunks(harness: ModuleType) -> None:
    from benchmarks import perceptual_networks as networks

    for net in networks.NETS:
        assert networks.parameters(net) == sum(v.numel() for v in networks.trunk_state(net).values())
    # 15.35 G multiply-adds a forward pass of VGG16 at 224, and as many back to the pixels.
    assert networks.operations("vgg", 1, 224) == pytest.approx(2 * 2 * 15.35e9, rel=0.01)
