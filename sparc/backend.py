"""`torch.compile(model, backend="sparc")`: every fragment that TorchDynamo captures is compressed, or runs in eager
torch and says why.
"""

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from sparc import codes, dynamo
from sparc.analysis.sites import find_sites
from sparc.api import RecipeLike, check_job, compile_program
from sparc.artifact import Artifact
from sparc.diag import CaptureError, Diagnostics, Severity, SparcError, SparcWarning
from sparc.options import unknown_option
from sparc.program import Program
from sparc.samples import make_samples
from sparc.source import source_line
from sparc.traced import Traced, carry_sizes, program_of
from sparc.views import Results, address, owned, plan_results

_MOST_COPIES = 64
_OPTIONS = ("recipe", "target", "verify", "options", "fragments")


@dataclass(eq=False)
class Fragment:
    """One piece of a model as dynamo captured it.

    Args:
        where: the first line of the user's code in it.
        artifacts: what it was compiled to: one for each set of weights that it was called with.
        diagnostics: why it runs in eager torch, if it does.
    """

    where: str
    artifacts: list[Artifact] = field(default_factory=list)
    diagnostics: Diagnostics = field(default_factory=Diagnostics)

    @property
    def compiled(self) -> bool:
        """Whether it has an artifact."""
        return bool(self.artifacts)

    def remark(self, error: SparcError) -> None:
        """Say, once, why something runs in eager torch."""
        diagnostic = replace(error.diagnostic, severity=Severity.WARNING)
        if diagnostic not in self.diagnostics:
            self.diagnostics.add(diagnostic)
            where = f" ({self.where})" if self.where else ""
            said = f"a fragment of the model{where} runs in eager torch\n{diagnostic}"
            warnings.warn(SparcWarning(said), stacklevel=2)


class Backend:
    """A backend of torch.compile with its options; `fragments` lists what was compiled and what was not.

        backend = Backend(recipe="w8", target="onnx")
        fast = torch.compile(model, backend=backend)
        fast(x)
        print(backend.fragments[0].artifacts[0].report)

    The arguments are those of `sparc.compile`, but that `verify` is `types` by default: a model may be many fragments,
    compiled while somebody waits, and every artifact's results are compared with the fragment's in any case.
    """

    def __init__(
        self,
        recipe: RecipeLike = "w8",
        target: str = "onnx",
        verify: str = "types",
        options: Mapping[str, Any] | None = None,
        fragments: list[Fragment] | None = None,
    ) -> None:
        """Check the options.

        Args:
            recipe: as in `sparc.compile`.
            target: likewise.
            verify: likewise.
            options: options of the target.
            fragments: gets a record of every fragment; a new list by default.

        Raises:
            SparcError: SPARC201 to SPARC213, SPARC407.
        """
        self.__name__ = "sparc"  # what torch.compile calls it
        self.job = check_job(recipe, target, verify, options, Diagnostics())
        self.fragments = fragments if fragments is not None else []

    def __call__(self, module: fx.GraphModule, values: Sequence[Any]) -> Callable[..., Any]:
        """Compile a fragment; torch.compile calls this.

        Args:
            module: the fragment.
            values: its example inputs, weights among them.

        Returns:
            A function of the same inputs and results.
        """
        fragment = Fragment(_where(module))
        self.fragments.append(fragment)
        try:
            _check_mode(module, self.job.target.name)
            with dynamo.outside_of_dynamo():
                traced = dynamo.trace(module, values)
                results = plan_results(traced.graph, traced.placeholders)
                carry_sizes(traced, results.computed)
                run = _Compiled(self, fragment, module.forward, traced, results)
                return run if run.first(values) else module.forward
        except SparcError as error:
            fragment.remark(error)
            return module.forward


def compile_fragment(
    module: fx.GraphModule, values: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend named `sparc`.

    Args:
        module: the fragment.
        values: its example inputs.
        options: those of `Backend`: `torch.compile(model, backend="sparc", options={"recipe": "w4"})`.

    Raises:
        SparcError: SPARC201 to SPARC213, SPARC407.
    """
    given = dict(options or {})
    for name in given:
        if name not in _OPTIONS:
            raise unknown_option(name, _OPTIONS, "the backend sparc")
    return Backend(**given)(module, values)


class _Compiled:
    """A compiled fragment. Weights are looked at on every call: compressed copies are of one state of theirs."""

    def __init__(
        self, backend: Backend, fragment: Fragment, eager: Callable[..., Any], traced: Traced, results: Results
    ) -> None:
        self.job = backend.job
        self.fragment = fragment
        self.eager: Callable[..., Any] = eager
        self.traced = traced
        self.results = results
        kinds = [argument.kind for argument in traced.arguments]
        self.weights = [index for index, kind in enumerate(kinds) if kind == "weight"]
        self.inputs = [index for index, kind in enumerate(kinds) if kind == "input"]
        self.copies: dict[tuple[int, ...], _Copy] = {}
        self.count = 0

    def first(self, values: Sequence[Any]) -> bool:
        """Compile for the weights of the example; False when there is nothing to compress."""
        program = program_of(self.traced, self.results.computed, values)
        if not find_sites(program)[0]:
            return False
        self._compile(program, values)
        return True

    def __call__(self, *values: Any) -> Any:
        weights = [values[index] for index in self.weights]
        copy = self.copies.get(tuple(map(id, weights)))
        if copy is None or not copy.fits(weights):
            copy = self._again(weights, values)
        if copy.artifact is None:
            return self.eager(*values)
        inputs = [values[index] for index in self.inputs]
        try:
            computed = copy.artifact.run_flat(inputs)
        except SparcError as error:
            self.fragment.remark(error)
            return self.eager(*values)
        taken = copy.addresses.union(map(address, inputs))
        return self.results.finish(values, owned(computed, taken))

    def _again(self, weights: Sequence[Tensor], values: Sequence[Any]) -> "_Copy":
        """Compile for other weights, or for new values of the same ones; where that fails, they stay with eager torch
        until they change.
        """
        try:
            if self.count >= _MOST_COPIES:
                raise CaptureError(codes.WEIGHTS_CHANGED, f"the weights of the fragment changed {self.count} times")
            with dynamo.outside_of_dynamo():
                return self._compile(program_of(self.traced, self.results.computed, values), values)
        except SparcError as error:
            self.fragment.remark(error)
            return self._keep(weights, None)

    def _compile(self, program: Program, values: Sequence[Any]) -> "_Copy":
        self.count += 1
        diagnostics = Diagnostics()
        examples = tuple(values[index].detach().cpu() for index in self.inputs)
        samples = make_samples(program, {"forward": examples}, None, diagnostics)
        artifact, _ = compile_program(program, samples, self.job, diagnostics)
        return self._keep([values[index] for index in self.weights], artifact)

    def _keep(self, weights: Sequence[Tensor], artifact: Artifact | None) -> "_Copy":
        """Remember what was compiled for these weights, and forget what was compiled for weights that are gone."""
        key = tuple(map(id, weights))
        self.copies = {known: copy for known, copy in self.copies.items() if known != key and copy.alive}
        self.copies[key] = _Copy(artifact, weights)
        self.fragment.artifacts[:] = [copy.artifact for copy in self.copies.values() if copy.artifact is not None]
        return self.copies[key]


class _Copy:
    """What was compiled for weights (None: nothing), and the state they were in."""

    def __init__(self, artifact: Artifact | None, weights: Sequence[Tensor]) -> None:
        self.artifact = artifact
        self.states = [(weakref.ref(weight), weight.data_ptr(), _version(weight)) for weight in weights]
        self.addresses: set[int] = set()
        if artifact is not None:
            own = (*artifact.program.weights.values(), *(each.tensor for each in artifact.emission.stored))
            self.addresses = set(map(address, own))

    @property
    def alive(self) -> bool:
        """Whether somebody still holds the weights."""
        return all(known() is not None for known, _, _ in self.states)

    def fits(self, weights: Sequence[Tensor]) -> bool:
        """Whether these are the weights, not written to since."""
        return all(
            known() is weight and weight.data_ptr() == pointer and _version(weight) == version
            for (known, pointer, version), weight in zip(self.states, weights, strict=True)
        )


def _version(weight: Tensor) -> int:
    """How often a tensor was written to; tensors made in inference mode do not count."""
    return -1 if weight.is_inference() else weight._version


def _check_mode(module: fx.GraphModule, target: str) -> None:
    devices = dynamo.devices(module)
    if dynamo.needs_gradients(module):
        why = "compressed weights carry none"
        raise CaptureError(codes.NEEDS_GRADIENTS, "the fragment's results need gradients", why=why)
    if dynamo.autocast_on(devices):
        raise CaptureError(codes.UNSUPPORTED_OPERATOR, "autocast is not supported", why="it hides the casts")
    place = "cuda" if target.startswith("cuda") and torch.cuda.is_available() else "cpu"
    if devices - {place}:
        what = f"the fragment is on {' and '.join(sorted(devices))}, and the target {target} on {place}"
        raise CaptureError(codes.UNSUPPORTED_OPERATOR, what, hint="move the model, or choose another target")


def _where(module: fx.GraphModule) -> str:
    lines = (source_line(str(node.meta.get("stack_trace") or "")) for node in module.graph.nodes)
    return next((line for line in lines if line), "")
