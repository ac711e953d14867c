"""The Langevin step and its noise, and whole chains on a small and on a mid-size network.

`add` is torch.add(x, grad, out=...): two reads and a write, what a step costs at the least. Peers draw noise of their
own, so the oracle compares distributions: against the mean and variance of the clamped normal that each element has, a
large state's slope and its residuals' deviation may differ by half a percent. Ours is compared with the published
noise stream itself, in float64 and relative to the noise; our chains with ones walked so. The update is measured as
JEM's loop and as the UvA tutorial's write it, too; the chain as JEM's (UvA's, noise first, ends in another law).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Provider, Run, Work, relative_error

STEP_SIZE, NOISE_SCALE, PRIOR_SCALE, CLAMP = 0.005, 0.1, 0.5, (-1.0, 1.0)
STEPS = 20
SEED = 1  # of the peers' noise: with the inputs' seed, 0, the noise would be the state
SHAPES = {
    "demo": [(128, 3, 64, 64)],
    "quick": [(256, 3, 64, 64)],
    "full": [(64, 3, 32, 32), (1024, 1, 28, 28), (1024, 3, 64, 64)],
    "huge": [
        (16, 3, 32, 32),
        (64, 3, 32, 32),
        (256, 3, 32, 32),
        (1024, 1, 28, 28),
        (1024, 3, 64, 64),
        (4096, 3, 64, 64),
    ],
}
CHAINS = {"demo": ["small"], "quick": ["small"], "full": ["toy", "small"], "huge": ["toy", "small", "mid-size"]}
STARTS = {"toy": (1000, 2), "small": (64, 3, 32, 32), "mid-size": (64, 3, 32, 32)}
Inputs = tuple[Tensor, Tensor]
Moments = tuple[Tensor, Tensor]  # of each element: its mean and its variance


def works(scale: str) -> list[Work]:
    found = [_step(shape, torch.float32, "step") for shape in SHAPES[scale]]
    found += [_chain(size, STARTS[size]) for size in CHAINS[scale]]
    if scale != "demo":
        largest = SHAPES[scale][-1]
        found += [_step(largest, torch.bfloat16, "step"), _step(largest, torch.float32, "noise")]
    return found


def growing(series: str, n: int) -> Work:
    return _step((n, 3, 32, 32), torch.float32, "step")


GROWING = {"step, images of 3x32x32": 64}


def _step(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> Work:
    width = torch.finfo(dtype).bits // 8
    elements = math.prod(shape)
    exact: dict[str, Any] = {}
    if dtype == torch.float32:
        exact = {"check": partial(exact_error, kind), "tolerance": 1e-4}
    step: dict[str, Any] = {
        "fastgen": Provider(fastgen, **exact),
        "eager": eager,
        "eager, as JEM": eager_jem,
        "eager, as UvA": eager_uva,
        "torch.compile": compiled,
        "torchebm, fused step": Provider(torchebm_step, ("cuda",)),
        "add": Provider(add, check=lambda inputs, out: relative_error(out, inputs[0] + inputs[1]), tolerance=0.0),
    }
    noise: dict[str, Any] = {"fastgen": Provider(noise_fastgen, **exact), "eager": noise_eager}
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    what = f"step, noise and prior, {name}" if kind == "step" else f"noise, {name}"
    return Work(
        "langevin",
        f"{what}, {'x'.join(map(str, shape))}",
        partial(_inputs, shape, dtype),
        step if kind == "step" else noise,
        partial(_of_step if kind == "step" else _of_noise),
        # Four standard errors of a small state's variance, and half a percent of a large one.
        tolerance=max(0.005, 4 / math.sqrt(elements)),
        error=distribution_error,
        series=what,
        size={"N": elements},
        operations=8.0 * elements if kind == "step" else 0.0,  # prior, drift, the noise's share, clamp; not its making
        moved=float(elements * width * (3 if kind == "step" else 1)),
    )


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
    return x, grad


def _of_step(inputs: Inputs) -> Moments:
    x, grad = (t.double() for t in inputs)
    return clipped_moments(x - STEP_SIZE * (grad + x / PRIOR_SCALE**2), NOISE_SCALE, *CLAMP)


def _of_noise(inputs: Inputs) -> Moments:
    x = inputs[0].double()
    return torch.zeros_like(x), torch.ones_like(x)


def clipped_moments(mean: Tensor, deviation: float, low: float, high: float) -> Moments:
    """Of min(max(mean + deviation·ε, low), high) for a standard normal ε."""
    a, b = (low - mean) / deviation, (high - mean) / deviation
    pdf_a, pdf_b = (torch.exp(-0.5 * t * t) / math.sqrt(2 * math.pi) for t in (a, b))
    cdf_a, cdf_b = (torch.special.ndtr(t) for t in (a, b))
    inside = cdf_b - cdf_a
    first = mean * inside - deviation * (pdf_b - pdf_a) + low * cdf_a + high * (1 - cdf_b)
    second = (mean**2 + deviation**2) * inside + 2 * mean * deviation * (pdf_a - pdf_b)
    second = second + deviation**2 * (a * pdf_a - b * pdf_b) + low**2 * cdf_a + high**2 * (1 - cdf_b)
    return first, second - first**2


def distribution_error(result: Tensor, expected: Moments) -> float:
    """How far slope and deviation of the result are from those of the distribution, relatively; 0.01 is 1 %."""
    mean, variance = expected
    got = result.double()
    if got.shape != mean.shape or not bool(got.isfinite().all()):
        return math.inf
    residual = got - mean
    spread = abs(float(residual.square().sum() / variance.sum()) - 1) / 2
    power = float(mean.square().sum())
    slope = abs(float((residual * mean).sum() / power)) if power else 0.0
    return max(spread, slope, abs(float(residual.mean())) / math.sqrt(float(variance.mean())))


def exact_error(kind: str, inputs: Inputs, result: Tensor) -> float:
    """‖result − expected‖ / ‖what the noise adds‖ over the first chains, their noise made by the plain reference."""
    from fastgen.reference.langevin import normals

    x, grad = (t[:8].double().cpu() for t in inputs)
    noise = normals(x[0].numel(), torch.arange(len(x)), 0, 0).double().view(x.shape)
    got = result[:8].double().cpu()
    if kind == "noise":
        return float((got - noise).norm() / noise.norm())
    mean = x - STEP_SIZE * (grad + x / PRIOR_SCALE**2)
    want = (mean + NOISE_SCALE * noise).clamp(*CLAMP)
    error = float((got - want).norm() / (want - mean.clamp(*CLAMP)).norm())
    return error if bool(result.isfinite().all()) else math.inf


def _update(x: Tensor, grad: Tensor) -> Tensor:
    drift = grad + x / PRIOR_SCALE**2
    return (x - STEP_SIZE * drift + NOISE_SCALE * torch.randn_like(x)).clamp(*CLAMP)


def fastgen(inputs: Inputs) -> Run:
    from fastgen import functional as F

    x, grad = inputs[0].clone(), inputs[1]
    return lambda: F.langevin_step_(
        x, grad, step_size=STEP_SIZE, noise_scale=NOISE_SCALE, prior_scale=PRIOR_SCALE, clamp=CLAMP, seed=0
    )


def eager(inputs: Inputs) -> Run:
    torch.manual_seed(SEED)
    return lambda: _update(*inputs)


def eager_jem(inputs: Inputs) -> Run:
    """x_k.data += alpha·f_prime + sigma·randn_like(x_k), and the prior and the clamp that JEM does without."""
    torch.manual_seed(SEED)
    x, grad = inputs[0].clone(), inputs[1]

    def run() -> Tensor:
        drift = -grad - x / PRIOR_SCALE**2
        x.data += STEP_SIZE * drift + NOISE_SCALE * torch.randn_like(x)
        return x.clamp_(*CLAMP)

    return run


def eager_uva(inputs: Inputs) -> Run:
    """The tutorial's loop in its order: noise into a buffer, add, clamp, step, clamp; here with our prior's term."""
    torch.manual_seed(SEED)
    x, grad, noise = inputs[0].clone(), inputs[1], torch.empty_like(inputs[0])

    def run() -> Tensor:
        noise.normal_(0, NOISE_SCALE)
        step = grad + x / PRIOR_SCALE**2
        x.data.add_(noise.data)
        x.data.add_(-STEP_SIZE * step.data)
        x.data.clamp_(*CLAMP)
        return x

    return run


def compiled(inputs: Inputs) -> Run:
    torch.manual_seed(SEED)
    update = torch.compile(_update, dynamic=False)
    return lambda: update(*inputs)


def torchebm_step(inputs: Inputs) -> Run:
    """Its proof of concept has no prior term: that is added to the gradient, as its user would."""
    from torchebm.cuda.fused_langevin import fused_langevin_step

    x, grad = inputs[0].clone(), inputs[1]
    scale = NOISE_SCALE / math.sqrt(2 * STEP_SIZE)
    return lambda: fused_langevin_step(x, grad + x / PRIOR_SCALE**2, STEP_SIZE, scale, CLAMP, seed=0, out=x)


def add(inputs: Inputs) -> Run:
    """Not the work: its bytes alone."""
    x, grad = inputs
    out = torch.empty_like(x)
    return lambda: torch.add(x, grad, out=out)


def noise_fastgen(inputs: Inputs) -> Run:
    from fastgen import functional as F

    return lambda: F.langevin_noise(inputs[0], seed=0)


def noise_eager(inputs: Inputs) -> Run:
    torch.manual_seed(SEED)
    return lambda: torch.randn_like(inputs[0])


def _convolutions(widths: list[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in zip([3, *widths], widths, strict=False):
        layers += [nn.Conv2d(before, after, 4, 2, 1), nn.SiLU()]
    return layers


class Energy(nn.Module):
    """As small as energies of images come, so that the update counts, or of the size that CIFAR's are; or of points in
    the plane, where next to nothing but calls is left."""

    def __init__(self, size: str) -> None:
        super().__init__()
        if size == "toy":
            self.net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
            return
        widths = {"small": [16, 32], "mid-size": [64, 128, 256]}[size]
        self.net = nn.Sequential(
            *_convolutions(widths), nn.Flatten(), nn.Linear(widths[-1] * (32 >> len(widths)) ** 2, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)[:, 0]
        return out


def _energy(size: str, x: Tensor) -> Energy:
    with torch.random.fork_rng():  # of the GPU too: with the network's seed, the inputs', its noise would be the state
        torch.manual_seed(0)
        return Energy(size).to(x.device)


def _chain(size: str, shape: tuple[int, ...]) -> Work:
    return Work(
        "langevin",
        f"chain of {STEPS} steps, {size} network, {'x'.join(map(str, shape))}",
        partial(_inputs, shape, torch.float32),
        {
            "fastgen": Provider(partial(chain_fastgen, size), check=partial(exact_chain_error, size), tolerance=1e-4),
            "eager": partial(chain_eager, size),
            "eager, as JEM": partial(chain_jem, size),
            "torch.compile": partial(chain_compiled, size),
            "torchebm": partial(chain_torchebm, size),
        },
        partial(_of_chain, size),
        tolerance=0.02 if math.prod(shape) > 100_000 else 0.1,  # a few thousand numbers are no nearer to their law
        error=chain_error,
        series=f"chain, {size} network",
        size={"N": math.prod(shape)},
    )


def _loop(energy: Callable[[Tensor], Tensor], update: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    for _ in range(STEPS):
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(energy(x).sum(), x)
        x = update(x.detach(), grad)
    return x


def _of_chain(size: str, inputs: Inputs) -> Tensor:
    """One float64 chain: others must end with its mean, deviation and likeness to the start."""
    torch.manual_seed(SEED + 1)
    return _loop(_energy(size, inputs[0]).double(), _update, inputs[0].double())


def exact_chain_error(size: str, inputs: Inputs, result: Tensor) -> float:
    """‖result − expected‖ / ‖expected‖ of the first chains, walked in float64 with our own noise."""
    from fastgen.reference.langevin import normals

    start = inputs[0][:8].double().cpu()
    steps = iter(range(STEPS))

    def update(x: Tensor, grad: Tensor) -> Tensor:
        noise = normals(x[0].numel(), torch.arange(len(x)), 0, next(steps)).double().view(x.shape)
        return (x - STEP_SIZE * (grad + x / PRIOR_SCALE**2) + NOISE_SCALE * noise).clamp(*CLAMP)

    error = relative_error(result[: len(start)], _loop(_energy(size, start).double(), update, start))
    return error if bool(result.isfinite().all()) else math.inf


def chain_error(result: Tensor, expected: Tensor) -> float:
    """What chains of one law share: mean, deviation and quartiles of their ends over all chains and pixels."""
    if result.shape != expected.shape or not bool(result.isfinite().all()):
        return math.inf
    deviation = float(expected.std())
    got = result.double()
    shift = abs(float(got.mean() - expected.mean())) / deviation
    spread = abs(float(got.std()) / deviation - 1)
    quartiles = torch.tensor([0.25, 0.75], dtype=torch.float64, device=got.device)
    edges, wanted = (torch.quantile(t.flatten()[:1_000_000], quartiles) for t in (got, expected))
    apart = float((edges - wanted).abs().max()) / deviation
    return max(shift, spread, apart)


def chain_fastgen(size: str, inputs: Inputs) -> Run:
    from fastgen.nn import LangevinSampler

    sampler = LangevinSampler(
        _energy(size, inputs[0]),
        step_size=STEP_SIZE,
        n_steps=STEPS,
        noise_scale=NOISE_SCALE,
        prior_scale=PRIOR_SCALE,
        clamp=CLAMP,
    )
    return lambda: sampler(inputs[0], seed=0)


def chain_eager(size: str, inputs: Inputs) -> Run:
    torch.manual_seed(SEED)
    energy = _energy(size, inputs[0])
    return lambda: _loop(energy, _update, inputs[0])


def chain_jem(size: str, inputs: Inputs) -> Run:
    """As JEM's sample_q: one leaf moved through .data, each graph retained; with the prior and the clamp besides."""
    torch.manual_seed(SEED)
    energy = _energy(size, inputs[0])

    def run() -> Tensor:
        x = inputs[0].clone().requires_grad_()
        for _ in range(STEPS):
            (pull,) = torch.autograd.grad(-energy(x).sum(), [x], retain_graph=True)
            x.data += STEP_SIZE * (pull - x.data / PRIOR_SCALE**2) + NOISE_SCALE * torch.randn_like(x)
            x.data.clamp_(*CLAMP)
        return x.detach()

    return run


def chain_compiled(size: str, inputs: Inputs) -> Run:
    """Network and update each compiled: a gradient inside one graph is no one's habit."""
    torch.manual_seed(SEED)
    energy, update = (torch.compile(f, dynamic=False) for f in (_energy(size, inputs[0]), _update))
    return lambda: _loop(energy, update, inputs[0])


def chain_torchebm(size: str, inputs: Inputs) -> Run:
    """Its sampler, without autocast; the prior is part of its energy."""
    from torchebm.core import BaseModel
    from torchebm.samplers import LangevinDynamics

    torch.manual_seed(SEED)
    energy = _energy(size, inputs[0])

    class WithPrior(BaseModel):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            result: Tensor = energy(x) + x.square().flatten(1).sum(1) / (2 * PRIOR_SCALE**2)
            return result

    scale = NOISE_SCALE / math.sqrt(2 * STEP_SIZE)
    sampler = LangevinDynamics(
        WithPrior(), step_size=STEP_SIZE, noise_scale=scale, clamp=CLAMP, device=inputs[0].device
    )
    return lambda: sampler.sample(x=inputs[0].clone(), n_steps=STEPS)
