"""The ONNX targets: which flavour, which opset, and how a program becomes an emission."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import onnx
import onnx_ir as ir

from sparc import codes
from sparc.cache import Cache
from sparc.codegen.onnx.emission import OnnxEmission
from sparc.codegen.onnx.emit import MS, Emitter, Rule
from sparc.codegen.onnx.extensions import extension_rule
from sparc.codegen.onnx.fuse import plan_fusions
from sparc.codegen.onnx.registry import fallback
from sparc.codegen.onnx.sites import RULES
from sparc.codegen.onnx.store import Store, stored_name
from sparc.codegen.onnx.table import TABLE
from sparc.diag import LoweringError
from sparc.program import Program
from sparc.suggest import hint as suggestion
from sparc.target import EmitContext, KernelUse, StoredTensor

_DEFAULT_OPSET = {"portable": 21, "cpu": 23, "cuda": 21}
_IR_VERSION = {18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12}


@dataclass(frozen=True)
class OnnxTarget:
    """Programs as ONNX models.

    Args:
        flavour: `portable` uses standard operators only; `cpu` also ONNX Runtime's own where they are faster; `cuda`
            those that have CUDA kernels.
        opset: the version of the standard operators, 18 to 24; 0 for the flavour's default.
    """

    flavour: Literal["portable", "cpu", "cuda"] = "cpu"
    opset: int = 0

    def __post_init__(self) -> None:
        if self.flavour not in _DEFAULT_OPSET:
            raise LoweringError(
                codes.UNKNOWN_NAME, f"ONNX has no flavour {self.flavour!r}", hint="portable, cpu or cuda"
            )
        if not self.opset:
            object.__setattr__(self, "opset", _DEFAULT_OPSET[self.flavour])
        if self.opset not in _IR_VERSION:
            raise LoweringError(codes.UNSUPPORTED_OPSET, f"opset {self.opset} is not supported", hint="18 to 24")

    @property
    def name(self) -> str:
        """`onnx`, `onnx:portable` or `onnx:cuda`."""
        return "onnx" if self.flavour == "cpu" else f"onnx:{self.flavour}"

    @property
    def legalizations(self) -> tuple[tuple[str, Mapping[str, Any]], ...]:
        """ONNX Runtime's CPU operators on resident weights take integer inputs: 16-bit ones by default, and blocks of
        8-bit ones in entries with a cache, whose attention reads queries, keys and values as one product.
        """
        if self.flavour != "cpu":
            return ()
        return (("stack_projections", {}), ("split_minimum", {}), ("quantize_activations", {"mode": "fine"}))

    @property
    def contrib(self) -> bool:
        """Whether ONNX Runtime's own operators may be used."""
        return self.flavour != "portable"

    def emit(self, program: Program, context: EmitContext) -> OnnxEmission:
        """Lower every entry.

        Args:
            program: any program; not edited.
            context: where remarks go; the option `opset` overrides the target's; extensions' lowerings.

        Raises:
            LoweringError: SPARC209 for an unknown option, SPARC401 for an operator without translation, SPARC407 for an
                opset that lacks one, SPARC408 when an extension's lowering fails.
        """
        target = self._with(context.options)
        signatures = [entry.signature for entry in program.entries.values()]
        reserved = frozenset(name for each in signatures for name in (*each.input_names, *each.output_names))
        store = Store(program.weights, reserved)
        kernels: dict[str, KernelUse] = {}
        extensions = extension_rule(context.lowerings, self.flavour)
        models = {}
        for name, entry in program.entries.items():
            plan = plan_fusions(program, entry, target)
            rules = [extensions, plan, *target.rules()]
            emitter = Emitter(
                program, entry, target, store, kernels, context.diagnostics, TABLE, rules, fallback, plan.lazy
            )
            models[name] = target._model(emitter.run(name))
        read = {stored_name(tensor.name) for model in models.values() for tensor in model.graph.initializer}
        stored = [each for each in store.tensors.values() if each.name in read]
        return OnnxEmission(self.name, models, stored, kernels, _caches(program))

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raises LoweringError: SPARC209 for an unknown option, SPARC407 for an opset that does not exist."""
        self._with(options)

    def _with(self, options: Mapping[str, Any]) -> "OnnxTarget":
        for name in options:
            if name != "opset":
                what = f"target {self.name!r} has no option {name!r}"
                raise LoweringError(codes.BAD_OPTION, what, hint=suggestion(name, ["opset"], kind="options"))
        opset = options.get("opset")
        if opset is not None and (not isinstance(opset, int) or isinstance(opset, bool)):
            raise LoweringError(codes.BAD_OPTION, f"option 'opset' is {opset!r}", why="expected a number, 18 to 24")
        return replace(self, opset=opset) if opset else self

    def load(
        self, program: Program, files: Mapping[str, bytes], stored: Sequence[StoredTensor], context: EmitContext
    ) -> OnnxEmission:
        """The emission of a saved artifact.

        Args:
            program: the artifact's program, for the names of its entries and their caches.
            files: its model files.
            stored: its tensors.
            context: not needed.
        """
        models: dict[str, onnx.ModelProto] = {}
        for index, name in enumerate(program.entries):
            models[name] = onnx.ModelProto.FromString(files["model.onnx" if index == 0 else f"{name}.onnx"])
        return OnnxEmission(self.name, models, list(stored), caches=_caches(program))

    def rules(self) -> list[Rule]:
        """The region translations of this flavour."""
        return list(RULES)

    def _model(self, graph: ir.Graph) -> onnx.ModelProto:
        if any(node.domain == MS for node in graph.all_nodes()):
            graph.opset_imports[MS] = 1
        return ir.to_proto(ir.Model(graph, ir_version=_IR_VERSION[self.opset], producer_name="sparc"))


def _caches(program: Program) -> dict[str, Cache]:
    return {name: entry.cache for name, entry in program.entries.items() if entry.cache is not None}
