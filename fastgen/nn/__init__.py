"""Drop-in `torch.nn` modules over `fastgen.functional`."""

from fastgen.nn.langevin import Divergence, LangevinRun, LangevinSampler
from fastgen.nn.langevin_replay import ReplayBuffer
from fastgen.nn.mmd import MMDLoss
from fastgen.nn.nearest import Quantized, VectorQuantizer
from fastgen.nn.perceptual import Features, GLANNLoss, PerceptualLoss
from fastgen.nn.perceptual_embedding import PerceptualEmbedding
from fastgen.nn.perceptual_lpips import LPIPS
from fastgen.nn.trunks import Trunk, trunk

__all__ = [
    "LPIPS",
    "Divergence",
    "Features",
    "GLANNLoss",
    "LangevinRun",
    "LangevinSampler",
    "MMDLoss",
    "PerceptualEmbedding",
    "PerceptualLoss",
    "Quantized",
    "ReplayBuffer",
    "Trunk",
    "VectorQuantizer",
    "trunk",
]
