"""The targets `cuda` (the GPU of this machine) and `cuda:sm_NN` (a chip that is named: no GPU is needed to compile)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparc import codes
from sparc.codegen.triton.chips import LEAST_CAPABILITY, find_device, require_triton, runs_here
from sparc.cost import Device, device_of
from sparc.diag import LoweringError, SparcError
from sparc.program import Program
from sparc.serialize import schema
from sparc.suggest import hint as suggestion
from sparc.target import Emission, EmitContext, StoredTensor

_OPTIONS = {"verify_kernels": bool, "tune": bool, "tuning_folder": str}


@dataclass(frozen=True)
class TritonTarget:
    """Programs as Triton kernels, and torch.compile for the rest.

    Args:
        capability: of the chip, as major * 10 + minor; None for the GPU of this machine.
    """

    capability: int | None = None

    @property
    def name(self) -> str:
        """`cuda` or `cuda:sm_90`."""
        return "cuda" if self.capability is None else f"cuda:sm_{self.capability}"

    @property
    def legalizations(self) -> tuple[tuple[str, Mapping[str, Any]], ...]:
        """None: kernels compute what the program says."""
        return ()

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse options that do not exist, and machines where the target cannot be used.

        Args:
            options: `verify_kernels`: whether every kernel is compiled to machine code and judged, so that one that
                spills or does not fit is replaced (True); `tune`: whether candidates are timed, where this machine has
                the GPU (True); `tuning_folder`: where times are kept (`~/.cache/sparc`).

        Raises:
            LoweringError: SPARC209, SPARC410.
        """
        for name, value in options.items():
            if name not in _OPTIONS:
                what = f"target {self.name!r} has no option {name!r}"
                raise LoweringError(codes.BAD_OPTION, what, hint=suggestion(name, list(_OPTIONS), kind="options"))
            if not isinstance(value, _OPTIONS[name]):
                raise LoweringError(
                    codes.BAD_OPTION, f"option {name!r} is {value!r}", why=f"expected a {_OPTIONS[name].__name__}"
                )
        require_triton()
        find_device(self.capability)

    def emit(self, program: Program, context: EmitContext) -> Emission:
        """Lower every entry.

        Args:
            program: any program; not edited.
            context: where remarks go; options; extensions' lowerings by ("cuda", encoding's class name).

        Raises:
            LoweringError: SPARC209, SPARC408 when an extension's lowering fails, SPARC410.
        """
        self.check_options(context.options)
        from sparc.codegen.triton.accept import acceptance
        from sparc.codegen.triton.choice import ByCost

        device = find_device(self.capability)
        verified = context.options.get("verify_kernels", True)
        tuner = self._tuner(device, context)
        choose = ByCost(device, acceptance(device.capability) if verified else None, tuner)
        emission = self._emission(program, context, device, lambda entry: choose)
        if tuner is not None:
            tuner.cache.write()
            emission.timings.update(tuner.timings)
        return emission

    def _emission(self, program: Program, context: EmitContext, device: Device, choice: Callable[[str], Any]) -> Any:
        """Lower every entry; `choice` gives what chooses kernels in it."""
        from sparc.codegen.triton.emission import TritonEmission
        from sparc.codegen.triton.lower import lower

        extensions = {key[1]: _guarded(made, key[1]) for key, made in context.lowerings.items() if key[0] == "cuda"}
        own = program.clone()
        lowered = {
            name: lower(own, entry, device, extensions, context.diagnostics, choice(name))
            for name, entry in own.entries.items()
        }
        return TritonEmission(self.name, device, own, lowered, context.diagnostics)

    def _tuner(self, device: Device, context: EmitContext) -> Any:
        """What times candidates; None where there is no such GPU, or it is not wanted."""
        if not context.options.get("tune", True) or not runs_here(device.capability):
            return None
        from sparc.codegen.triton.tuning import Tuner, TuningCache, default_folder

        folder = Path(context.options.get("tuning_folder") or default_folder())
        return Tuner(TuningCache(folder, torch.cuda.get_device_name()), context.diagnostics)

    def load(
        self, program: Program, files: Mapping[str, bytes], stored: Sequence[StoredTensor], context: EmitContext
    ) -> Emission:
        """The emission of a saved artifact: kernels are generated anew, in the ranges that `kernels.json` records; no
        code is read.

        Args:
            program: the artifact's program.
            files: its files.
            stored: its tensors.
            context: extensions' lowerings, and where remarks go.
        """
        require_triton()
        from sparc.codegen.triton.accept import acceptance
        from sparc.codegen.triton.choice import ByCost, Recorded

        described = schema.from_json(files["kernels.json"], "kernels.json")
        capability = schema.integer(described.get("capability"), "the capability", LEAST_CAPABILITY, 999)
        device = device_of(capability, schema.text(described.get("chip"), "the chip", 128))
        sites = schema.items(described.get("sites"), "the sites")
        anew = ByCost(device, acceptance(capability))
        return self._emission(
            program, context, device, lambda entry: Recorded(sites, entry, device, anew, context.diagnostics)
        )


def _guarded(made: Callable[..., Any], name: str) -> Callable[..., Any]:
    """An extension's lowering, whose errors say whose they are."""

    def build(*args: Any) -> Any:
        from sparc.codegen.triton.tiles import WeightLowering

        what = f"the lowering of {name} for cuda that an extension registers failed"
        try:
            lowering = made(*args)
        except Exception as error:  # a stranger's code may raise anything
            said = error.diagnostic.what if isinstance(error, SparcError) else f"{type(error).__name__}: {error}"
            raise LoweringError(codes.LOWERING_FAILED, what, why=said) from error
        if not isinstance(lowering, (WeightLowering, str)):
            why = f"it returned a {type(lowering).__name__}, which is no WeightLowering"
            raise LoweringError(codes.LOWERING_FAILED, what, why=why)
        return lowering

    return build
