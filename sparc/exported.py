"""Programs from torch's own exported programs (`.pt2`): the export is done, only its calling convention must be
read.
"""

from typing import Any

from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from sparc.capture import to_program
from sparc.checkpoint.base import Checkpoint
from sparc.diag import Diagnostics
from sparc.program import Program
from sparc.signature import Frozen, Leaf, Signature, Structure


def capture_exported(
    exported: ExportedProgram, *, entry: str = "forward", diagnostics: Diagnostics | None = None
) -> Program:
    """A Program from an exported program; its dynamic dimensions keep torch's names.

    Args:
        exported: the exported program, in eval mode, on the CPU.
        entry: the entry's name.
        diagnostics: collects remarks.

    Raises:
        CaptureError: SPARC105, SPARC109 or SPARC111 when its graph cannot be a program.
    """
    arguments = [spec.arg for spec in exported.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    args_spec, kwargs_spec = exported.call_spec.in_spec.children()
    names = iter(arguments)
    parameters: list[str] = []
    structures: list[Structure] = []
    leaves: list[Leaf] = []
    keys = list(kwargs_spec.context or ())
    for index, child in enumerate([*args_spec.children(), *kwargs_spec.children()]):
        structure = Structure.of_spec(child)
        own = [next(names) for _ in range(structure.size)]
        keyword = index - args_spec.num_children
        name = keys[keyword] if keyword >= 0 else _own_name(own[0].name, structure.paths()[0])
        parameters.append(name)
        structures.append(structure)
        for path, argument in zip(structure.paths(name), own, strict=True):
            leaves.append(Leaf(path) if not hasattr(argument, "value") else Leaf(path, False, _frozen(argument)))
    output = Structure.of_spec(exported.call_spec.out_spec)
    signature = Signature(tuple(parameters), tuple(structures), tuple(leaves), output, (), tuple(parameters))
    return to_program(exported, signature, _symbol_names(exported), entry, {})


def _own_name(placeholder: str, path: str) -> str:
    """Torch names a nested input's first leaf `past_0_key`; without the path in it that is `past`."""
    return placeholder.removesuffix("_" + path.replace(".", "_")) if path else placeholder


def _frozen(argument: Any) -> Frozen:
    value: Frozen = argument.value
    return value


def _symbol_names(exported: ExportedProgram) -> dict[str, str]:
    values = [node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"]
    sizes = [size for value in pytree.tree_leaves(values) if hasattr(value, "shape") for size in value.shape]
    return {str(size): str(size) for size in sizes if not isinstance(size, int)}


def runnable(model: nn.Module | ExportedProgram | Checkpoint) -> nn.Module:
    """The module to call, of whatever compile takes."""
    if isinstance(model, Checkpoint):
        return model.model
    return model.module() if isinstance(model, ExportedProgram) else model
