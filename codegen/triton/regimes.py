"""Which kernel serves how many tokens: the cost model's choice, as ranges.

There is one candidate for each height of tiles, and a last one that decodes the weight into memory and leaves the
product
to torch. Ranges follow one another in that order; where one begins is where the model's times cross.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sympy

from sparc.codegen.triton.generate import is_grouped
from sparc.codegen.triton.prior import Candidate, at, candidates, dense_seconds
from sparc.codegen.triton.problem import Configuration, Problem
from sparc.cost import Device
from sparc.encoding.dense import Dense

GREATEST = 1 << 16  # tokens up to which thresholds are looked for
HEIGHTS = (1, 8, 16, 32, 64, 128)
_GAIN = 0.9  # another kernel is worth its code if it takes less than this of the time

_TRIED = 4  # configurations of one height that are timed, where they can be
_MANY = 1024  # tokens at which torch's product is timed

_WORKSPACE = 1 << 26  # elements of float32
_GRID = 65535  # programs along an axis that is not the first
_ENDLESS = 1 << 62

Accept = Callable[[Problem, Configuration], bool]
Measure = Callable[[Configuration | None, int], float]


@dataclass(frozen=True)
class Regime:
    """What serves the numbers of tokens up to a limit.

    Args:
        limit: the greatest number of tokens; None for all.
        configuration: the kernel's; None where the weight is decoded into memory and torch multiplies.
        seconds: the model's time, an expression in `prior.TOKENS`.
    """

    limit: int | None
    configuration: Configuration | None
    seconds: sympy.Expr


def regimes(
    problem: Problem,
    device: Device,
    low: int = 1,
    high: int | None = None,
    accept: Accept | None = None,
    measure: Measure | None = None,
) -> list[Regime]:
    """What serves every number of tokens between `low` and `high` (without end by default), as ranges.

    Args:
        problem: what is computed.
        device: where.
        low: the least number of tokens.
        high: the greatest.
        accept: whether a configuration's kernel keeps its promises; the next best one is taken where it does not.
        measure: the seconds of a configuration (None: of torch's product) at a number of tokens; the model's times are
            multiplied to agree with them.
    """
    refused: set[Configuration] = set()
    while True:
        found = _ranges(problem, device, low, min(high or GREATEST, GREATEST), refused, measure)
        chosen = [each.configuration for each in found if each.configuration is not None]
        bad = {each for each in chosen if accept is not None and not accept(problem, each)}
        if not bad:
            return bounded(found, problem, device, high)
        refused |= bad


def _ranges(
    problem: Problem, device: Device, low: int, high: int, refused: set[Configuration], measure: Measure | None
) -> list[Regime]:
    choices: list[Candidate | None] = []
    for height in HEIGHTS:
        fitting = [each for each in candidates(problem, device, height) if each.configuration not in refused]
        choices += _fastest(fitting, min(max(height, low), high), measure)
    dense = dense_seconds(problem, device, cached=isinstance(problem.weights[0].encoding, Dense))
    if measure is not None:
        many = min(max(_MANY, low), high)
        dense *= measure(None, many) / at(dense, many)
    times = [each.seconds for each in choices if each is not None] + [dense]
    choices.append(None)
    found: list[Regime] = []
    current, start = _best(choices, times, low, 0), low
    while True:
        crossing = _next(choices, times, current, start, high)
        choice = choices[current]
        configuration = choice.configuration if choice is not None else None
        if crossing is None:
            return [*found, Regime(None, configuration, times[current])]
        found.append(Regime(crossing[0] - 1, configuration, times[current]))
        start, current = crossing


def bounded(found: Sequence[Regime], problem: Problem, device: Device, high: int | None) -> list[Regime]:
    """Ranges in which workspaces and grids stay within bounds; beyond them, torch multiplies."""
    dense = dense_seconds(problem, device, cached=isinstance(problem.weights[0].encoding, Dense))
    kept: list[Regime] = []
    for each in found:
        most = _most_tokens(problem, each.configuration)
        last = each.limit or high or _ENDLESS
        if each.configuration is None or last <= most:
            kept.append(each)
            continue
        kept += [Regime(most, each.configuration, each.seconds), Regime(each.limit, None, dense)]
    return kept


def _most_tokens(problem: Problem, configuration: Configuration | None) -> int:
    """The tokens that a configuration can serve: the workspace of split sums has a size, and the grid's third axis."""
    if configuration is None:
        return _ENDLESS
    if configuration.split > 1:
        tile = problem.weights[0].rows * configuration.split * len(problem.weights)
        return max(_WORKSPACE // tile, configuration.block_tokens)
    return _ENDLESS if is_grouped(configuration) else _GRID * configuration.block_tokens


def _fastest(fitting: list[Candidate], tokens: int, measure: Measure | None) -> list[Candidate]:
    """The fastest candidate of a height, if there is one: by the model, or of the model's best by the clock."""
    if measure is None:
        return fitting[:1]
    timed = []
    for each in fitting[:_TRIED]:
        if each.configuration.block_tokens == 1 and tokens > 1:
            continue
        seconds = measure(each.configuration, tokens)
        if seconds < float("inf"):
            timed.append(Candidate(each.configuration, each.seconds * (seconds / at(each.seconds, tokens))))
    return sorted(timed, key=lambda each: at(each.seconds, tokens))[:1]


def _time(choices: Sequence[Candidate | None], times: Sequence[sympy.Expr], index: int, tokens: int) -> float:
    """A kernel for one token serves no more."""
    choice = choices[index]
    if choice is not None and choice.configuration.block_tokens == 1 and tokens > 1:
        return float("inf")
    return at(times[index], tokens)


def _best(choices: Sequence[Candidate | None], times: Sequence[sympy.Expr], tokens: int, first: int) -> int:
    return min(range(first, len(times)), key=lambda index: _time(choices, times, index, tokens))


def _next(
    choices: Sequence[Candidate | None], times: Sequence[sympy.Expr], current: int, start: int, last: int
) -> tuple[int, int] | None:
    """The number of tokens from which another choice is worth it, and which; None when there is none.

    Times are compared at powers of two and halfway between them; within the interval where the order changes, the
    crossing is found by bisection.
    """
    before = start
    for tokens in _probes(start, last):
        best = _best(choices, times, tokens, current)
        if best != current and _time(choices, times, best, tokens) < _GAIN * _time(choices, times, current, tokens):
            low, high = before, tokens
            while high - low > 1:
                middle = (low + high) // 2
                if _time(choices, times, best, middle) < _time(choices, times, current, middle):
                    high = middle
                else:
                    low = middle
            return high, best
        before = tokens
    return None


def _probes(start: int, last: int) -> list[int]:
    found = {number for power in range(17) for number in (1 << power, 3 << power >> 1) if start < number <= last}
    return sorted(found | {last} - {start})
