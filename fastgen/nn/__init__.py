"""Drop-in `torch.nn` modules over `fastgen.functional`."""

from fastgen.nn.langevin import LangevinSampler as LangevinSampler
