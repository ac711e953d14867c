"""Chains that are recorded once and replayed in later calls: on a GPU, and on a tape, which is to a CPU what a CUDA
graph is to a GPU."""

import copy
import gc
import itertools
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from fastgen.functional.langevin import Steps
from fastgen.nn import LangevinRun, LangevinSampler, langevin_graph


class Tape(TorchDispatchMode):
    """Records what torch calls, on which tensors, and runs that again: the same memory, and none of the Python."""

    made: ClassVar[list["weakref.ref[Tape]"]] = []
    bytes: ClassVar[int] = 1000

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.before: list[tuple[Tensor, Tensor]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        for i, argument in enumerate(func._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                self.before.append((value, value.clone()))
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            for place, value in zip(tree_flatten(out)[0], tree_flatten(func(*args, **kwargs))[0], strict=True):
                if isinstance(place, Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


def on_tape(device: torch.device, work: Callable[[], None], earlier: Any) -> tuple[Tape, int]:
    tape = Tape()
    try:
        with tape:
            work()
    finally:  # a recording runs nothing
        for tensor, value in reversed(tape.before):
            tensor.copy_(value)
    Tape.made.append(weakref.ref(tape))
    return tape, Tape.bytes


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list["weakref.ref[Tape]"]]:
    monkeypatch.setattr(langevin_graph, "recorder", lambda device: on_tape)
    monkeypatch.setattr(langevin_graph, "memory", lambda device: 16 * 10_000)
    Tape.made.clear()
    yield Tape.made
    Tape.made.clear()


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LangevinRun]:
    """The same call of a sampler with the same options by the plain loop of a CPU."""

    def run(sampler: LangevinSampler, x: Tensor, **given: Any) -> LangevinRun:
        plain = copy.copy(sampler)
        with monkeypatch.context() as context:
            context.setattr(langevin_graph, "recorder", lambda device: None)
            return plain.run(x, **given)

    return run


def equal(got: LangevinRun, want: LangevinRun) -> None:
    for name, one, other in zip(got._fields, got, want, strict=True):
        same = torch.equal(one, other) if isinstance(one, Tensor) else one == other
        assert same, name


class Net(nn.Module):
    def __init__(self, bias: float = 0.0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 8), nn.Linear(8, 1)
        self.register_buffer("shift", torch.zeros(1))
        self.scale, self.options = 1.0, {"bias": bias}

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.first(x.flatten(1) + self.shift))
        if self.training:
            hidden = hidden * 1.25
        return self.scale * self.last(hidden)[:, 0] + self.options["bias"]


KINDS: list[dict[str, Any]] = [
    {}, {"method": "mala"}, {"on_divergence": "reset"}, {"method": "mala", "on_divergence": "reset"},
    {"prior_scale": 1.5, "grad_clip": 0.1, "clamp": (-1.5, 1.5), "noise_scale": 0.2},
]  # fmt: skip


@pytest.mark.parametrize("options", KINDS, ids=lambda o: "-".join(map(str, o)))
@pytest.mark.parametrize("step_size", ["number", "schedule", "tensor"])
@pytest.mark.parametrize("n_steps", [1, 3, 8, 70])
def test_replayed_calls_are_the_loop(
    tapes: Any, loop: Callable[..., LangevinRun], options: dict[str, Any], step_size: str, n_steps: int
) -> None:
    sizes = {"number": 0.3, "schedule": lambda k: 0.3 / (k + 1), "tensor": torch.linspace(0.1, 0.4, 5)}
    thin = 3 if n_steps > 3 else 1
    sampler = LangevinSampler(Net(), step_size=sizes[step_size], n_steps=n_steps, thin=thin, **options)
    counts = []
    for call in range(6):
        for each in (False, True):
            given: dict[str, Any] = {"seed": 2**64 - 1 - call, "step": 5 * call, "return_trajectory": each}
            if call % 2:
                given["chain_id"] = torch.randperm(5) * 3
            x = torch.randn(5, 3, 4)
            equal(sampler.run(x, **given), loop(sampler, x, **given))
        counts.append(len(tapes))
    # With and without chain ids: a step, and a block of them unless that is the same.
    assert counts == ([1, 2, 2, 2, 2, 2] if n_steps == 1 else [1, 2, 3, 4, 4, 4])


def test_a_chain_is_one_replay_from_the_third_call_on(tapes: Any) -> None:
    sampler, x = LangevinSampler(Net(), step_size=0.3, n_steps=20), torch.randn(5, 3, 4)
    seen = []
    for _ in range(4):
        sampler(x, seed=0)
        seen.append([tape().replays for tape in tapes])
    assert seen == [[19], [19, 1], [19, 2], [19, 3]]


@pytest.fixture
def recordings(tapes: Any, loop: Callable[..., LangevinRun]) -> Callable[[LangevinSampler, Tensor], list[int]]:
    def count(sampler: LangevinSampler, x: Tensor) -> list[int]:
        """Of three calls, each with the loop's numbers."""
        found = [len(tapes)]
        for seed in range(3):
            equal(sampler.run(x, seed=seed), loop(sampler, x, seed=seed))
            found.append(len(tapes))
        return [after - before for before, after in itertools.pairwise(found)]

    return count


def test_the_energy_may_change(recordings: Callable[[LangevinSampler, Tensor], list[int]]) -> None:
    """Weights in place are read as they are; all else that is not what it was is recorded anew."""
    net, x = Net(), torch.randn(5, 3, 4)
    sampler = LangevinSampler(net, step_size=0.3, n_steps=5)
    assert recordings(sampler, x) == [1, 1, 0]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
        net.shift += 0.25
        assert recordings(sampler, x) == [0, 0, 0]
    last = net.last
    net.last = nn.Linear(8, 1)
    assert recordings(sampler, x) == [1, 1, 0]
    net.last = last
    assert recordings(sampler, x) == [0, 0, 0]  # the ones before are still there
    changes: list[Callable[[], object]] = [
        lambda: setattr(net.first, "weight", nn.Parameter(torch.randn(8, 12))),
        lambda: net.eval(),
        lambda: setattr(net, "scale", 2.0),
        lambda: net.options.update(bias=1.0),
        lambda: net.first.register_forward_hook(lambda module, inputs, output: output * 3),
        lambda: setattr(sampler, "clamp", (-1.0, 1.0)),
        lambda: setattr(sampler, "step_size", torch.tensor(0.2)),
        lambda: setattr(sampler, "noise_scale", torch.full((5,), 0.2)),
    ]
    for change in changes:
        change()
        assert recordings(sampler, x) == [1, 1, 0]
    with torch.autocast("cpu", torch.bfloat16):
        assert recordings(sampler, x) == [1, 1, 0]
    assert recordings(sampler, x) == [0, 0, 0]
    assert isinstance(sampler.step_size, Tensor)
    sampler.step_size.fill_(0.4)
    assert recordings(sampler, x) == [0, 0, 0]
    net.double()
    sampler.step_size, sampler.noise_scale = 0.2, None
    assert recordings(sampler, x.double()) == [1, 1, 0]
    assert recordings(sampler, torch.randn(6, 3, 4, dtype=torch.float64)) == [1, 1, 0]


TEMPERATURE = 1.0


def test_energies_that_are_functions(
    recordings: Callable[[LangevinSampler, Tensor], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, factor, x = Net(), 1.0, torch.randn(5, 3, 4)

    def energy(x: Tensor) -> Tensor:
        return factor * net(x) / TEMPERATURE

    sampler = LangevinSampler(energy, step_size=0.3, n_steps=5)
    assert recordings(sampler, x) == [1, 1, 0]
    with torch.no_grad():
        net.first.weight.mul_(2)
    assert recordings(sampler, x) == [0, 0, 0]
    factor = 2.0
    assert recordings(sampler, x) == [1, 1, 0]
    monkeypatch.setitem(globals(), "TEMPERATURE", 0.5)
    assert recordings(sampler, x) == [1, 1, 0]
    net = Net()
    assert recordings(sampler, x) == [1, 1, 0]


def test_what_cannot_be_looked_into_is_recorded_in_each_call(tapes: Any, loop: Callable[..., LangevinRun]) -> None:
    generator, x = torch.Generator(), torch.randn(5, 3, 4)
    net = Net()
    net.generator = generator  # type: ignore[assignment]
    sampler = LangevinSampler(net, step_size=0.3, n_steps=5)
    for call in range(3):
        equal(sampler.run(x, seed=0), loop(sampler, x, seed=0))
        assert len(tapes) == call + 1

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    sampler = LangevinSampler(Net(), step_size=0.3, n_steps=5)
    for call in range(3):
        with Watching():
            sampler(x, seed=0)
        assert len(tapes) == call + 4


def test_results_are_the_callers(tapes: Any) -> None:
    def cliff(x: Tensor) -> Tensor:
        return torch.where((x.abs() < 1.5).flatten(1).all(1), x.square().flatten(1).sum(1) / 2, torch.nan)

    sampler, x = LangevinSampler(cliff, step_size=0.3, n_steps=5, on_divergence="reset"), torch.zeros(5, 3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs = [sampler.run(x, seed=seed, return_trajectory=seed == 2) for seed in (0, 1, 2, 0)]
        assert not torch.equal(runs[0].resets, runs[1].resets)
        copies = [[t.clone() for t in run if isinstance(t, Tensor)] for run in runs]
        for seed in range(3):
            sampler.run(x + 0.1, seed=seed)
    for run, kept in zip(runs, copies, strict=True):
        for got, want in zip([t for t in run if isinstance(t, Tensor)], kept, strict=True):
            assert torch.equal(got, want)
    assert torch.equal(runs[0].x, runs[3].x)
    assert not torch.equal(runs[0].x, runs[1].x)


def test_samplers_share_a_network(tapes: Any, loop: Callable[..., LangevinRun]) -> None:
    net, x = Net(), torch.randn(5, 3, 4)
    samplers = [LangevinSampler(net, step_size=0.1 * k, n_steps=5) for k in (1, 2)]
    for call in range(3):
        for sampler in samplers:
            equal(sampler.run(x, seed=call), loop(sampler, x, seed=call))
        with torch.no_grad():
            net.last.weight.mul_(1.5)
    assert len(tapes) == 4


def test_few_are_kept_and_none_outlives_its_sampler(tapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def alive() -> int:
        return sum(tape() is not None for tape in tapes)

    gc.disable()
    try:
        sampler = LangevinSampler(Net(), step_size=0.3, n_steps=5)
        for n in range(1, 8):
            sampler(torch.randn(n, 3, 4), seed=0)
        assert alive() == len(sampler._kept.found) == langevin_graph.KEPT
        sampler(torch.randn(7, 3, 4), seed=0)  # the latest
        assert len(tapes) == 8
        assert alive() == 5
        monkeypatch.setattr(Tape, "bytes", 4000)  # of 10,000
        for n in (8, 9, 10):
            sampler(torch.randn(n, 3, 4), seed=0)
        assert alive() == 2
        monkeypatch.setattr(Tape, "bytes", 10_001)
        for _ in range(2):
            sampler(torch.randn(11, 3, 4), seed=0)
        assert len(tapes) == 13
        assert alive() == 2
        del sampler
        assert alive() == 0
    finally:
        gc.enable()


class Own(Tensor):
    """A kind of tensors that an energy may know."""


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_energies_have_their_dtype_and_states_their_kind(options: dict[str, Any], tapes: Any, loop: Any) -> None:
    kinds, net = [], Net()

    def energy(x: Tensor) -> Tensor:
        kinds.append(type(x))
        return net(x)

    x = torch.randn(5, 3, 4)
    sampler = LangevinSampler(energy, step_size=0.1, n_steps=5, **options)
    for kind in (Tensor, Own):
        for run in (sampler.run, sampler.run, sampler.run, lambda x, **given: loop(sampler, x, **given)):
            kinds.clear()
            assert run(x.as_subclass(kind), seed=1).energy.dtype == torch.float32
            assert set(kinds) <= {kind}


@pytest.mark.parametrize("calls", [1, 2, 3, 4])
def test_a_sampler_that_dies_gives_its_memory_back_at_once(calls: int, tapes: Any) -> None:
    gc.disable()
    try:
        sampler = LangevinSampler(Net(), step_size=0.3, n_steps=5)
        for seed in range(calls):
            sampler(torch.randn(2, 3, 4), seed=seed)
        assert any(tape() is not None for tape in tapes)
        del sampler
        assert not any(tape() is not None for tape in tapes)
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_chain_alone_reads_its_schedule_at_whole_sixteens(
    dtype: torch.dtype, tapes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One number for one chain is read where it lies; elsewhere Triton would load another kernel within a capture."""
    call, places = Steps.__call__, set()

    def watched(self: Steps, grad: Tensor, h: Any, s: Any, step: Any) -> None:
        places.update(scale.expand(1).contiguous().data_ptr() % 16 for scale in (h, s) if isinstance(scale, Tensor))
        call(self, grad, h, s, step)

    sampler = LangevinSampler(Net().to(dtype), step_size=lambda k: 0.3 / (k + 1), n_steps=5)
    monkeypatch.setattr(Steps, "__call__", watched)
    for seed in range(3):
        sampler(torch.randn(1, 3, 4, dtype=dtype), seed=seed)
    assert len(tapes) == 2
    assert places == {0}


def test_copies_have_no_graphs(tapes: Any) -> None:
    sampler, x = LangevinSampler(Net(), step_size=0.3, n_steps=5), torch.randn(5, 3, 4)
    expected = [sampler(x, seed=0) for _ in range(3)][-1]
    for other in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert not other._kept.found
        assert torch.equal(other(x, seed=0), expected)


def test_a_divergence_leaves_the_graph_as_it_was(tapes: Any, loop: Callable[..., LangevinRun]) -> None:
    def cliff(x: Tensor) -> Tensor:
        return torch.where((x.abs() < 1.5).all(1), x.square().sum(1) / 2, torch.nan)

    sampler, fine, bad = LangevinSampler(cliff, step_size=0.01, n_steps=6), torch.zeros(4, 2), torch.zeros(4, 2)
    bad[2] = 1.6
    for call in range(3):
        with pytest.raises(FloatingPointError, match="energy at step 3 is not finite in chain 2: nan"):
            sampler(bad, seed=call, step=3)
        equal(sampler.run(fine, seed=call), loop(sampler, fine, seed=call))
        bad[1, 1] = torch.nan
        with pytest.raises(FloatingPointError, match=r"before step 3, is not finite in chain 1$"):
            sampler(bad, seed=call, step=3)
        bad[1, 1] = 0
    assert len(tapes) == 2
    steep = LangevinSampler(lambda x: 5 * x.square().sum(1) ** 2, step_size=1.0, noise_scale=0.0, n_steps=9)
    for _ in range(3):
        with pytest.raises(FloatingPointError) as found:
            steep(fine + 1, seed=0)
        with pytest.raises(FloatingPointError) as expected:
            loop(steep, fine + 1, seed=0)
        assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("n_steps", [3, 8])
def test_an_energy_that_waits_is_told_of_once(tapes: Any, loop: Callable[..., LangevinRun], n_steps: int) -> None:
    def waits(x: Tensor) -> Tensor:
        return x.square().flatten(1).sum(1) * (2.0 if float(x.detach().abs().max()) > 1e9 else 1.0)

    sampler, x = LangevinSampler(waits, step_size=0.1, n_steps=n_steps), torch.randn(5, 3, 4)
    told = []
    for _ in range(4):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = sampler.run(x, seed=0)
        told += [str(w.message) for w in caught]
        equal(found, loop(sampler, x, seed=0))
    text = "the energy cannot be captured, the plain loop runs: operation not permitted when stream is capturing"
    assert told == [f"LangevinSampler: {text}"]


def test_an_energy_that_is_asked_while_it_is_asked(tapes: Any) -> None:
    """A sampler inside its own energy, or in another thread meanwhile, has chains of its own."""
    depth, inner = [0], []

    class Nested(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if depth[0] == 0:
                depth[0] = 1
                inner.append(sampler(x.detach(), seed=1))
                depth[0] = 0
            return x.square().sum(1)

    sampler = LangevinSampler(Nested(), step_size=0.1, n_steps=2)
    x = torch.randn(3, 2)
    plain = LangevinSampler(lambda x: x.square().sum(1), step_size=0.1, n_steps=2)
    for _ in range(3):
        assert torch.equal(sampler(x, seed=0), plain(x, seed=0))
    assert torch.equal(inner[0], plain(x, seed=1))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "norm",
    [
        nn.utils.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.weight_norm,
    ],
)
def test_normalised_weights(tapes: Any, loop: Callable[..., LangevinRun], norm: Callable[..., nn.Module]) -> None:
    samplers, x = [], torch.randn(5, 3, 4)
    for _ in range(2):  # spectral norms move with each evaluation
        torch.manual_seed(1)
        net = Net()
        norm(net.first)
        samplers.append(LangevinSampler(net, step_size=0.3, n_steps=5))
    sampler, plain = samplers
    for call in range(4):
        equal(sampler.run(x, seed=call), loop(plain, x, seed=call))
        for each in samplers:
            with torch.no_grad():
                for parameter in each.energy.parameters():  # type: ignore[union-attr]
                    parameter.mul_(1.25)
    assert len(tapes) == 2


@pytest.mark.gpu
@pytest.mark.usefixtures("not_interpreted")
@pytest.mark.parametrize("options", KINDS, ids=lambda o: "-".join(map(str, o)))
@pytest.mark.parametrize("n_steps", [1, 3, 8, 70])
def test_replayed_calls_are_the_loop_on_a_gpu(options: dict[str, Any], n_steps: int) -> None:
    """With weights that move in place and are replaced, on one stream and on others."""
    net = Net().cuda()
    given: dict[str, Any] = {"step_size": lambda k: 0.3 / (k + 1), "n_steps": n_steps, **options}
    sampler, plain = LangevinSampler(net, **given), LangevinSampler(net, cuda_graph=False, **given)
    kept = []
    for call in range(8):
        x = torch.randn(1 if n_steps == 3 else 5, 3, 4, device="cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side if call % 3 == 2 else torch.cuda.current_stream()), warnings.catch_warnings():
            warnings.filterwarnings("error", ".*cannot be captured")
            found = sampler.run(x, seed=call, step=call)
        want = plain.run(x, seed=call, step=call)
        equal(found, want)
        kept.append((found.x, want.x.clone()))
        with torch.no_grad():
            net.last.weight.mul_(1.25)
        if call == 4:
            net.first = nn.Linear(12, 8).cuda()
    assert len(sampler._kept.found) == 2
    for recorded in sampler._kept.found.values():
        assert n_steps in recorded.graphs or n_steps == 70
        assert None not in recorded.graphs.values()  # a longer one falls back to a step's without a word
    assert all(torch.equal(got, want) for got, want in kept)


@pytest.mark.gpu
@pytest.mark.usefixtures("not_interpreted")
def test_a_graphs_memory_is_given_back() -> None:
    x = torch.randn(256, 3, 32, 32, device="cuda")
    net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(32768, 1), nn.Flatten(0))
    net.cuda()
    LangevinSampler(net, step_size=0.01, n_steps=8, cuda_graph=False)(x, seed=0)
    torch._C._cuda_clearCublasWorkspaces()  # as recording does
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    sampler = LangevinSampler(net, step_size=0.01, n_steps=8)
    for _ in range(3):
        sampler(x, seed=0)
    (recorded,) = sampler._kept.found.values()
    assert recorded.bytes >= 4 * 32 * x[:, 0].numel()
    assert torch.cuda.memory_reserved() - before >= recorded.bytes
    del sampler, recorded
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 2**21
