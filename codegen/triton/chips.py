"""What the target needs of this machine: Triton, and the GPU, if there is one."""

import re
from importlib import metadata

import torch

from sparc import codes
from sparc.cost import Device, device_of
from sparc.diag import LoweringError

LEAST_TRITON = (3, 6)
LEAST_CAPABILITY = 80
CAPABILITIES = (80, 86, 89, 90, 100, 120)


def require_triton() -> None:
    """Raises LoweringError: SPARC410 when Triton is missing or too old."""
    for name in ("triton", "pytorch-triton", "triton-windows"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
        if found >= LEAST_TRITON:
            return
        why = f"{name} {version} is installed, and 3.6 is the first that will do"
        raise LoweringError(codes.TARGET_UNAVAILABLE, "Triton is too old", why=why, hint="pip install 'triton>=3.6'")
    raise LoweringError(codes.TARGET_UNAVAILABLE, "Triton is not installed", hint="pip install 'sparc-compiler[cuda]'")


def local_capability() -> int | None:
    """The compute capability of the current GPU, as major * 10 + minor; None without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return major * 10 + minor


def find_device(capability: int | None) -> Device:
    """The profile of the chip to generate for.

    Args:
        capability: the chip's, or None for the GPU of this machine.

    Raises:
        LoweringError: SPARC410 when there is none, or it is too old.
    """
    here = local_capability()
    if capability is None:
        if here is None:
            raise LoweringError(
                codes.TARGET_UNAVAILABLE,
                'there is no GPU here, and target="cuda" means the one of this machine',
                hint='name the chip to compile for: target="cuda:sm_90"',
            )
        if here < LEAST_CAPABILITY:
            why = f"{torch.cuda.get_device_name()} has compute capability {here / 10}, and 8.0 is the least"
            raise LoweringError(codes.TARGET_UNAVAILABLE, "the GPU is too old", why=why, hint='use target="onnx:cuda"')
        capability = max((each for each in CAPABILITIES if each <= here and each // 10 == here // 10), default=0)
        if not capability:
            why = f"{torch.cuda.get_device_name()} has compute capability {here / 10}"
            raise LoweringError(
                codes.TARGET_UNAVAILABLE, "the GPU is not known", why=why, hint='use target="onnx:cuda"'
            )
    return device_of(capability, torch.cuda.get_device_name() if here == capability else "")


def runs_here(capability: int) -> bool:
    """Whether kernels generated for a chip can be launched on this machine's GPU."""
    here = local_capability()
    return here is not None and here // 10 == capability // 10 and here >= capability
