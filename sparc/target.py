"""What a target is, and what it hands over: the interfaces between the core and `sparc.codegen`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from sparc.diag import Diagnostics
from sparc.layout import IDENTITY
from sparc.ledger import Ratio
from sparc.program import Program

Runner = Callable[[Sequence[Tensor]], list[Tensor]]
Lowering = Callable[..., Any]


@dataclass(frozen=True)
class Masked:
    """Which elements of a stored matrix a program's weight keeps, where the target has no operator for zeros.

    Args:
        spec: the `MaskEncoding`, as text.
        shape: the matrix's, `[batch..., out, reduce]`.
        parts: the program weights that hold the mask, by part name.
    """

    spec: str
    shape: tuple[int, ...]
    parts: Mapping[str, str]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the emitted model.

    Args:
        name: its name in the emitted model and in `weights.safetensors`.
        tensor: as the target stores it.
        weight: the program weight it is, if it is one.
        layout: how it was stored (`sparc.layout`), so that the program's weight can be restored from it.
        masked: given when the tensor holds the codes of every element, and the weight those a mask keeps.
        site: the original weight it was made from while emitting, for the report; empty when it is a program weight.
    """

    name: str
    tensor: Tensor
    weight: str | None = None
    layout: str = IDENTITY
    masked: Masked | None = None
    site: str = ""


@dataclass(frozen=True)
class Span:
    """Where a tensor's bytes lie in a file: offset and length in bytes."""

    offset: int
    length: int


@dataclass
class KernelUse:
    """How the target carries one compressed or compressible weight.

    Args:
        operator: the runtime operator, such as `MatMulNBits`.
        resident_bytes: bytes the runtime keeps in memory for the weight and its parameters.
        note: why it is not carried in its encoded form, if it is not.
    """

    operator: str
    resident_bytes: int
    note: str = ""


class Emission(Protocol):
    """What a target made of a program."""

    target: str
    stored: list[StoredTensor]
    kernels: Mapping[str, KernelUse]  # by the name of the weight's site: the original weight's name

    @property
    def native(self) -> bool:
        """Whether this machine can run it as the user's would: if not, times are estimates, and `estimate` gives
        one.
        """
        ...

    def runner(self, entry: str | None = None, *, threads: int | None = None, spin: bool = True) -> Runner:
        """A callable on one tensor per placeholder, in the target's runtime.

        Args:
            entry: the entry's name; the first by default.
            threads: threads of one operator; the runtime's own choice by default.
            spin: whether idle threads wait actively. It saves time between operators, but takes it from whatever else
                runs: do without when two runners are timed in turns.
        """
        ...

    def check(
        self, program: Program, inputs: Mapping[str, Sequence[Tensor]], reference: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, float]:
        """Check that what was emitted is valid and computes what the program computes.

        Args:
            program: what was emitted.
            inputs: for each entry to run, one tensor per placeholder.
            reference: for each entry, the uncompressed model's outputs by name: where the program quantizes
                activations,
                an output may differ by half the program's own error.

        Returns:
            For each output, its largest relative difference from the program's.

        Raises:
            LoweringError: SPARC402 or SPARC404.
        """
        ...

    def files(self, spans: Mapping[str, Span]) -> Mapping[str, bytes]:
        """The target's own files for the artifact's folder; their tensors live in `weights.safetensors`.

        Args:
            spans: where each stored tensor's bytes lie in `weights.safetensors`, by name.
        """
        ...


@dataclass
class EmitContext:
    """What a target may use while emitting.

    Args:
        diagnostics: where remarks go.
        options: target options given to compile (opset, for example).
        lowerings: extensions' lowerings by (target, encoding's class name or operator's name); the target says what
            they are called with.
    """

    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    options: Mapping[str, Any] = field(default_factory=dict)
    lowerings: Mapping[tuple[str, str], Lowering] = field(default_factory=dict)


@runtime_checkable
class Estimating(Protocol):
    """An emission that can say what it would take where it cannot be run."""

    def estimate(self, tensors: Sequence[Tensor], entry: str | None = None) -> Ratio:
        """The time of an entry against the uncompressed one, by a cost model, at the shapes of `tensors`."""
        ...


@runtime_checkable
class Target(Protocol):
    """A place programs are lowered to, spelt `family` or `family:variant` (`onnx:portable`).

    `legalizations` are passes, as (name, options), that the target needs just before weights are encoded, because its
    operators do more than a recipe says: so the program says it too, and its numbers are the target's.
    """

    @property
    def name(self) -> str:
        """How users spell it."""
        ...

    @property
    def legalizations(self) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """The passes it needs."""
        ...

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse options that `emit` could not use; asked before anything is done.

        Raises:
            LoweringError: SPARC209, SPARC407.
        """
        ...

    def emit(self, program: Program, context: EmitContext) -> Emission:
        """Lower a program. The program may be used and edited afterwards; the emission shares its tensors.

        Raises:
            LoweringError: SPARC4xx.
        """
        ...

    def load(
        self, program: Program, files: Mapping[str, bytes], stored: Sequence[StoredTensor], context: EmitContext
    ) -> Emission:
        """The emission of a saved artifact, from its files and tensors; `context` holds no options."""
        ...
