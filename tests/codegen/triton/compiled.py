"""What tests ask of an artifact compiled for `cuda`."""

from typing import Any

from torch import Tensor

from sparc.artifact import Artifact
from sparc.codegen.triton.emission import TritonEmission
from sparc.verify import relative_error


def emission(artifact: Artifact) -> TritonEmission:
    assert isinstance(artifact.emission, TritonEmission)
    return artifact.emission


def sites(artifact: Artifact) -> dict[str, Any]:
    """The sites of the first entry by their weights' names."""
    found = [each.site for each in emission(artifact).lowered["forward"].operators.values()]
    return {"+".join(name.removesuffix(".weight") for name in site.names): site for site in found}


def agrees(artifact: Artifact, *tensors: Tensor, tolerance: float = 3e-3) -> None:
    """The kernels compute what the program computes."""
    for expected, found in zip(artifact.program.run_flat(list(tensors)), artifact.run_flat(tensors), strict=True):
        assert found.dtype == expected.dtype
        assert relative_error(expected, found) < tolerance
