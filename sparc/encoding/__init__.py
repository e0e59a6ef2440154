"""Encodings: how a weight that lies on a grid is written with fewer bytes."""
