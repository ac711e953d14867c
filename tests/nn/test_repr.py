"""What a module prints of itself: every option that it was made with."""

import inspect

import pytest
import torch

from fastgen import nn

MODULES = {
    "LPIPS": (lambda: nn.LPIPS(pnet_rand=True), {"pretrained", "use_dropout", "model_path", "eval_mode", "verbose"}),
    "PerceptualLoss": (lambda: nn.PerceptualLoss(nn.trunk("vgg16", "random"), layers=["relu1_1"]), set()),
    "PerceptualEmbedding": (lambda: nn.PerceptualEmbedding(nn.LPIPS(pnet_rand=True), dim=64, seed=3), set()),
    "LangevinSampler": (lambda: nn.LangevinSampler(torch.nn.Linear(3, 1), step_size=0.1, n_steps=3), set()),
    "ReplayBuffer": (lambda: nn.ReplayBuffer(10, (3, 4)), {"capacity", "shape", "dtype", "seed", "device"}),
    "MMDLoss": (nn.MMDLoss, {"kernel", "group"}),
    "VectorQuantizer": (lambda: nn.VectorQuantizer(3, 5), {"dim", "codebook_size", "group"}),
}
# Of LPIPS's own, what says how the trunk is run is not all kept.
UNKEPT = {"trunk_weights", "channels_last", "compile"}


@pytest.mark.parametrize("name", MODULES)
def test_options_are_told(name):
    make, bare = MODULES[name]
    module = make()
    text, children = module.extra_repr(), {child for child, _ in module.named_children()}
    for option in inspect.signature(type(module).__init__).parameters:
        if option != "self" and option not in bare | UNKEPT | children:
            assert f"{option}=" in text, option
    assert text in repr(module)


def test_options_without_a_name_are_told_too():
    assert repr(nn.MMDLoss()).startswith("MMDLoss(IMQ(")
    assert repr(nn.VectorQuantizer(3, 5)).startswith("VectorQuantizer(3, 5, decay=0.8")
    assert repr(nn.ReplayBuffer(10, (3, 4), dtype=torch.uint8)).startswith("ReplayBuffer(10, (3, 4), reinit_pro")
    assert "uint8" in repr(nn.ReplayBuffer(10, (3, 4), dtype=torch.uint8))
