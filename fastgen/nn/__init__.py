"""Drop-in `torch.nn` modules over `fastgen.functional`."""

from fastgen.nn.mmd import MMDLoss as MMDLoss
