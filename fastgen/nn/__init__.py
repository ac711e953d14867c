"""Drop-in `torch.nn` modules over `fastgen.functional`."""

from fastgen.nn.langevin import LangevinSampler
from fastgen.nn.mmd import MMDLoss
from fastgen.nn.perceptual import Features, GLANNLoss, PerceptualLoss
from fastgen.nn.perceptual_embedding import PerceptualEmbedding
from fastgen.nn.perceptual_lpips import LPIPS
from fastgen.nn.trunks import Trunk, trunk

__all__ = [
    "LPIPS",
    "Features",
    "GLANNLoss",
    "LangevinSampler",
    "MMDLoss",
    "PerceptualEmbedding",
    "PerceptualLoss",
    "Trunk",
    "trunk",
]
