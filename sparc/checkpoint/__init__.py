"""Compressed checkpoints of other tools, read without rounding again, and written for them.

GGUF files, and Hugging Face folders with GPTQ, AWQ, compressed-tensors or FP8 weights.
"""
