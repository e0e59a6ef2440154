"""What the target made of a program: its kernels' sources, and the ways to run it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparc import codes
from sparc.codegen.triton.checking import check_operators
from sparc.codegen.triton.chips import runs_here
from sparc.codegen.triton.choice import rows
from sparc.codegen.triton.cubin import report, violations
from sparc.codegen.triton.kernel import Kernel
from sparc.codegen.triton.lower import Lowered
from sparc.codegen.triton.operator import SiteOperator
from sparc.codegen.triton.regimes import Regime
from sparc.codegen.triton.replay import GraphReplay
from sparc.cost import Device
from sparc.diag import ArtifactError, Diagnostics
from sparc.generation.session import CachedRun
from sparc.generation.static_cache import StaticCache, in_place
from sparc.ledger import Ratio
from sparc.program import Program
from sparc.progress import track
from sparc.target import KernelUse, Runner, Span, StoredTensor

_VARIANTS = 64  # of a graph that torch.compile may make: one for each combination of the sites' kernels


class TritonEmission:
    """A program whose products are generated kernels.

    Attributes:
        target: the target's name.
        device: the profile of the chip that kernels are generated for.
        lowered: every entry's graph and tensors.
        stored: the program's weights, as they are: kernels' layouts are made from them when the artifact is loaded.
        kernels: what carries every compressed weight.
        timings: seconds of kernels that were timed on the device, by `Kernel.digest`.
    """

    def __init__(
        self, target: str, device: Device, program: Program, lowered: Mapping[str, Lowered], diagnostics: Diagnostics
    ) -> None:
        """Args: see the attributes; `program` is what was lowered, `diagnostics` where remarks go."""
        self.target, self.device, self.lowered = target, device, dict(lowered)
        self.stored = [StoredTensor(name, tensor, name) for name, tensor in program.weights.items()]
        self.kernels: Mapping[str, KernelUse] = {
            name: use for each in self.lowered.values() for name, use in each.uses.items()
        }
        self.timings: dict[str, float] = {}
        self._program, self._diagnostics = program, diagnostics
        self._modules: dict[tuple[str, str], nn.Module] = {}

    @property
    def native(self) -> bool:
        """Whether this machine's GPU runs the kernels; otherwise Triton's interpreter does."""
        return runs_here(self.device.capability)

    # sources ----------------------------------------------------------------------------------------------------------
    def operators(self) -> list[SiteOperator]:
        """The operators of all entries, equal ones once."""
        found = {operator.digest: operator for each in self.lowered.values() for operator in each.operators.values()}
        return list(found.values())

    def every_kernel(self) -> list[Kernel]:
        """The kernels of all operators, equal ones once."""
        kernels = [kernel for operator in self.operators() for kernel in (*operator.kernels, *operator.decoders)]
        return list({kernel.digest: kernel for kernel in kernels if kernel is not None}.values())

    @property
    def sources(self) -> dict[str, str]:
        """Every kernel's source by file name, headed by the sites it serves and what it costs."""
        users = self._users()
        return {f"{each.name}.py": _headed(each, users.get(each.name, [])) for each in self.every_kernel()}

    def kernel_rows(self) -> list[dict[str, Any]]:
        """What every kernel takes on the chip, by its machine code, as plain values: see `cubin.KernelReport`. `serves`
        are its sites, `seconds` what it took where it was timed, else None.

        Raises:
            LoweringError: SPARC409 when one does not compile.
        """
        users = self._users()
        return [
            {"serves": users.get(each.name, []), **_judged(each, self.device), "seconds": self.timings.get(each.digest)}
            for each in track(self.every_kernel(), "compiling kernels")
        ]

    def _users(self) -> dict[str, list[str]]:
        """The sites that every kernel serves, by its name."""
        users: dict[str, list[str]] = {}
        for each in self.lowered.values():
            for operator in each.operators.values():
                for kernel, said in _described(operator.site.names, operator):
                    users.setdefault(kernel.name, []).append(said)
        return users

    def files(self, spans: Mapping[str, Span]) -> dict[str, bytes]:
        """The sources, for people to read: loading generates them anew and executes none of these files; and
        `kernels.json`, the chip and what serves how many tokens at every site.
        """
        found = {name: text.encode() for name, text in self.sources.items()}
        sites = [
            rows(entry, node, operator)
            for entry, each in self.lowered.items()
            for node, operator in each.operators.items()
        ]
        described = {"chip": self.device.name, "capability": self.device.capability, "sites": sites}
        found["kernels.json"] = (json.dumps(described, indent=1, sort_keys=True) + "\n").encode()
        return found

    # running ----------------------------------------------------------------------------------------------------------
    def runner(self, entry: str | None = None, *, threads: int | None = None, spin: bool = True) -> Runner:
        """Runs the entry on the GPU, through torch.compile and, for static shapes, a CUDA graph; where there is no such
        GPU, in Triton's interpreter, with a remark.

        Args:
            entry: the entry's name.
            threads: has no meaning on a GPU.
            spin: likewise.
        """
        name = entry or next(iter(self.lowered))
        if self.native:
            return self._on_device(name)
        self._diagnostics.remark(codes.INTERPRETED, "the artifact runs in Triton's interpreter", why=self._why())
        module = self._module(name, "cpu")
        return _flat(module)

    def session(self, entry: str, batch: int, length: int, *, threads: int | None = None) -> CachedRun | None:
        """The entry with its cache in buffers on the device; None when the cache grows in another way than at its end.

        Where there is no such GPU, it runs in Triton's interpreter.
        """
        called, lowered = self._program.entries[entry], self.lowered[entry]
        assert called.cache is not None
        signature = called.signature
        graph = in_place(lowered.graph, called.cache, signature.input_names, signature.output_names)
        if graph is None:
            return None
        device = f"cuda:{torch.cuda.current_device()}" if self.native else "cpu"
        module = module_of(replace(lowered, graph=graph), device)
        run = torch.compile(module, dynamic=True) if self.native else module

        def on_device(given: Sequence[Any]) -> list[Any]:
            with torch.no_grad():
                return [each.cpu() for each in run(*given)]

        return StaticCache(called, on_device, batch, length, device)

    def _why(self) -> str:
        return f"no GPU of compute capability {self.device.capability / 10} is here"

    def _on_device(self, name: str) -> Runner:
        device = f"cuda:{torch.cuda.current_device()}"
        module = self._module(name, device)
        entry = self._program.entries[name]
        compiled = torch.compile(module, dynamic=bool(entry.symbols))
        run: Callable[..., Any] = compiled if entry.symbols else GraphReplay(compiled)

        def checked(tensors: Sequence[Tensor]) -> list[Any]:
            for position, tensor in enumerate(tensors):
                if isinstance(tensor, Tensor) and tensor.device != torch.device(device):
                    given = entry.signature.input_names[position]
                    raise ArtifactError(
                        codes.CALL_MISMATCH, f"input {given!r} is on {tensor.device}", hint=f"move it to {device}"
                    )
            patched = torch._dynamo.config.patch(recompile_limit=_VARIANTS)
            with torch.no_grad(), torch.cuda.device(device), patched:
                return list(run(*tensors))

        return checked

    def _module(self, name: str, device: str) -> nn.Module:
        if (name, device) not in self._modules:
            self._modules[name, device] = module_of(self.lowered[name], device)
        return self._modules[name, device]

    # evidence -------------------------------------------------------------------------------------------------------
    def check(
        self, program: Program, inputs: Mapping[str, Sequence[Tensor]], reference: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, float]:
        """Every kernel computes what the site's operators compute in torch; see `sparc.codegen.triton.checking`."""
        if not self.native:
            what = "kernels were checked in Triton's interpreter, and output errors are the program's own"
            self._diagnostics.remark(codes.INTERPRETED, what, why=self._why())
        where = "cuda" if self.native else "cpu"
        check_operators(self.operators(), self._diagnostics, where, self._program.weights)
        return {}

    def estimate(self, tensors: Sequence[Tensor], entry: str | None = None) -> Ratio:
        """The sites' time against torch's own dense products, by the cost model, at the shapes of `tensors`."""
        from sparc.codegen.triton.estimate import ratio

        name = entry or next(iter(self.lowered))
        return ratio(self._program.entries[name], self.lowered[name], self.device, tensors)


def module_of(lowered: Lowered, device: str) -> nn.Module:
    """An entry's graph as a module whose tensors are buffers on a device."""
    root = nn.Module()
    names: dict[str, str] = {}
    for index, (name, tensor) in enumerate(lowered.tensors.items()):
        names[name] = f"tensor_{index}"
        root.register_buffer(names[name], tensor.detach().to(device), persistent=False)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in lowered.graph.nodes:
        copies[node] = graph.node_copy(node, lambda used: copies[used])
        if node.op == "get_attr":
            copies[node].target = names[str(node.target)]
        else:  # programs are captured on the CPU, and say so where they make tensors
            copies[node].args, copies[node].kwargs = fx.node.map_aggregate(
                (copies[node].args, copies[node].kwargs),
                lambda each: torch.device(device) if isinstance(each, torch.device) else each,
            )  # type: ignore[assignment, misc]
    return fx.GraphModule(root, graph)


def _flat(module: nn.Module) -> Runner:
    def run(tensors: Sequence[Tensor]) -> list[Any]:
        with torch.no_grad():
            return list(module(*tensors))

    return run


def _is_single(regime: Regime) -> bool:
    return regime.configuration is not None and regime.configuration.block_tokens == 1


def _described(names: Sequence[str], operator: SiteOperator) -> list[tuple[Kernel, str]]:
    """Each kernel of an operator, and what it serves."""
    low, found = 1, []
    site = ", ".join(names)
    for regime, kernel in zip(operator.regimes, operator.kernels, strict=True):
        served = f"{low} to {regime.limit} tokens" if regime.limit is not None else f"{low} tokens and more"
        served = "1 token" if low == 1 and (regime.limit == 1 or _is_single(regime)) else served
        if kernel is not None:
            found.append((kernel, f"{site}: {served}"))
        low = (regime.limit or 0) + 1
    return found + [(kernel, f"{site}: before torch's own product") for kernel in operator.decoders]


def _headed(kernel: Kernel, users: Sequence[str]) -> str:
    """The source, with the sites that it serves in its docstring."""
    first, rest = kernel.source.split("\n", 1)
    sites = "\n".join(f"- {each}" for each in users)
    launched = f"{kernel.num_warps} warps, {kernel.num_stages} stages"
    return f"{first}\n\n{sites}\n\n{launched}; {kernel.weight_bits:.2f} bits read for a weight.\n{rest.lstrip()}"


def _judged(kernel: Kernel, device: Device) -> dict[str, Any]:
    """A kernel's report as plain values, with the promises it breaks."""
    found = report(kernel, device.capability)
    slots = found.slots
    return {
        "kernel": kernel.name,
        "registers": found.registers,
        "spill_bytes": found.spill_bytes,
        "shared_bytes": found.shared_bytes,
        "load_bytes": list(found.load_bytes),
        "tensor_core": dict(found.tensor_core),
        "issue_slots": slots.issue if slots else None,
        "ceiling_tb_per_s": slots.ceiling if slots else None,
        "programs_per_sm": found.programs_per_sm,
        "violations": violations(kernel, found),
    }
