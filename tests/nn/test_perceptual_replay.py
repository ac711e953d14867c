"""Recordings of losses. What records is torch.cuda's; here a trace of the operations stands for it, which like a CUDA
graph repeats them on the same memory, whatever Python would do now."""

import copy
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fastgen.nn import LPIPS, GLANNLoss, PerceptualLoss, perceptual_replay, trunk, trunks_conv
from fastgen.nn.langevin_signature import signature

TAPS = ("relu1", "fire3", "fire4")
BEFORE = perceptual_replay.FIRST_CALLS


class Tape:
    """Stands for a recording's graph."""

    recorded: ClassVar[list["Tape"]] = []
    fails = False

    def __init__(self, run: Callable[[], list[Tensor]]) -> None:
        run()
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.graph = make_fx(run)()
        for read in self.graph.graph.find_nodes(op="get_attr"):  # the memory, not the tensor whose `data` it is now
            held = getattr(self.graph, read.target).detach()
            delattr(self.graph, read.target)
            setattr(self.graph, read.target, held)
        self.outputs = [torch.full_like(output, float("nan")) for output in run()]
        self.replays = 0
        self.recorded.append(self)

    def replay(self) -> None:
        self.replays += 1
        for output, new in zip(self.outputs, self.graph(), strict=True):
            output.copy_(new)


class Recorder:
    def __call__(self, run: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
        tape = Tape(run)
        return tape.replay, tape.outputs


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    monkeypatch.setattr(perceptual_replay, "place_of", lambda x: "here")
    monkeypatch.setattr(perceptual_replay, "Recorder", Recorder)
    monkeypatch.setattr(trunks_conv.Conv, "packs", lambda self, x: False)  # packed weights are not the module's memory
    monkeypatch.setattr(LPIPS, "_check_range", lambda *arguments: None)  # as on CUDA
    monkeypatch.setattr(Tape, "recorded", [])
    monkeypatch.setattr(Tape, "fails", False)
    return Tape.recorded


def lpips(**options: Any) -> LPIPS:
    torch.manual_seed(1)
    return LPIPS(pnet_rand=True, **options)


def perceptual(**options: Any) -> PerceptualLoss:
    torch.manual_seed(1)
    return PerceptualLoss(trunk("squeezenet1_1", "random"), layers=TAPS, pixel_weight=0.5, **options)


def glann(**options: Any) -> GLANNLoss:
    torch.manual_seed(1)
    return GLANNLoss("random", **options)


def efficient(**options: Any) -> PerceptualLoss:
    torch.manual_seed(1)
    return PerceptualLoss(trunk("efficientnet-lite0", "random"), layers=("block0", "block2", "block5"), **options)


LOSSES: dict[str, tuple[Callable[..., Any], int]] = {"lpips": (lpips, 40), "perceptual": (perceptual, 24)}
LOSSES |= {"glann": (glann, 16), "efficient": (efficient, 28)}
LOSSES |= {"style": (lambda **o: perceptual(style_weight=0.1, reduction="mean", **o), 24)}


def images(count: int, side: int, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


def value_and_gradients(loss: Any, *inputs: Any, upstream: float = 1.0) -> list[Tensor]:
    value = loss(*inputs)
    wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, wanted, torch.full_like(value, upstream))]


def close(got: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)


def warm(loss: Any, *inputs: Any) -> None:
    for _ in range(BEFORE):
        loss(*inputs)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("cached", [True, False])
def test_recordings_give_the_numbers_of_the_plain_loss(name: str, cached: bool, tapes: list[Tape]) -> None:
    make, side = LOSSES[name]
    loss, plain = make(), make(cuda_graph=False)
    for k in range(BEFORE + 4):
        x, y = images(3, side, seed=2 * k).requires_grad_(), images(3, side, seed=2 * k + 1)
        target = loss.target(y) if cached else y
        expected = value_and_gradients(plain, x, y, upstream=k - 2.5)
        close(value_and_gradients(loss, x, target, upstream=k - 2.5), expected)
        assert [tape.replays for tape in tapes] == ([k - BEFORE + 1] if k >= BEFORE else [])


def test_each_gradient_belongs_to_its_call(tapes: list[Tape]) -> None:
    loss, plain = lpips(), lpips(cuda_graph=False)
    xs, y = [images(2, 40, seed=k).requires_grad_() for k in range(3)], images(2, 40, seed=9)
    warm(loss, xs[0], y)
    values = [loss(x, y) for x in xs]
    assert tapes[0].replays == 3
    kept = [value.detach().clone() for value in values]
    upstream = [torch.rand(2, 1, 1, 1) for _ in xs]
    for k in (1, 2, 0, 1):  # in any order, and one of them again
        (got,) = torch.autograd.grad(values[k], xs[k], upstream[k], retain_graph=True)
        (expected,) = torch.autograd.grad(plain(xs[k], y), xs[k], upstream[k])
        close([got], [expected])
    assert all(torch.equal(a, b.detach()) for a, b in zip(kept, values, strict=True))


def test_either_image_or_both(tapes: list[Tape]) -> None:
    loss, plain = lpips(), lpips(cuda_graph=False)
    for x, y in ((images(2, 40, 1), images(2, 40, 3, 1)), (images(2, 40), images(2, 40, 1, 1))):
        for wants in ((True, False), (False, True), (True, True)):
            pair = [t.clone().requires_grad_(w) for t, w in zip((x, y), wants, strict=True)]
            expected = value_and_gradients(plain, *pair)
            for _ in range(BEFORE + 2):
                close(value_and_gradients(loss, *pair), expected)
    assert [tape.replays for tape in tapes] == [2] * 6


def test_without_gradients_and_in_inference_mode(tapes: list[Tape]) -> None:
    loss, plain = lpips(), lpips(cuda_graph=False)
    x, y = images(2, 40).requires_grad_(), images(2, 40, seed=1)
    with torch.inference_mode():
        warm(loss, x, y)
        assert torch.equal(loss(x, y), plain(x, y))
        z = images(2, 40, seed=2)
        torch.testing.assert_close(loss(z, y), plain(z, y), rtol=1e-6, atol=0)
    with torch.no_grad():
        value = loss(z.clone(), y)
    assert not value.requires_grad
    assert not value.is_inference()
    assert [tape.replays for tape in tapes] == [3]
    close(value_and_gradients(loss, x, y), value_and_gradients(plain, x, y))  # of another kind
    assert [tape.replays for tape in tapes] == [3]


@pytest.mark.parametrize("name", ["lpips", "perceptual"])
def test_second_order(name: str, tapes: list[Tape]) -> None:
    make, side = LOSSES[name]
    loss, plain = make(), make(cuda_graph=False)
    x, y = images(2, side).requires_grad_(), images(2, side, seed=1).requires_grad_()
    warm(loss, x, y)

    def second(of: Any) -> list[Tensor]:
        scaled = x * 0.5 + 0.25  # the way goes on beyond what the loss was given
        (grad,) = torch.autograd.grad(of(scaled, y).sum().square(), x, create_graph=True)
        return list(torch.autograd.grad(grad.square().sum(), (x, y)))

    expected = second(plain)
    close(second(loss), expected)
    close(second(loss), expected)
    assert [tape.replays for tape in tapes] == [2]
    assert expected[0].abs().max() > 0


def test_images_that_change_before_the_backward_pass(tapes: list[Tape]) -> None:
    """The gradient is there already; a second order has its images no more."""
    loss, plain, y = lpips(), lpips(cuda_graph=False), images(2, 40, seed=1)
    warm(loss, images(2, 40).requires_grad_(), y)
    for of in (plain, loss):
        x = images(2, 40).requires_grad_()
        made = x * 1.0
        value = of(made, y).sum()
        with torch.no_grad():
            made.clamp_(0.2, 0.4)
        found = torch.autograd.grad(value, x, retain_graph=True) if of is loss else torch.autograd.grad(value, x)
        if of is plain:
            expected = found
    close(list(found), list(expected))
    with pytest.raises(RuntimeError, match=r"create_graph: .* changed in place"):
        torch.autograd.grad(value, x, create_graph=True)
    assert tapes[0].replays == 1


def test_a_spent_graph_holds_no_images(tapes: list[Tape]) -> None:
    loss, y = lpips(), images(2, 40, seed=1)
    warm(loss, images(2, 40).requires_grad_(), y)
    x = images(2, 40).requires_grad_()
    made = x * 1.0
    alive, value = weakref.ref(made), loss(made, y).sum()
    del made
    for _ in range(2):
        value.backward(retain_graph=True)
    assert alive() is not None
    value.backward()
    assert alive() is None


def test_memory_of_recordings_is_given_back_when_the_network_moves(tapes: list[Tape]) -> None:
    loss, x, y = lpips(), images(2, 40), images(2, 40, seed=1)
    warm(loss, x, y)
    loss(x, y)
    recording = weakref.ref(next(iter(loss._kept.recordings.values())))
    nn.Sequential(loss).float()
    assert recording() is not None  # nothing has moved
    nn.Sequential(loss).double()
    assert recording() is None
    assert loss._kept.network is None


def test_replicas_of_data_parallel_leave_recordings_alone(tapes: list[Tape]) -> None:
    loss, x, y = lpips(), images(2, 40), images(2, 40, seed=1)
    warm(loss, x, y)
    expected = loss(x, y)
    recordings = dict(loss._kept.recordings)
    replica = loss._replicate_for_data_parallel()
    replica.net, replica.lins, replica.scaling_layer = loss.net, loss.lins, loss.scaling_layer
    close([replica(x, y)], [expected])
    assert loss._kept.recordings == recordings
    loss(x, y)
    assert [tape.replays for tape in tapes] == [2]


def test_weights_that_change(tapes: list[Tape]) -> None:
    loss, plain = perceptual(), perceptual(cuda_graph=False)
    x, y = images(2, 24).requires_grad_(), images(2, 24, seed=1)
    warm(loss, x, y)
    close(value_and_gradients(loss, x, y), value_and_gradients(plain, x, y))
    before = loss(x, y).detach()

    def both(change: Callable[[Any], None]) -> None:
        for one in (loss, plain):
            change(one)
        close(value_and_gradients(loss, x, y), value_and_gradients(plain, x, y))

    both(lambda one: one.trunk.features[0].weight.detach().mul_(1.5))
    both(lambda one: one.trunk.features[0].weight.data.mul_(0.9))
    assert (len(tapes), tapes[0].replays) == (1, 4)
    assert not torch.equal(loss(x, y).detach(), before)
    weight = loss.trunk.features[0].weight.detach()

    def replace(one: Any) -> None:
        one.trunk.features[0].weight = nn.Parameter(weight * 2, requires_grad=False)

    both(replace)
    assert (len(tapes), tapes[0].replays) == (1, 5)
    warm(loss, x, y)
    assert len(tapes) == 2
    both(lambda one: setattr(one.trunk.features[0].weight, "data", weight * 3))
    both(lambda one: setattr(one.trunk, "mean", one.trunk.mean + 0.1))
    both(lambda one: one.trunk.features.__setitem__(1, nn.Sequential(nn.ReLU(), nn.ReLU())))
    assert len(tapes) == 2
    both(lambda one: one.trunk.requires_grad_(True))
    for _ in range(BEFORE + 1):
        loss(x, y)
    grads = [torch.autograd.grad(one(x, y).sum(), one.trunk.features[0].weight)[0] for one in (loss, plain)]
    close(grads[:1], grads[1:])
    assert len(tapes) == 2


def test_options_that_change(tapes: list[Tape]) -> None:
    loss, plain = perceptual(), perceptual(cuda_graph=False)
    x, y = images(2, 24).requires_grad_(), images(2, 24, seed=1)
    warm(loss, x, y)
    loss(x, y)
    for name, new in (("layer_weight", [2.0, 1.0, 0.5]), ("distance", "l2"), ("pixel_weight", 3.0), ("pad_to", 32)):
        for one in (loss, plain):
            setattr(one, name, new)
        close(value_and_gradients(loss, x, y), value_and_gradients(plain, x, y))
    first, second = lpips(), lpips(cuda_graph=False)
    x, y = images(2, 40).requires_grad_(), images(2, 40, seed=1)
    warm(first, x, y)
    first(x, y)
    assert len(tapes) == 2
    close([first(x, y, normalize=True)], [second(x, y, normalize=True)])
    first.eps_mode = second.eps_mode = "torchmetrics"
    close([first(x, y)], [second(x, y)])


def test_kinds_are_kept_apart_and_bounded(tapes: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual_replay, "MOST_RECORDINGS", 5)
    loss, plain = perceptual(), perceptual(cuda_graph=False)
    shapes = [(2, 24), (1, 24), (2, 26)]
    pairs = [(images(*shape).requires_grad_(), images(*shape, seed=1)) for shape in shapes]
    last = [t.detach().contiguous(memory_format=torch.channels_last) for t in pairs[0]]
    pairs.append((last[0].requires_grad_(), last[1]))
    pairs.append((pairs[0][0], images(2, 24, seed=1).requires_grad_()))
    pairs.append((pairs[1][0], images(1, 24).mT))
    for _ in range(BEFORE + 2):
        for x, y in pairs:
            close(value_and_gradients(loss, x, y), value_and_gradients(plain, x, y))
    assert [tape.replays for tape in tapes] == [2] * 5
    with torch.autocast("cpu", torch.bfloat16):  # other kinds again
        close(value_and_gradients(loss, *pairs[0]), value_and_gradients(plain, *pairs[0]))
    for switch in ("allow_tf32", "benchmark", "deterministic"):
        monkeypatch.setattr(torch.backends.cudnn, switch, not getattr(torch.backends.cudnn, switch))
        close(value_and_gradients(loss, *pairs[0]), value_and_gradients(plain, *pairs[0]))
    assert [tape.replays for tape in tapes] == [2] * 5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_gradient_comes_in_its_images_layout(layout: torch.memory_format, tapes: list[Tape]) -> None:
    loss = lpips(net="squeeze", channels_last=True)
    x, y = images(2, 40).contiguous(memory_format=layout).requires_grad_(), images(2, 40, seed=1)
    strides = [value_and_gradients(loss, x, y)[1].stride() for _ in range(BEFORE + 2)]
    assert strides[BEFORE:] == [x.stride()] * 2
    assert [tape.replays for tape in tapes] == [2]


def test_autocast(tapes: list[Tape]) -> None:
    loss, plain = perceptual(style_weight=1.0), perceptual(style_weight=1.0, cuda_graph=False)
    for k in range(BEFORE + 3):
        x, y = images(2, 24, seed=k).requires_grad_(), images(2, 24, seed=50 + k)
        results = []
        for one in (loss, plain):
            with torch.autocast("cpu", torch.bfloat16):
                value = one(x, y)
            results.append([value.detach(), *torch.autograd.grad(value.sum(), x)])
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=0)
        # Other factors on the way back, other roundings to bfloat16.
        torch.testing.assert_close(
            results[0][1], results[1][1], rtol=0.05, atol=0.02 * float(results[1][1].abs().max())
        )
    assert [tape.replays for tape in tapes] == [3]
    with torch.autocast("cpu", torch.float16):  # unscaled, gradients would vanish
        for _ in range(BEFORE + 1):
            loss(x, y)
    assert len(tapes) == 1


def test_what_runs_as_it_is(tapes: list[Tape]) -> None:
    loss = lpips()
    x, y = images(2, 40).requires_grad_(), images(2, 40, seed=1)
    features = loss.features(y.requires_grad_())
    hooked, spatial, tuned = lpips(), lpips(spatial=True), lpips(eval_mode=False)
    hooked.net.slice2.register_forward_hook(lambda *a: None)
    foreign = PerceptualLoss(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).requires_grad_(False), layers=["0"])
    for _ in range(BEFORE + 1):
        loss(x, y.detach(), retPerLayer=True)
        loss(x, y.detach()[:1])
        loss(x, features)  # maps that want gradients themselves
        loss(x[:0], y.detach()[:0])
        for other in (hooked, spatial, tuned, foreign):
            other(x, y.detach())
        torch.utils.checkpoint.checkpoint(lambda x: loss(x, y.detach()).sum(), x, use_reentrant=False).backward()
    assert len(tapes) == 0
    large = torch.zeros(1, 3, 512, 513)
    for _ in range(BEFORE + 1):
        loss(large, large)
    assert len(tapes) == 0
    plain = lpips(cuda_graph=False)
    for _ in range(BEFORE + 1):
        x.grad = None
        torch.utils.checkpoint.checkpoint(lambda x: loss(x, y.detach()).sum(), x, use_reentrant=True).backward()
    assert [tape.replays for tape in tapes] == [1]  # of the first pass, without gradients
    close([x.grad], value_and_gradients(plain, x, y.detach())[1:])


def test_copies_and_pickles_begin_anew(tapes: list[Tape]) -> None:
    loss = perceptual()
    x, y = images(2, 24).requires_grad_(), images(2, 24, seed=1)
    warm(loss, x, y)
    loss(x, y)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), copy.copy(loss)):
        twin.trunk.features[0].weight.data = twin.trunk.features[0].weight.data * 2
        plain = copy.deepcopy(twin)
        plain._kept = perceptual_replay.Replays(False)
        close(value_and_gradients(twin, x, y), value_and_gradients(plain, x, y))
    assert len(tapes) == 1
    assert "cuda_graph='auto'" in repr(twin)
    replica = loss._replicate_for_data_parallel()  # shares what is no module and no tensor
    replica.trunk = plain.trunk
    plain.trunk.features[3].squeeze.weight.mul_(2)
    warm(loss, x, y)
    loss(x, y)
    close(value_and_gradients(replica, x, y), value_and_gradients(plain, x, y))


def test_captures_that_fail(tapes: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tape, "fails", True)
    loss, plain = perceptual(), perceptual(cuda_graph=False)
    x, y = images(2, 24).requires_grad_(), images(2, 24, seed=1)
    warm(loss, x, y)
    with pytest.warns(UserWarning, match="PerceptualLoss: cannot be recorded .* operation not permitted .* capturing$"):
        got = value_and_gradients(loss, x, y)
    close(got, value_and_gradients(plain, x, y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(BEFORE + 2):
            close(value_and_gradients(loss, x, y), value_and_gradients(plain, x, y))
    monkeypatch.setattr(perceptual_replay.trunks, "check_cuda", lambda name, x: None)
    at_once = perceptual(cuda_graph=True)
    with pytest.raises(RuntimeError, match="not permitted"):
        at_once(x, y)
    assert not at_once._kept.recorders  # the memory of a failed capture is not used again
    monkeypatch.setattr(Tape, "fails", False)
    close(value_and_gradients(at_once, x, y), value_and_gradients(plain, x, y))
    assert [tape.replays for tape in tapes] == [1]


@pytest.mark.parametrize("name", LOSSES)
def test_a_sampler_need_not_look_at_recordings(name: str) -> None:
    loss = LOSSES[name][0]()
    before = signature(torch.device("cpu"), loss)
    loss._kept.calls["a kind"] = 1
    assert before is not None
    assert signature(torch.device("cpu"), loss) == before


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="cuda_graph: expected 'auto', True or False, got 'yes'"):
        lpips(cuda_graph="yes")
    with pytest.raises(ValueError, match="trunk: expected one of our own for cuda_graph=True, got Sequential"):
        PerceptualLoss(nn.Sequential(nn.ReLU()), layers=["0"], cuda_graph=True)
    with pytest.raises(ValueError, match="x: expected images on a CUDA device for cuda_graph=True, got float32"):
        glann(cuda_graph=True)(images(1, 16), images(1, 16))


@pytest.mark.gpu
@pytest.mark.usefixtures("not_interpreted")
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_gpu_recordings(name: str, half: bool, cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # each rounding may turn a ReLU
    make, side = LOSSES[name]
    loss, plain = make().cuda(), make(cuda_graph=False).cuda()
    results: list[list[list[Tensor]]] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*cannot be recorded")
        for k in range(BEFORE + 4):
            x, y = (images(4, side, seed=2 * k + i).cuda() for i in (0, 1))
            x.requires_grad_()
            pair = []
            for one in (loss, plain):
                with torch.autocast("cuda", torch.bfloat16, enabled=half):
                    value = one(x, one.target(y) if cached else y)
                pair.append([value, x])
            results.append([[value.detach(), *torch.autograd.grad(value.sum(), x)] for value, x in pair])
    assert len(loss._kept.recordings) == 1
    for got, expected in results:  # after all replays
        torch.testing.assert_close(got[0], expected[0], rtol=1e-2 if half else 1e-5, atol=1e-7)
        assert (got[1] - expected[1]).norm() <= (0.1 if half else 1e-2) * expected[1].norm()


@pytest.mark.gpu
@pytest.mark.usefixtures("not_interpreted")
def test_gpu_recordings_follow_weights_and_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    loss, plain = lpips(cuda_graph=True).cuda(), lpips(cuda_graph=False).cuda()
    x, y = images(2, 40).cuda().requires_grad_(), images(2, 40, seed=1).cuda()

    def same() -> None:
        got, expected = (value_and_gradients(one, x, y) for one in (loss, plain))
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-7)
        assert (got[1] - expected[1]).norm() <= 1e-2 * expected[1].norm()

    same()
    with torch.no_grad():
        for one in (loss, plain):
            one.net.slice1[0].weight.mul_(1.5)
    same()
    assert len(loss._kept.recordings) == 1
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        same()
        torch.cuda.synchronize()
    assert len(loss._kept.recordings) == 2
    for one in (loss, plain):
        one.half().float()
    same()
    assert len(loss._kept.recordings) == 1
    (first,) = torch.autograd.grad(loss(x, y).sum(), x, create_graph=True)
    (other,) = torch.autograd.grad(plain(x, y).sum(), x, create_graph=True)
    second, expected = (torch.autograd.grad(g.square().sum(), x)[0] for g in (first, other))
    assert (second - expected).norm() <= 2e-2 * expected.norm()
    graph = torch.cuda.CUDAGraph()  # within somebody else's capture: no recording in it
    with torch.cuda.graph(graph):
        value = loss(x.detach(), y)
    graph.replay()
    torch.testing.assert_close(value, plain(x.detach(), y), rtol=1e-5, atol=1e-7)
