"""Perceptual nearest neighbours: equal to LPIPS of every pair, in N + M passes, whole and by a sketch."""

import pytest
import torch

from fastgen.nn import LPIPS, PerceptualEmbedding
from fastgen.search import perceptual_nearest


def trained_like() -> LPIPS:
    lpips = LPIPS(pnet_rand=True)
    for module in lpips.net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return lpips


def digits(count: int) -> torch.Tensor:
    datasets = pytest.importorskip("sklearn.datasets")
    images = torch.tensor(datasets.load_digits().images[:count] / 8 - 1, dtype=torch.float32)[:, None]
    return torch.nn.functional.interpolate(images, size=(32, 32), mode="bilinear")


def brute_force(
    lpips: LPIPS, images: torch.Tensor, generated: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """LPIPS of every pair from float64 features, layer by layer, pixel by pixel."""
    maps0, maps1 = lpips.target(images).maps, lpips.target(generated).maps
    total = torch.zeros(len(images), len(generated), dtype=torch.float64)
    for f0, f1, weight in zip(maps0, maps1, lpips.weights(), strict=True):
        u0, u1 = (f.double() / (f.double().square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (f0, f1))
        for i in range(len(images)):
            total[i] += ((u0[i] - u1).square() * weight.double()[:, None, None]).sum(1).mean((1, 2))
    distance, index = total.sort(dim=1, stable=True)
    return distance[:, :k], index[:, :k]


@pytest.fixture(scope="module")
def setting():
    lpips = trained_like()
    images = digits(320)
    images, generated = images[:70], images[70:] + 0.2 * torch.randn(250, 1, 32, 32)
    return lpips, images, generated.clamp(-1, 1), brute_force(lpips, images, generated.clamp(-1, 1), 3)


def test_equal_to_every_pair(setting):
    lpips, images, generated, (distance, index) = setting
    passes = []
    handle = lpips.net.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    found = perceptual_nearest(images, generated, PerceptualEmbedding(lpips), k=3, chunk=128)
    handle.remove()
    assert sum(passes) == len(images) + len(generated)
    assert torch.equal(found.index, index)
    torch.testing.assert_close(found.distance.double(), distance, rtol=1e-5, atol=0)
    pairs = lpips(images[:5], generated[found.index[:5, 0]])
    torch.testing.assert_close(found.distance[:5, 0], pairs.flatten(), rtol=1e-4, atol=0)


def test_near_ties(setting):
    """Neighbours that differ in the fifth digit of their distance are told apart, as in float64."""
    lpips, images = setting[:2]
    images, others = images[:30], digits(70)[50:]
    generated = others.repeat(12, 1, 1, 1) + 3e-4 * torch.randn(240, 1, 32, 32)
    distance, index = brute_force(lpips, images, generated, 9)
    gap = distance[:, 1:] / distance[:, :-1] - 1
    assert float(gap.quantile(0.2)) < 1e-4
    found = perceptual_nearest(images, generated, PerceptualEmbedding(lpips), k=8, chunk=100)
    apart = (gap > 1e-6).all(1)  # closer ones are equal to a float32
    assert apart.sum() >= 20
    assert torch.equal(found.index[apart], index[apart, :8])


def test_streams_and_chunks(setting):
    lpips, images, generated, (_, index) = setting
    embed = PerceptualEmbedding(lpips)
    for parts in ([generated[:1], generated[1:1], generated[1:150], generated[150:]], generated.split(70)):
        stream = (part for part in parts)
        assert torch.equal(perceptual_nearest(images[:50], stream, embed, k=2).index, index[:50, :2])
    twice = torch.cat([generated[:40], generated[:40]])
    found = perceptual_nearest(images[:20], twice, embed, k=2, chunk=40)  # ties: the lower index first
    assert torch.equal(found.index[:, 0] + 40, found.index[:, 1])


def test_by_a_sketch(setting):
    lpips, images, generated, (distance, index) = setting
    embed, sketch = PerceptualEmbedding(lpips), PerceptualEmbedding(lpips, dim=512)
    found = perceptual_nearest(images, generated, embed, k=3, sketch=sketch, candidates=40)
    same = found.index == index
    assert same.float().mean() > 0.97
    torch.testing.assert_close(found.distance.double()[same], distance[same], rtol=1e-5, atol=0)
    assert bool((found.distance.double() >= distance * (1 - 1e-5)).all())  # never better than the best
    whole = perceptual_nearest(images, generated, embed, k=3, sketch=sketch, candidates=len(generated))
    assert torch.equal(whole.index, index)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 5}, ValueError, "k: expected at most the 4 generated"),
        ({"k": 0}, ValueError, "k"),
        ({"chunk": 0}, ValueError, "chunk"),
        ({"images": torch.rand(0, 3, 32, 32)}, ValueError, "images: expected at least one"),
        ({"images": torch.rand(3, 32, 32)}, ValueError, "images: expected 4 dimensions"),
        ({"generated": torch.rand(4, 3, 48, 48)}, ValueError, r"generated: expected images of \[3, 32, 32\]"),
        ({"sketch": torch.nn.Flatten(), "candidates": 1, "k": 2}, ValueError, "candidates"),
        (
            {"sketch": torch.nn.Flatten(), "generated": iter([])},
            TypeError,
            "generated: expected a tensor with a sketch",
        ),
        ({"sketch": torch.nn.Flatten(), "k": 5}, ValueError, "k: expected at most the 4 generated"),
        ({"generated": iter([])}, ValueError, "k: expected at most the 0 generated"),
    ],
)
def test_errors(options, error, message):
    arguments = {"images": torch.rand(2, 3, 32, 32), "generated": torch.rand(4, 3, 32, 32), "k": 1, **options}
    with pytest.raises(error, match=message):
        perceptual_nearest(arguments.pop("images"), arguments.pop("generated"), torch.nn.Flatten(), **arguments)


def test_an_embedding_of_another_number_of_points_is_refused():
    images, generated = torch.rand(2, 3, 8, 8), torch.rand(4, 3, 8, 8)
    with pytest.raises(ValueError, match=r"embed: expected 2 points of 2 images, got \[1, 384\]"):
        perceptual_nearest(images, generated, lambda part: part.reshape(1, -1))
    with pytest.raises(ValueError, match=r"sketch: expected 2 points of 2 images, got \[4, 96\]"):
        perceptual_nearest(images, generated, torch.nn.Flatten(), sketch=lambda part: part.reshape(-1, 96))
