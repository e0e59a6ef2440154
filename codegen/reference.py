"""The target `reference`: the program itself, run in eager torch. It defines what every other target must compute."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparc import codes
from sparc.diag import LoweringError
from sparc.encoding.operators import is_decode
from sparc.execute import execute
from sparc.generation.session import CachedRun
from sparc.generation.static_cache import StaticCache, in_place
from sparc.program import Program, is_weight
from sparc.target import EmitContext, KernelUse, Runner, Span, StoredTensor


class ReferenceEmission:
    """A program that stays as it is; its weights are stored under their own names."""

    native = True

    def __init__(self, program: Program) -> None:
        """Args: the program."""
        self.target = "reference"
        self._program = program
        self.stored = [StoredTensor(name, tensor, name) for name, tensor in program.weights.items()]
        self.kernels: Mapping[str, KernelUse] = _kernels(program)

    def runner(self, entry: str | None = None, *, threads: int | None = None, spin: bool = True) -> Runner:
        """Runs the entry in eager torch; `threads` holds for the duration of a call, and `spin` changes nothing."""

        def run(tensors: Sequence[Tensor]) -> list[Any]:
            before = torch.get_num_threads()
            if threads is None or threads == before:
                return self._program.run_flat(list(tensors), entry=entry)
            torch.set_num_threads(threads)
            try:
                return self._program.run_flat(list(tensors), entry=entry)
            finally:
                torch.set_num_threads(before)

        return run

    def session(self, entry: str, batch: int, length: int, *, threads: int | None = None) -> CachedRun | None:
        """The entry with its cache in buffers; None when the cache grows in another way than at its end."""
        called = self._program.entries[entry]
        assert called.cache is not None
        signature = called.signature
        graph = in_place(called.graph, called.cache, signature.input_names, signature.output_names)
        if graph is None:
            return None
        return StaticCache(called, lambda given: execute(graph, self._program.weights, given), batch, length)

    def check(
        self, program: Program, inputs: Mapping[str, Sequence[Tensor]], reference: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, float]:
        """Nothing to compare: it is the program that runs."""
        return {}

    def files(self, spans: Mapping[str, Span]) -> Mapping[str, bytes]:
        """None: the program is all there is."""
        return {}


class ReferenceTarget:
    """Eager torch."""

    name = "reference"
    legalizations: Sequence[tuple[str, Mapping[str, Any]]] = ()

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raises LoweringError SPARC209 for any option: it has none."""
        if options:
            what = f"target {self.name!r} has no option {next(iter(options))!r}"
            raise LoweringError(codes.BAD_OPTION, what, hint="leave options= out")

    def emit(self, program: Program, context: EmitContext) -> ReferenceEmission:
        """The program as it is."""
        return ReferenceEmission(program.clone())

    def load(
        self, program: Program, files: Mapping[str, bytes], stored: Sequence[StoredTensor], context: EmitContext
    ) -> ReferenceEmission:
        """The saved program as it is."""
        return ReferenceEmission(program)


def _kernels(program: Program) -> dict[str, KernelUse]:
    uses: dict[str, KernelUse] = {}
    for _, node in program.nodes():
        if is_decode(node) and all(is_weight(part) for part in node.args[0]):  # type: ignore[union-attr]
            names = [str(part.target) for part in node.args[0]]  # type: ignore[union-attr]
            origins = program.weights.record(names[0]).origins
            site = origins[0] if origins else names[0]
            uses[site] = KernelUse("sparc::decode", sum(program.weights[name].nbytes for name in names))
    return uses
