"""Quantizing activations: `quantize` and `decode` pairs in the program."""
