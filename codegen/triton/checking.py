"""Parity of generated kernels: every operator, in every regime, computes what its site computes in plain torch."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx

from sparc import codes
from sparc.codegen.triton.launch import Scratch, grid, make_scratch
from sparc.codegen.triton.operator import SiteOperator, SiteTensors
from sparc.codegen.triton.operators import launch
from sparc.codegen.triton.sites import buffers, tokens_of
from sparc.diag import Diagnostics, LoweringError
from sparc.encoding.operators import is_quantize
from sparc.parity import FLOAT32_TOLERANCE, HALF_TOLERANCE
from sparc.program import is_weight, location
from sparc.verify import relative_error

_BFLOAT16_TOLERANCE = 1.6e-2  # its last place is worth eight times that of float16
_SMALL = 16  # tokens of tiles that the interpreter can well run twice
_MOST_PROGRAMS = 256  # of one kernel that the interpreter is given


def check_operators(
    operators: Iterable[SiteOperator], diagnostics: Diagnostics, device: str, weights: Mapping[str, Tensor]
) -> None:
    """Run every operator once in each regime on random activations, with the program's own biases and scales.

    In the interpreter, one site of each kind is enough, the smallest: what differs between their kernels is numbers. A
    kind whose smallest site has more programs than it can take in good time is left out, with a remark.

    Args:
        operators: what to check.
        diagnostics: where remarks go.
        device: where kernels are launched: `cuda`, or `cpu` for the interpreter.
        weights: the program's, by name.

    Raises:
        LoweringError: SPARC402 for a site that differs by more than rounding explains.
    """
    seen: set[str] = set()
    for operator in sorted(operators, key=lambda each: each.site.problem.rows * each.site.problem.columns):
        kind = _kind(operator)
        if device == "cpu" and kind in seen:
            continue
        if device == "cpu" and _programs(operator) > _MOST_PROGRAMS:
            why = f"the interpreter would run {_programs(operator)} programs"
            where = location(operator.site.anchors[0])
            diagnostics.remark(
                codes.INTERPRETED, f"{operator.site.names[0]} was not checked here", where=where, why=why
            )
            continue
        seen.add(kind)
        _check(operator, device, weights)


def _kind(operator: SiteOperator) -> str:
    problem = operator.site.problem
    shape = [each.configuration.block_tokens if each.configuration else 0 for each in operator.regimes]
    weight = problem.weights[0].key()
    window = problem.access.window
    access = (problem.access.kind, window.kernel if window else (), problem.access.shared)
    parts = (weight, problem.dtype, problem.prologue, problem.epilogue, access, shape, operator.site.parallel)
    return " ".join(map(str, parts))


def _programs(operator: SiteOperator) -> int:
    problem = operator.site.problem
    chosen = [each.configuration for each in operator.regimes if each.configuration is not None]
    size = tokens_of(operator.site)
    launched = [grid(problem, each, size if isinstance(size, int) else problem.access.positions) for each in chosen]
    return max((x * y * z for x, y, z in launched), default=0)


def _check(operator: SiteOperator, device: str, weights: Mapping[str, Tensor]) -> None:
    site = operator.site
    generator = torch.Generator().manual_seed(0)
    laid = [tensor.to(device) for tensor in buffers(site)]
    for regime in range(len(operator.regimes)):
        wanted = -(-_tokens(operator, regime) // site.problem.access.positions)
        x = random_value(site.x, generator, wanted).to(device)
        count = operator.tokens(x)
        if count > 1 and _is_single(operator, regime):
            continue
        scratch = make_scratch(operator.scratch_sizes(count), device)
        operands = [
            x if given is site.x else random_operand(given, generator, x, operator, weights).to(device)
            for given in site.operands
        ]
        found = operator.run(x, SiteTensors(laid, operands), scratch, launch, regime)
        expected = operator.reference(x, operands, _weights(operator, device))
        _compare(operator, expected, found, count, scratch)


def _compare(operator: SiteOperator, expected: Tensor, found: Tensor, tokens: int, scratch: Scratch) -> None:
    by_type = {"float32": FLOAT32_TOLERANCE, "bfloat16": _BFLOAT16_TOLERANCE}
    tolerance = by_type.get(operator.site.problem.dtype, HALF_TOLERANCE)
    quantizes = any(is_quantize(node) for node in operator.site.inner)
    difference = (_mean_error if quantizes else relative_error)(expected, found)
    if not difference <= tolerance:
        raise LoweringError(
            codes.PARITY_FAILED,
            f"the kernel of {operator.site.names[0]} differs by {difference:.2e} relative at {tokens} tokens",
            where=location(operator.site.anchors[0]),
        )
    if bool(scratch.counters.any()):
        raise LoweringError(codes.PARITY_FAILED, f"the kernel of {operator.site.names[0]} leaves its counters changed")


def _mean_error(expected: Tensor, found: Tensor) -> float:
    """The mean difference, relative to the greatest value.

    Rounding to a grid moves values close to the middle of a step by a whole step, but leaves the mean of differences as
    it was: of two values that are a share of a step apart, so large a share of pairs ends a step apart.
    """
    greatest = expected.double().abs().max().clamp(min=1e-30)
    return float((expected.double() - found.double()).abs().mean() / greatest)


def _is_single(operator: SiteOperator, regime: int) -> bool:
    configuration = operator.regimes[regime].configuration
    return configuration is not None and configuration.block_tokens == 1


def _tokens(operator: SiteOperator, regime: int) -> int:
    """A number of tokens that does not fill a regime's tiles; of small tiles it takes two."""
    configuration = operator.regimes[regime].configuration
    height = configuration.block_tokens if configuration is not None else 1
    return 1 if height == 1 else height + 1 if height <= _SMALL else 5


def random_value(node: fx.Node, generator: torch.Generator, tokens: int) -> Tensor:
    """A random activation of a node's type with about so many tokens; dynamic sizes but the last dynamic one are 1."""
    kind = node.meta["val"]
    dynamic = [axis for axis, size in enumerate(kind.shape) if not isinstance(size, int)]
    shape = [size if isinstance(size, int) else 1 for size in kind.shape]
    if dynamic:
        shape[dynamic[-1]] = max(tokens, 1)
    return _random(shape, kind.dtype, generator)


def _random(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype in (torch.int8, torch.uint8):
        limits = torch.iinfo(dtype)
        return torch.randint(limits.min, limits.max + 1, tuple(shape), generator=generator, dtype=dtype)
    return torch.randn(tuple(shape), generator=generator).to(dtype)


def random_operand(
    given: fx.Node | tuple[fx.Node, ...],
    generator: torch.Generator,
    x: Tensor,
    operator: SiteOperator,
    weights: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """What an operator reads beside the activation: the program's weight, or a random value in sizes that fit."""
    if isinstance(given, tuple):
        return torch.cat([random_operand(each, generator, x, operator, weights) for each in given])
    if weights is not None and is_weight(given):
        return weights[str(given.target)]
    kind = given.meta["val"]
    sizes = dict(zip(map(str, operator.site.x.meta["val"].shape), x.shape, strict=True))
    shape = [size if isinstance(size, int) else sizes.get(str(size), 1) for size in kind.shape]
    return _random(shape, kind.dtype, generator)


def _weights(operator: SiteOperator, device: str) -> Sequence[Tensor]:
    """The dense weights by the encodings' own word, in their own layout."""
    site, sources = operator.site, operator.sources
    dtype = getattr(torch, site.problem.dtype)
    found = [weight.encoding.decode(weight.parts, weight.shape, dtype) for weight in site.weights]
    if site.parallel:
        found = list(found[0].split([source.meta["val"].shape[0] for source in sources]))
    view = site.weights[0].view
    shapes = [tuple(node.meta["val"].shape) for node in sources]
    return [view.from_matrix(each, shape).to(device) for each, shape in zip(found, shapes, strict=True)]
