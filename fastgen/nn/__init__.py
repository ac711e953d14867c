"""Drop-in `torch.nn` modules over `fastgen.functional`."""

from fastgen.nn.langevin import LangevinSampler
from fastgen.nn.mmd import MMDLoss
from fastgen.nn.nearest import Quantized, VectorQuantizer
from fastgen.nn.perceptual import LPIPS, Features, PerceptualEmbedding, PerceptualLoss
from fastgen.nn.trunks import Trunk, trunk

__all__ = [
    "LPIPS",
    "Features",
    "LangevinSampler",
    "MMDLoss",
    "PerceptualEmbedding",
    "PerceptualLoss",
    "Quantized",
    "Trunk",
    "VectorQuantizer",
    "trunk",
]
