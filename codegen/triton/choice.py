"""Who says what serves a site: the cost model and the clock, or the ranges that a saved artifact records."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from sparc import codes
from sparc.codegen.triton.operator import SiteOperator
from sparc.codegen.triton.prior import candidates, dense_seconds
from sparc.codegen.triton.problem import Configuration, Problem
from sparc.codegen.triton.regimes import HEIGHTS, Accept, Regime, bounded, regimes
from sparc.codegen.triton.sites import Site
from sparc.codegen.triton.tuning import Tuner
from sparc.cost import Device
from sparc.diag import Diagnostics
from sparc.encoding.dense import Dense
from sparc.program import location
from sparc.serialize import schema

Choose = Callable[[Site, int, int | None], list[Regime]]


class ByCost:
    """Ranges by the cost model, corrected by the clock where there is a tuner; equal sites get equal ranges."""

    def __init__(self, device: Device, accept: Accept | None = None, tuner: Tuner | None = None) -> None:
        """Args: where; see `regimes` for `accept`; what times candidates."""
        self._device, self._accept, self._tuner = device, accept, tuner
        self._chosen: dict[Any, list[Regime]] = {}

    def __call__(self, site: Site, low: int, high: int | None) -> list[Regime]:
        """The ranges of the numbers of tokens from `low` to `high`, or without end."""
        key = (site.problem.key, low, high)
        if key not in self._chosen:
            free = site.problem.access.kind in ("rows", "batched")  # images come whole: no number can be asked for
            measure = partial(self._tuner.seconds, site) if self._tuner is not None and free else None
            self._chosen[key] = regimes(site.problem, self._device, low, high, self._accept, measure)
        return self._chosen[key]


class Recorded:
    """Ranges as `kernels.json` records them; what it does not record was left to torch.

    A configuration is taken only if it is one of those that the cost model would consider: the file may come from
    another version, or from anywhere. Otherwise the ranges are chosen anew, with a remark.
    """

    def __init__(
        self, sites: Sequence[Any], entry: str, device: Device, anew: Choose, diagnostics: Diagnostics
    ) -> None:
        """Args: the rows of `kernels.json`; the entry they are read for; where; who chooses anew; where remarks go."""
        self._rows = {row["node"]: row["regimes"] for row in map(_checked, sites) if row["entry"] == entry}
        self._device, self._anew, self._diagnostics = device, anew, diagnostics

    def __call__(self, site: Site, low: int, high: int | None) -> list[Regime]:
        """The ranges of a site."""
        rows = self._rows.get(site.place.name)
        if rows is None and isinstance(site.weights[0].encoding, Dense):
            return [Regime(None, None, dense_seconds(site.problem, self._device, cached=True))]
        found = _regimes(rows, site.problem, self._device, high) if rows is not None else None
        if found is not None:
            return found
        what = f"kernels of {site.names[0]} are chosen anew"
        why = "the artifact records none that this version would choose"
        self._diagnostics.remark(codes.CHOSEN_ANEW, what, where=location(site.place), why=why)
        return self._anew(site, low, high)


def _checked(row: Any) -> Mapping[str, Any]:
    found = schema.fields(row, "a site", ["entry", "node", "weights", "regimes"])
    schema.text(found["entry"], "an entry"), schema.text(found["node"], "a node")
    for each in schema.items(found["regimes"], "the regimes"):
        own = schema.fields(each, "a regime", ["limit", "kernel", "configuration", "seconds"])
        if own["limit"] is not None:
            schema.integer(own["limit"], "a limit", 1)
        if own["configuration"] is not None:
            schema.fields(own["configuration"], "a configuration", list(vars(Configuration())))
    return found


def _regimes(
    rows: Sequence[Mapping[str, Any]], problem: Problem, device: Device, high: int | None
) -> list[Regime] | None:
    """The recorded ranges, if they are ranges of configurations that fit the problem."""
    limits = [row["limit"] for row in rows]
    if not rows or limits[-1] is not None or None in limits[:-1] or sorted(set(limits[:-1])) != limits[:-1]:
        return None
    found: list[Regime] = []
    for row in rows:
        chosen = row["configuration"]
        if chosen is None:
            cached = isinstance(problem.weights[0].encoding, Dense)
            found.append(Regime(row["limit"], None, dense_seconds(problem, device, cached=cached)))
            continue
        height = chosen["block_tokens"]
        if height not in HEIGHTS or (height == 1 and (row["limit"] or high) != 1):
            return None
        same = [each for each in candidates(problem, device, height) if vars(each.configuration) == dict(chosen)]
        if not same:
            return None
        found.append(Regime(row["limit"], same[0].configuration, same[0].seconds))
    return bounded(found, problem, device, high)


def rows(entry: str, node: str, operator: SiteOperator) -> dict[str, Any]:
    """What serves a site, as `kernels.json` records it."""
    found = []
    for regime, kernel in zip(operator.regimes, operator.kernels, strict=True):
        found.append(
            {
                "limit": regime.limit,
                "kernel": kernel.name if kernel is not None else None,
                "configuration": vars(regime.configuration) if regime.configuration is not None else None,
                "seconds": str(regime.seconds),
            }
        )
    return {"entry": entry, "node": node, "weights": list(operator.site.names), "regimes": found}
