"""`torch.library` schemas, fakes and the choice of kernel. Private: call `fastgen.functional`."""
