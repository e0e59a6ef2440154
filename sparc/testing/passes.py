"""The contract of a pass, as one assertion, and wrong twins that the contract must catch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from sparc.capture import capture
from sparc.contract import Approximate, Exact
from sparc.diag import PassError, VerifyError
from sparc.driver import Driver
from sparc.encoding.parse import BUILTIN, parse_spec
from sparc.ledger import PassRow
from sparc.match import Match
from sparc.pass_base import Pass, Samples
from sparc.program import Program
from sparc.rewrite import RewritePass, Skip, rewrite
from sparc.serialize import program_from_dict, program_to_dict
from sparc.verify import relative_error

FACTOR = 1 + 1e-6


def assert_pass(
    step: Pass,
    module: nn.Module,
    inputs: Any,
    *,
    dynamic: Mapping[str, Mapping[int, Any]] | None = None,
    calibration: list[list[Tensor]] | None = None,
) -> tuple[Program, PassRow]:
    """Check everything that sparc relies on in a pass, on one model that it changes.

    The pass changes the program and keeps its contract at every match (types, regions and outputs); run again, it
    changes nothing; the result survives being written and read back; and, when there is a dynamic dimension, the
    contract holds for twice the example's size.

    Args:
        step: the pass.
        module: a model that the pass must change.
        inputs: example inputs, as `capture` takes them.
        dynamic: dynamic dimensions, as `capture` takes them.
        calibration: flat inputs for a pass that needs statistics.

    Returns:
        The program after the pass, and the driver's row.

    Raises:
        AssertionError: it says what does not hold.
        VerifyError: the contract is broken, with the guilty match.
    """
    program = capture(module, inputs, dynamic=dynamic)
    named = inputs if isinstance(inputs, Mapping) else None
    flat = program.main.signature.bind(() if named is not None else tuple(inputs), named or {})
    entry = next(iter(program.entries))
    samples = Samples({entry: [flat]}, {entry: calibration or [flat]})
    driver = Driver(program, samples, verify="full")
    row = driver.run(step)
    assert row.changed, f"{step} changes nothing: {[skip.why for skip in row.skips]}"
    changed = driver.program
    if not isinstance(step.contract, Approximate):
        again = driver.run(step)
        assert not again.changed, f"{step} changes its own result: {again.changed} edits"
    _check_stored(changed, flat)
    if dynamic:
        _check_other_size(step, program, changed, dynamic)
    return changed, row


def _check_stored(program: Program, flat: list[Tensor]) -> None:
    described = program_to_dict(program)
    parse = cast(Callable[[str], Any], lambda text: parse_spec(text, BUILTIN))
    read, _ = program_from_dict(described.program, described.tensors.__getitem__, parse)
    assert read.text() == program.text(), "the program that is read back has another text"
    pairs = zip(program.run_flat(flat), read.run_flat(flat), strict=True)
    assert all(_equal(a, b) for a, b in pairs), "the program that is read back computes something else"


def _check_other_size(step: Pass, before: Program, after: Program, dynamic: Mapping[str, Mapping[int, Any]]) -> None:
    signature = before.main.signature
    name = next(str(dimension) for axes in dynamic.values() for dimension in axes.values())
    flat = []
    for leaf, node in zip(signature.input_names, before.main.placeholders, strict=True):
        kind = node.meta["val"]
        sizes = [int(size) if isinstance(size, int) else int(size.node.hint) for size in kind.shape]
        axes = [axis for axis, dimension in dynamic.get(leaf, {}).items() if str(dimension) == name]
        for axis in axes:
            sizes[axis] *= 2
        flat.append(_made(sizes, kind.dtype))
    bound = 0.0 if isinstance(step.contract, Exact) else getattr(step.contract, "rtol", None)
    for a, b in zip(before.run_flat(flat), after.run_flat(flat), strict=True):
        assert a.shape == b.shape, f"with twice the size of {name!r} an output has shape {tuple(b.shape)}"
        if bound is not None and a.is_floating_point():
            error = relative_error(a, b)
            assert error <= bound, f"with twice the size of {name!r} the outputs differ by {error:.3g}"


def _made(sizes: list[int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if dtype.is_floating_point:
        return torch.randn(sizes, generator=generator).to(dtype)
    return torch.randint(0, 2, sizes, generator=generator).to(dtype)


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


# mutants -------------------------------------------------------------------------------------------------------------
@dataclass
class Mutation:
    """One fault that a rewrite's function could have.

    Args:
        name: what is wrong.
        applied: how often the fault changed something.
    """

    name: str
    applied: int = 0


class _Faulty:
    """A match whose function makes a mistake: it stands before the real `Match`."""

    def __init__(self, match: Match, mutation: Mutation) -> None:
        self._match = match
        self._mutation = mutation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._match, name)

    @property
    def op(self) -> "_FaultyInserter":
        return _FaultyInserter(self._match.op, self._mutation)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return _insert(lambda *a, **k: self._match.call(target, *a, **k), target._opname, args, kwargs, self._mutation)

    def constant(self, tensor: Tensor, like: str, name: str | None = None, of: Sequence[fx.Node] = ()) -> fx.Node:
        if self._mutation.name == "ScaledConstant" and tensor.is_floating_point():
            self._mutation.applied += 1
            tensor = tensor.double() * FACTOR
        return self._match.constant(tensor, like, name, of)


class _FaultyInserter:
    def __init__(self, inserter: Any, mutation: Mutation) -> None:
        self._inserter = inserter
        self._mutation = mutation

    def __getattr__(self, name: str) -> Callable[..., fx.Node]:
        return lambda *args, **kwargs: _insert(getattr(self._inserter, name), name, args, kwargs, self._mutation)


def _insert(insert: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Any, mutation: Mutation) -> fx.Node:
    same = len(args) > 1 and _same_type(args[0], args[1])
    if mutation.name == "DroppedTerm" and name in ("add", "sub", "mul") and isinstance(args[0], fx.Node) and same:
        mutation.applied += 1
        return args[0]
    if mutation.name == "SwappedOperands" and same and name not in ("add", "mul"):
        mutation.applied += 1
        args = (args[1], args[0], *args[2:])
    if mutation.name == "DroppedArgument" and len(args) > 2 and isinstance(args[-1], fx.Node) and name in _OPTIONAL:
        mutation.applied += 1
        args = args[:-1]
    return cast(fx.Node, insert(*args, **kwargs))


_OPTIONAL = ("linear", "conv1d", "conv2d", "conv3d", "rms_norm", "layer_norm")


def _same_type(a: Any, b: Any) -> bool:
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return False
    first, second = a.meta.get("val"), b.meta.get("val")
    if a is b or not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return False
    return first.dtype == second.dtype and str(first.shape) == str(second.shape)


def _spoil(match: Match, result: fx.Node, mutation: Mutation) -> fx.Node:
    """The result with a wrong sign or a wrong factor."""
    floating = result.meta["val"].is_floating_point()
    if mutation.name == "FlippedSign":
        mutation.applied += 1
        return match.op.neg(result) if floating else match.op.bitwise_not(result)  # type: ignore[no-any-return]
    if mutation.name == "ScaledResult" and floating:
        mutation.applied += 1
        return match.op.mul(result, FACTOR)  # type: ignore[no-any-return]
    return result


MUTATIONS = ("DroppedTerm", "SwappedOperands", "DroppedArgument", "FlippedSign", "ScaledResult", "ScaledConstant")


def mutants(step: RewritePass) -> dict[str, tuple[RewritePass, Mutation]]:
    """Wrong twins of a rewrite, by what is wrong with them; each with the record of how often its fault took effect.

    A dropped term or argument, swapped operands, a flipped sign, a result or a new weight that is off by a factor of
    1 + 1e-6. Twins promise what the original promises, so the driver must reject each whose fault took effect.
    """
    return {name: _mutant(step, Mutation(name)) for name in MUTATIONS}


def _mutant(step: RewritePass, mutation: Mutation) -> tuple[RewritePass, Mutation]:
    kind: Any = type(step)

    def function(match: Match) -> Any:
        result = kind._function(_Faulty(match, mutation))
        if result is None or isinstance(result, Skip):
            return result
        if isinstance(result, tuple):
            return tuple(_spoil(match, each, mutation) for each in result)
        return _spoil(match, result, mutation)

    function.__name__, function.__doc__ = f"{step.name}_{mutation.name}", f"{step.name} with a fault: {mutation.name}."
    make = rewrite(find=kind._find, contract=step.contract, stage=step.stage, single_use=kind._single_use)
    return make(function), mutation


def assert_mutants_caught(
    step: RewritePass, module: nn.Module, inputs: Any, *, dynamic: Mapping[str, Mapping[int, Any]] | None = None
) -> list[str]:
    """Check that the contract rejects every wrong twin of a rewrite whose fault takes effect on this model.

    Returns:
        The names of the faults that took effect and were caught.

    Raises:
        AssertionError: a fault went through, or none took effect.
    """
    caught = []
    for name, (twin, mutation) in mutants(step).items():
        program = capture(module, inputs, dynamic=dynamic)
        named = inputs if isinstance(inputs, Mapping) else None
        flat = program.main.signature.bind(() if named is not None else tuple(inputs), named or {})
        driver = Driver(program, Samples({next(iter(program.entries)): [flat]}), verify="full")
        try:
            driver.run(twin)
        except (VerifyError, PassError):
            if mutation.applied:
                caught.append(name)
            continue
        assert not mutation.applied, f"{name} of {step.name} went through its contract {step.contract}"
    assert caught, f"no fault of {step.name} took effect on this model"
    return caught
