"""Whether an emitted model is valid, and computes what the program computes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor

from sparc import codes
from sparc.diag import LoweringError
from sparc.encoding.operators import is_quantize
from sparc.program import Program

FLOAT32_TOLERANCE = 1e-4
HALF_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Parity:
    """How far one output of the emitted model is from the program's.

    Args:
        output: its name.
        difference: the largest absolute difference, relative to the largest absolute element of the program's output.
        tolerance: what was allowed.
    """

    output: str
    difference: float
    tolerance: float


def check_model(model: onnx.ModelProto) -> None:
    """Run onnx.checker and strict shape inference; weights need not be there.

    Raises:
        LoweringError: SPARC404 when either rejects the model.
    """
    try:
        onnx.checker.check_model(without_weights(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise LoweringError(codes.CHECKER_FAILED, "the model is not valid ONNX", why=str(error).strip()[:500]) from None


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every external initializer as an input of the same type."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    kept = [each for each in bare.graph.initializer if each.data_location != onnx.TensorProto.EXTERNAL]
    external = [each for each in bare.graph.initializer if each.data_location == onnx.TensorProto.EXTERNAL]
    inputs = [onnx.helper.make_tensor_value_info(each.name, each.data_type, each.dims) for each in external]
    del bare.graph.initializer[:]
    bare.graph.initializer.extend(kept)
    bare.graph.input.extend(inputs)
    return bare


def check_parity(
    program: Program,
    run: Callable[[Sequence[Tensor]], list[Tensor]],
    inputs: Sequence[Tensor],
    *,
    entry: str | None = None,
    reference: Mapping[str, Tensor] | None = None,
) -> list[Parity]:
    """Compare the emitted model with the program.

    Args:
        program: what was emitted.
        run: the emission's runner.
        inputs: one tensor per input.
        entry: which entry.
        reference: the uncompressed model's outputs by name, for programs that quantize activations. Such outputs cannot
            agree element by element, since a last bit flips roundings and every quantizer multiplies the flips; instead
            the emitted model's error against the reference may exceed the program's own by half (root mean square).
            Of other programs an output may differ by what they multiply rounding by: see what raises.

    Raises:
        LoweringError: SPARC402 when an output differs by more than 1e-4 (float32) or 2e-3 (half precision), relative to
            its largest element, and, if no activations are quantized, lies more than twice as far from the program in
            float64 as the program itself; or has another shape or type.
    """
    ours, theirs = run(inputs), program.run_flat(list(inputs), entry=entry)
    names, found = program.entry(entry).signature.output_names, []
    for index, (name, got, want) in enumerate(zip(names, ours, theirs, strict=True)):
        if got.shape != want.shape or got.dtype != want.dtype:
            shapes = f"{got.dtype} {list(got.shape)} for {want.dtype} {list(want.shape)}"
            raise LoweringError(codes.PARITY_FAILED, f"output {name!r} has another type: {shapes}")
        tolerance = HALF_TOLERANCE if want.dtype in (torch.float16, torch.bfloat16) else FLOAT32_TOLERANCE
        parity = Parity(name, difference(got, want), tolerance)
        if reference is not None and name in reference and quantizes_activations(program):
            own, emitted = (rms_error(each, reference[name]) for each in (want, got))
            parity = Parity(name, parity.difference, parity.difference if emitted <= 1.5 * own else tolerance)
        elif parity.difference > tolerance and want.is_floating_point():  # maybe rounding itself is multiplied so far
            exact = program.run_flat(list(inputs), entry=entry, wide=True)[index]
            own, emitted = (difference(each, exact) for each in (want, got))
            parity = Parity(name, parity.difference, parity.difference if emitted <= 2 * own else tolerance)
        if not parity.difference <= parity.tolerance:
            raise LoweringError(
                codes.PARITY_FAILED,
                f"output {name!r} differs by {parity.difference:.2e}, more than {parity.tolerance:.2e}",
                hint="compile with other inputs, or report it with the model",
            )
        found.append(parity)
    return found


def quantizes_activations(program: Program) -> bool:
    """Whether any entry of the program quantizes an activation."""
    return any(is_quantize(node) for _, node in program.nodes())


def rms_error(got: Tensor, want: Tensor) -> float:
    """The root mean square of the difference."""
    return float((got.double() - want.double()).square().mean().sqrt())


def difference(got: Tensor, want: Tensor) -> float:
    """The largest absolute difference relative to the largest finite element of `want`; NaN and infinities must agree.

    Integers and booleans are either equal (0) or not (infinite).
    """
    if not want.is_floating_point():
        return 0.0 if torch.equal(got, want) else float("inf")
    finite = torch.isfinite(want)
    odd_got, odd_want = got[~finite], want[~finite]
    if not bool(((odd_got == odd_want) | (odd_got.isnan() & odd_want.isnan())).all()):
        return float("inf")
    got, want = got[finite].double(), want[finite].double()
    if not want.numel():
        return 0.0
    largest = float((got - want).abs().max())
    scale = float(want.abs().max())
    return largest / scale if scale else largest
