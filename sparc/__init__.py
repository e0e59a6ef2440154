"""sparc: a compiler for sparse and quantized PyTorch models that shows the evidence."""
