"""Regions of a program that ONNX Runtime has one operator for."""
