"""The target `cuda`: programs lowered to Triton kernels that are generated for each site."""
