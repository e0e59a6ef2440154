"""Compressed checkpoints: what others wrote comes in losslessly, and goes out in formats that others serve."""
