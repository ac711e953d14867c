"""Drop-in `torch.nn` modules over `fastgen.functional`."""

from fastgen.nn.langevin import Divergence, LangevinRun, LangevinSampler
from fastgen.nn.langevin_replay import ReplayBuffer
from fastgen.nn.mmd import MMDLoss
from fastgen.nn.perceptual import LPIPS, Features, PerceptualEmbedding, PerceptualLoss
from fastgen.nn.trunks import Trunk, trunk

__all__ = [
    "LPIPS",
    "Divergence",
    "Features",
    "LangevinRun",
    "LangevinSampler",
    "MMDLoss",
    "PerceptualEmbedding",
    "PerceptualLoss",
    "ReplayBuffer",
    "Trunk",
    "trunk",
]
