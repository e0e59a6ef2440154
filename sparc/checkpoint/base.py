"""What a checkpoint becomes: a model with float32 weights, and the grid that each of its compressed weights lies on."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparc import codes
from sparc.diag import CaptureError, Location
from sparc.encoding.base import ElementEncoding
from sparc.encoding.dense import Dense
from sparc.encoding.grid import Grid
from sparc.encoding.int_grid import IntGrid

if TYPE_CHECKING:
    from sparc.diag import Diagnostics
    from sparc.program import Program


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A tensor of a checkpoint.

    Args:
        dense: its value, float32, contiguous.
        grid: what it was stored in, with the file's own scales and zero points or minima; None for float32.
        order: for weights whose columns are stored sorted by group, the column of x that each one multiplies, int64
            `[in]`.
    """

    dense: Tensor
    grid: Grid | None = None
    order: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model as it was stored; `sparc.compile` and `sparc.capture` take it where they take a model.

    Args:
        model: a plain module in eval mode with float32 weights, equal to what the file's codes stand for.
        grids: by the names of the model's parameters, the grids that they lie on.
        source: what was read: the format, and the architecture's name.
        notes: what of the file is not carried over, in words.
        tokenizer: a `tokenizers.Tokenizer`, where the file describes one that is known and the package is there.
        chat: the template of a conversation, where the file has one.
    """

    model: nn.Module
    grids: Mapping[str, Grid]
    source: str
    notes: tuple[str, ...] = ()
    tokenizer: Any = field(default=None, repr=False)
    chat: str | None = field(default=None, repr=False)

    def with_model(self, model: nn.Module) -> "Checkpoint":
        """The same weights in another module, such as one that wraps this one's; grids follow the parameters."""
        known = {id(self.model.get_parameter(name)): grid for name, grid in self.grids.items()}
        grids = {name: known[id(each)] for name, each in model.named_parameters() if id(each) in known}
        return replace(self, model=model, grids=grids)

    def attach(self, program: "Program", diagnostics: "Diagnostics | None" = None) -> "Program":
        """Give the weights of the model's program their grids, and say what was not carried over."""
        for name, grid in self.grids.items():
            stored = name if name in program.weights else program.weights.aliases.get(name, "")
            if stored in program.weights:
                program.set_weight(stored, program.weights[stored], grid)
        if diagnostics is not None:
            for note in self.notes:
                diagnostics.remark(codes.CHECKPOINT_PART_LEFT, note)
        return program


def decoded(spec: ElementEncoding, element_codes: Tensor, tensors: Mapping[str, Tensor], name: str) -> StoredWeight:
    """The weight that codes stand for.

    Where a group's scale is 0, every code means the same number, and the scale is stored as 1, so that nothing divides
    by 0.

    Args:
        spec: the encoding.
        element_codes: a code per element, `[out, in]`.
        tensors: the grid's tensors.
        name: the weight's name, for messages.

    Raises:
        CaptureError: SPARC106 when a value is not finite.
    """
    dense = spec.values(element_codes, tensors, torch.float32)
    if not bool(torch.isfinite(dense).all()):
        raise CaptureError(codes.BAD_WEIGHT, f"weight {name!r} contains NaN or Inf", where=Location(name))
    if isinstance(spec, IntGrid):
        tensors = {**tensors, "scale": tensors["scale"].masked_fill(tensors["scale"] == 0, 1)}
    again = spec.values(spec.codes(dense, tensors), tensors, torch.float32)
    dense = again if torch.equal(again, dense) else dense  # they may differ in the signs of zeros
    return StoredWeight(dense, Grid(spec, {key: tensor.contiguous() for key, tensor in tensors.items()}))


def plain(tensor: Tensor, name: str) -> StoredWeight:
    """A tensor that was stored as floats: float32; matrices of half precision lie on the grid of their own dtype.

    Raises:
        CaptureError: SPARC106 when a value is not finite, SPARC118 when it holds no floats.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in ("float16", "bfloat16", "float32", "float64"):
        raise CaptureError(codes.UNKNOWN_FORMAT, f"tensor {name!r} holds {dtype}, and nothing says what it means")
    grid = Grid(Dense(dtype)) if tensor.ndim == 2 and tensor.dtype.itemsize == 2 else None  # type: ignore[arg-type]
    dense = tensor.float().contiguous()
    if not bool(torch.isfinite(dense).all()):
        raise CaptureError(codes.BAD_WEIGHT, f"weight {name!r} contains NaN or Inf", where=Location(name))
    return StoredWeight(dense, grid)


def malformed(what: str, why: str = "") -> CaptureError:
    """SPARC117, to raise."""
    return CaptureError(codes.CHECKPOINT_MALFORMED, what, why=why)


def unknown(what: str, hint: str = "") -> CaptureError:
    """SPARC118, to raise."""
    return CaptureError(codes.UNKNOWN_FORMAT, what, hint=hint)
