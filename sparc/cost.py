"""What work costs on a device: flops and bytes as expressions in the program's dynamic sizes, and rooflines."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce

import sympy

_KIB = 1024


@dataclass(frozen=True)
class Cost:
    """Work, as sympy expressions; symbols are dynamic dimensions.

    Args:
        flops: multiplications and additions.
        bytes: read from and written to memory.
    """

    flops: sympy.Expr = field(default_factory=lambda: sympy.Integer(0))
    bytes: sympy.Expr = field(default_factory=lambda: sympy.Integer(0))

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Device:
    """A GPU, by its figures.

    Args:
        name: its name.
        capability: major * 10 + minor of its compute capability.
        multiprocessors: how many.
        bandwidth: bytes a second that a large copy reaches, reads and writes counted.
        flops: operations a second that a large product reaches, by the product's type.
        clock: cycles a second.
        shared_bytes: shared memory of one multiprocessor that programs may use.
        cache_bytes: of the second-level cache.
        launch: seconds from one kernel of a CUDA graph to the next.
        loop: seconds from the first instruction of a kernel to the first data, and from the last to its end.
    """

    name: str
    capability: int
    multiprocessors: int
    bandwidth: float
    flops: Mapping[str, float]
    clock: float
    shared_bytes: int
    cache_bytes: int
    launch: float = 1.3e-6
    latency: float = 1.5e-6

    @property
    def issue_rate(self) -> float:
        """Thread-instructions a second."""
        return self.multiprocessors * 128 * self.clock

    @property
    def arithmetic_rate(self) -> float:
        """Thread-instructions a second on the integer and logic units."""
        return self.multiprocessors * 64 * self.clock

    @property
    def shared_rate(self) -> float:
        """Accesses of shared memory a second, by one thread each."""
        return self.multiprocessors * 32 * self.clock

    def roofline(self, cost: Cost, product: str) -> sympy.Expr:
        """Seconds below which no kernel can do the work."""
        return sympy.Max(cost.bytes / self.bandwidth, cost.flops / self.flops[product])


def _flops(half: float, single: float, integer: float, eighth: float | None) -> dict[str, float]:
    found = {"float16": half, "bfloat16": half, "float32": single, "int8": integer}
    return found if eighth is None else {**found, "float8e4nv": eighth}


# Rates that copies and products were seen to reach, not those of data sheets, where they are known.
DEVICES: tuple[Device, ...] = (
    Device("NVIDIA A100", 80, 108, 1.7e12, _flops(260e12, 19e12, 480e12, None), 1.41e9, 164 * _KIB, 40 << 20),
    Device("NVIDIA GeForce RTX 3090", 86, 82, 0.85e12, _flops(70e12, 30e12, 250e12, None), 1.7e9, 100 * _KIB, 6 << 20),
    Device("NVIDIA L40S", 89, 142, 0.75e12, _flops(330e12, 80e12, 650e12, 650e12), 2.3e9, 100 * _KIB, 96 << 20),
    Device("NVIDIA H100", 90, 132, 3.0e12, _flops(800e12, 50e12, 1400e12, 1360e12), 1.755e9, 227 * _KIB, 50 << 20),
    Device("NVIDIA H200", 90, 132, 4.3e12, _flops(790e12, 50e12, 1400e12, 1360e12), 1.755e9, 227 * _KIB, 60 << 20),
    Device("NVIDIA B200", 100, 148, 7.0e12, _flops(1500e12, 75e12, 3000e12, 3000e12), 1.85e9, 227 * _KIB, 126 << 20),
    Device(
        "NVIDIA GeForce RTX 5090", 120, 170, 1.6e12, _flops(200e12, 90e12, 400e12, 400e12), 2.4e9, 99 * _KIB, 96 << 20
    ),
)


def device_of(capability: int, name: str = "") -> Device:
    """The profile of a GPU: by name if it is known, else the first with the greatest capability that is not above its
    own.
    """
    named = [device for device in DEVICES if device.name in name and device.capability == capability]
    if named:
        return named[0]
    below = [device for device in DEVICES if device.capability <= capability]
    return reduce(lambda best, device: device if device.capability > best.capability else best, below or DEVICES[:1])
