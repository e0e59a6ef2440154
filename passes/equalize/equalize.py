"""Equalisation of channels: factors move from where a value is written to where it is read."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from sparc import codes
from sparc.contract import Bounded
from sparc.diag import PassError
from sparc.pass_base import Pass, PassContext, Stage
from sparc.passes.equalize.classes import ChannelClass, first_row, written
from sparc.passes.equalize.folds import class_fold, rescalable, rescale
from sparc.passes.rotate.weights import Store, name_of
from sparc.program import Program

_MOST = 2.0**10


@dataclass(frozen=True)
class Equalize(Pass):
    """f(g(x) ; w) with g(x) written by v => f(g(x) ; w / s) with v * s: the channels of a value get alike ranges.

    The factor of a channel is `s = columns^(1 - strength) / range^strength`, where `columns` is the largest weight that
    reads the channel and `range` the channel's largest magnitude. So the scale that a whole value shares when it is
    quantized fits every channel better. Only what commutes with positive factors lies between writer and reader;
    residual streams are rescaled as one. (Cross-layer equalisation, Nagel et al. 2019; with norms as writers and data,
    SmoothQuant.)

    ReLU6 and other clips do not commute with factors, so nothing is moved through them.

    Args:
        strength: 0 makes the readers' columns alike, 1 the ranges of the channels.
        ranges: where ranges come from: `data` (calibration) or `weights` (the largest weight and bias that write a
            channel).
    """

    name: ClassVar[str] = "equalize"
    stage: ClassVar[Stage] = Stage.EQUALIZE
    scope: ClassVar[str] = "program"

    strength: float = 0.5
    ranges: Literal["data", "weights"] = "data"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.strength <= 1:
            raise PassError(codes.BAD_OPTION, f"strength={self.strength!r}", hint="a number from 0 to 1")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The largest magnitude of every channel, when ranges come from data."""
        return frozenset({"absmax"}) if self.ranges == "data" else frozenset()

    @property
    def contract(self) -> Bounded:
        """The function stays the same."""
        return Bounded(1e-4)

    def watches(self, program: Program, context: PassContext) -> Iterator[tuple[fx.Node, str]]:
        """Every value of every class that will be rescaled."""
        for found in self._classes(program, context):
            for value, axis in found.values.items():
                yield value, f"absmax:{axis}"

    def run(self, program: Program, context: PassContext) -> None:
        """Rescale every class that a selected site reads."""
        for found in self._classes(program, context):
            extent = self._range(program, found, context)
            if extent is None:
                context.skip(found.writers[0], "no calibration data reached it")
            elif context.edit():
                factor = factors(extent, columns(program, found), self.strength)
                rescale(Store(program, context), class_fold(program, found), factor)

    def _classes(self, program: Program, context: PassContext) -> Iterator[ChannelClass]:
        selected = [use.node for site in context.sites(program) for use in site.uses]
        classes, refused = rescalable(program, selected)
        for reader, why in refused.items():
            context.skip(reader, f"its input cannot be rescaled: {why}")
        yield from classes

    def _range(self, program: Program, found: ChannelClass, context: PassContext) -> Tensor | None:
        if self.ranges == "weights":
            return torch.stack([_written(program, writer, found.size) for writer in found.writers]).amax(0)
        if context.statistics is None:
            return None
        seen = [context.statistics(value, f"absmax:{axis}") for value, axis in found.values.items()]
        return torch.stack(seen).amax(0) if all(each is not None for each in seen) else None


def factors(extent: Tensor, column: Tensor, strength: float) -> Tensor:
    """The factor of each channel, with geometric mean 1; 1 where a channel is never on or never read.

    Args:
        extent: `[channels]`, the largest magnitude of each channel.
        column: `[channels]`, the largest weight that reads each channel.
        strength: the power of `extent`; that of `column` is the rest.
    """
    live = (extent > 0) & (column > 0)
    logs = (1 - strength) * column.double().log() - strength * extent.double().log()
    if not bool(live.any()):
        return torch.ones_like(logs)
    logs = torch.where(live, logs - logs[live].mean(), torch.zeros_like(logs))
    return logs.exp().clamp(1 / _MOST, _MOST)


def columns(program: Program, found: ChannelClass) -> Tensor:
    """`[channels]`: the largest weight that reads each channel."""
    largest = []
    for reader in found.readers:
        weight = program.weights[name_of(reader.args[1])].double().abs()
        per_input = weight.reshape(weight.shape[0], weight.shape[1], -1).amax(-1)
        groups = found.size // weight.shape[1]
        largest.append(per_input.reshape(groups, -1, weight.shape[1]).amax(1).flatten())
    return torch.stack(largest).amax(0)


def _written(program: Program, writer: fx.Node, size: int) -> Tensor:
    """`[size]`: the largest weight that writes each channel, and its bias."""
    known = [program.weights[name_of(weight)].double().abs() for weight in written(writer)]
    largest = torch.stack([weight.reshape(weight.shape[0], -1).amax(1) for weight in known]).amax(0)
    return largest[first_row(writer) :][:size]
