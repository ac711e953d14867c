"""Drop-in `torch.nn` modules over `fastgen.functional`."""

from fastgen.nn.perceptual import LPIPS as LPIPS
from fastgen.nn.perceptual import Features as Features
from fastgen.nn.perceptual import PerceptualEmbedding as PerceptualEmbedding
from fastgen.nn.perceptual import PerceptualLoss as PerceptualLoss
from fastgen.nn.trunks import Trunk as Trunk
from fastgen.nn.trunks import trunk as trunk
