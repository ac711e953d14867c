"""Drop-in `torch.nn` modules over `fastgen.functional`."""
