"""What computes a site at run time: the kernel of the regime that the number of tokens falls into, or torch.

It is called with tensors alone, so that it can be an operator of torch's: `torch.compile` sees through it to the
kernels.
"""

import copy
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, fx

from sparc import codes
from sparc.artifact import sparc_version
from sparc.codegen.triton.decoding import decoding_grid, generate_decoding
from sparc.codegen.triton.generate import generate
from sparc.codegen.triton.kernel import Kernel
from sparc.codegen.triton.launch import Launcher, Scratch, arguments, grid, scratch_sizes
from sparc.codegen.triton.prior import SKINNY, bare
from sparc.codegen.triton.problem import Configuration, Problem
from sparc.codegen.triton.regimes import Regime
from sparc.codegen.triton.sites import Site, tokens_of
from sparc.diag import LoweringError
from sparc.encoding.dense import Dense
from sparc.execute import execute
from sparc.region import region

_LIMIT = 1 << 31  # elements that a 32-bit index reaches


@dataclass(frozen=True)
class SiteTensors:
    """What an operator is called with, beside the activation.

    Args:
        buffers: the weights' tensors as kernels read them.
        operands: what the prologue and the epilogue read.
    """

    buffers: Sequence[Tensor]
    operands: Sequence[Tensor]


class SiteOperator:
    """A site with the kernels that serve it.

    Attributes:
        site: the site.
        regimes: what serves how many tokens.
        sources: the nodes whose values are the weights, one for each anchor.
    """

    def __init__(self, site: Site, regimes: Sequence[Regime]) -> None:
        """Args: see the attributes."""
        self.site, self.regimes = site, tuple(regimes)
        anchors = [site.result] if not site.parallel else list(site.anchors)
        flat = [each for given in site.operands for each in (given if isinstance(given, tuple) else (given,))]
        self.sources: list[fx.Node] = [anchor.args[1] for anchor in site.anchors]  # type: ignore[misc]
        inner = set(site.inner)
        self._whole = region(anchors, inner, dict.fromkeys([site.x, *flat, *self.sources]))  # type: ignore[list-item]
        self._norm = self._normalisation()

    def problem(self, configuration: Configuration) -> Problem:
        """What the configuration's kernel computes: a normalisation is apart where there are many tokens."""
        return bare(self.site.problem) if configuration.block_tokens > SKINNY else self.site.problem

    @cached_property
    def kernels(self) -> tuple[Kernel | None, ...]:
        """The kernel of every regime; None where torch multiplies."""
        chosen = (regime.configuration for regime in self.regimes)
        return tuple(generate(self.problem(each), each) if each is not None else None for each in chosen)

    @cached_property
    def decoders(self) -> tuple[Kernel, ...]:
        """The kernels that decode the weights into memory, where a regime wants that and they are encoded."""
        if all(regime.configuration is not None for regime in self.regimes):
            return ()
        problem = self.site.problem
        batch = problem.access.batch if problem.access.kind == "batched" else None
        return tuple(generate_decoding(weight, problem.dtype, batch) for weight in problem.weights)

    @property
    def digest(self) -> str:
        """What the operator computes, and how, as sixteen hexadecimal digits: equal operators share one definition."""
        texts = [sparc_version(), *(kernel.digest if kernel else "torch" for kernel in (*self.kernels, *self.decoders))]
        texts += [str(regime.limit) for regime in self.regimes]
        texts += structure(self._whole)
        return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]

    def without_tensors(self) -> "SiteOperator":
        """A copy that keeps no weight in memory: those that it computes with are given to `run`."""
        found, site = copy.copy(self), self.site
        vars(found).update(kernels=self.kernels, decoders=self.decoders)
        weights = tuple(replace(each, parts={}) for each in site.weights)
        lowerings = tuple(each.without_tensors() for each in site.problem.weights)
        found.site = replace(site, weights=weights, problem=replace(site.problem, weights=lowerings))
        return found

    def scratch_sizes(self, tokens: int) -> tuple[int, int]:
        """Elements of workspace and counters that any number of tokens up to `tokens` needs."""
        found = [(0, 0)]
        for regime in self.regimes:
            if regime.configuration is not None:
                most = min(tokens, regime.limit or tokens)
                found.append(scratch_sizes(self.problem(regime.configuration), regime.configuration, most))
        return max(each[0] for each in found), max(each[1] for each in found)

    # running ----------------------------------------------------------------------------------------------------------
    def tokens(self, x: Tensor) -> int:
        """How many tokens an activation has."""
        return int(self.site.problem.access.tokens(x.shape))

    def output(self, x: Tensor) -> Tensor:
        """An output for an activation, uninitialised."""
        dtype = getattr(torch, self.site.problem.epilogue.dtype)
        return x.new_empty(self.output_shape(x), dtype=dtype)

    def output_shape(self, x: Tensor) -> list[int]:
        """The output's shape."""
        rows, access = self.site.problem.rows, self.site.problem.access
        if access.kind == "rows":
            return [*x.shape[:-1], rows]
        if access.kind == "batched":
            return [access.batch, x.shape[-2], rows]
        kind = self.site.result.meta["val"]
        return [x.shape[0], rows, *kind.shape[2:]]

    def run(
        self, x: Tensor, tensors: SiteTensors, scratch: Scratch, launch: Launcher, regime: int | None = None
    ) -> Tensor:
        """Compute the site.

        Args:
            x: the activation.
            tensors: what else is read.
            scratch: memory for split sums.
            launch: runs a kernel.
            regime: the index of the regime that serves it; the one that its tokens fall into by default.

        Raises:
            LoweringError: SPARC412 for a shape that 32-bit indices do not reach.
        """
        tokens = self.tokens(x)
        if tokens == 0:
            return self.output(x)
        index = self.regime(tokens) if regime is None else regime
        configuration, kernel = self.regimes[index].configuration, self.kernels[index]
        if configuration is None or kernel is None:
            return self._by_torch(x, tensors, launch)
        if max(x.numel(), math.prod(self.output_shape(x))) >= _LIMIT:
            raise LoweringError(
                codes.SHAPE_TOO_LARGE,
                f"{tokens} tokens of {self.site.names[0]} are more than 32-bit indices reach",
                hint="call it with fewer tokens at a time",
            )
        operands = list(tensors.operands)
        problem = self.problem(configuration)
        if problem is not self.site.problem:
            x, operands = self._normalised(x, operands), operands[len(self.site.problem.prologue.arguments) :]
        y = self.output(x)
        given = [x.contiguous(), *tensors.buffers, *(each.contiguous() for each in operands)]
        launch(kernel, grid(problem, configuration, tokens), arguments(configuration, given, y, tokens, scratch))
        return y

    def regime(self, tokens: int) -> int:
        """The index of the regime that a number of tokens falls into."""
        return next(i for i, each in enumerate(self.regimes) if each.limit is None or tokens <= each.limit)

    def reference(self, x: Tensor, operands: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        """The site in plain torch, from dense weights in their own layout, one for each anchor."""
        flat = self._split_operands(operands)
        values = dict(zip([self.site.x, *flat, *self.sources], [x, *flat.values(), *weights], strict=True))
        inputs = [values[node] for node in dict.fromkeys([self.site.x, *flat, *self.sources])]
        results = execute(self._whole, {}, inputs)
        return torch.cat(results, dim=-1) if self.site.parallel else results[0]

    def dense(self, tensors: SiteTensors, launch: Launcher) -> list[Tensor]:
        """The weights decoded into memory, in their own layout, one for each anchor."""
        problem = self.site.problem
        found: list[Tensor] = []
        start = 0
        for weight, kernel in zip(problem.weights, self.decoders, strict=True):
            own = list(tensors.buffers[start : start + len(weight.buffers)])
            start += len(problem.buffers(weight))
            if isinstance(weight.encoding, Dense) and weight.padded_columns == weight.columns:
                found.append(own[0])
                continue
            dense = torch.zeros(weight.rows, weight.columns, dtype=getattr(torch, problem.dtype), device=own[0].device)
            launch(kernel, decoding_grid(weight, problem.access.batch), [*own, dense])
            found.append(dense)
        if self.site.parallel:
            found = list(found[0].split([source.meta["val"].shape[0] for source in self.sources]))  # type: ignore[union-attr]
        if problem.access.kind == "batched":
            return [each.view(problem.access.batch, problem.rows, problem.columns).mT for each in found]
        return [each.view(tuple(source.meta["val"].shape)) for each, source in zip(found, self.sources, strict=True)]  # type: ignore[union-attr]

    def _by_torch(self, x: Tensor, tensors: SiteTensors, launch: Launcher) -> Tensor:
        return self.reference(x, tensors.operands, self.dense(tensors, launch))

    def _split_operands(self, operands: Sequence[Tensor]) -> dict[fx.Node, Tensor]:
        """Each operand's node with its value; a stacked one is cut up."""
        found: dict[fx.Node, Tensor] = {}
        for given, tensor in zip(self.site.operands, operands, strict=True):
            if isinstance(given, tuple):
                sizes = [node.meta["val"].shape[0] for node in given]
                found.update(zip(given, tensor.split(sizes), strict=True))
            else:
                found[given] = tensor
        return found

    def _normalisation(self) -> fx.Graph | None:
        result = self.site.normalised
        if result is None:
            return None
        given = self.site.operands[: len(self.site.problem.prologue.arguments)]
        return region([result], set(self.site.inner), [self.site.x, *given])  # type: ignore[list-item]

    def _normalised(self, x: Tensor, operands: Sequence[Tensor]) -> Tensor:
        assert self._norm is not None
        given = operands[: len(self.site.problem.prologue.arguments)]
        result: Tensor = execute(self._norm, {}, [x, *given])[0]
        return result


def structure(graph: fx.Graph) -> list[str]:
    """A graph as lines that do not depend on the names of its nodes."""
    numbers = {node: f"%{index}" for index, node in enumerate(graph.nodes)}
    found = []
    for node in graph.nodes:
        target = "" if node.op == "placeholder" else str(node.target)
        text = fx.node.map_aggregate((node.args, node.kwargs), lambda each: numbers.get(each, str(each)))
        found.append(f"{node.op} {target} {text} {node.meta.get('val')}")
    return found


def token_range(site: Site) -> tuple[int, int | None]:
    """The least and the greatest number of tokens that a site can have; None when there is no bound."""
    size = tokens_of(site)
    if isinstance(size, int):
        return size, size
    expression = size.node.expr  # torch takes sizes of dynamic dimensions to be at least 2, but the program runs with 1
    least = expression.subs(dict.fromkeys(expression.free_symbols, 1))
    upper = size.node.shape_env.bound_sympy(expression).upper
    return max(int(least), 1), int(upper) if upper.is_Integer else None
