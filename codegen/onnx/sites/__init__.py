"""Encoded weights and quantized activations: one file per way to carry them."""
