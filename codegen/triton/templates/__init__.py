"""The skeletons of generated kernels."""
