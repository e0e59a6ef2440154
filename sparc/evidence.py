"""The evidence of a compilation: what became of every site, how far outputs moved, what was gained in size and time."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparc import codes
from sparc.analysis.sites import Site, find_sites
from sparc.cache import fit
from sparc.diag import Diagnostic, SparcError, VerifyError
from sparc.encoding.operators import is_decode
from sparc.ledger import Ratio, SiteRow, Summary
from sparc.measure import paired_ratio
from sparc.pass_base import Samples
from sparc.program import Program, is_weight
from sparc.serialize.program import place_weights
from sparc.source import raised_at
from sparc.target import Emission, Runner
from sparc.verify import measure_sites, output_errors


def site_rows(
    baseline: Program, program: Program, emission: Emission, samples: Samples, why: Mapping[str, str]
) -> list[SiteRow]:
    """One row for every compressible weight of `baseline`, in its order.

    Args:
        baseline: the program before anything was approximated.
        program: the compiled program.
        emission: what the target made of it.
        samples: inputs for signal-to-noise ratios.
        why: for weights that stayed dense, the reason a pass gave.
    """
    batches = {entry: inputs[:1] for entry, inputs in samples.held_out.items()}
    found = measure_sites(baseline, program, batches, "snr_db")
    measured = {(measure.entry, measure.node): measure.worst for measure in found}
    after = _by_origin(program, baseline)
    files = FileBytes(program, emission)
    rows = []
    for site in find_sites(baseline)[0]:
        row = SiteRow(site.weight, site.location.module, site.location.source, site.operator)
        row.dense_bytes = baseline.weights[site.weight].nbytes
        uses = [(use.entry, use.node.name) for use in site.uses]
        row.snr_db = min((measured[use] for use in uses if use in measured), default=None)
        became: list[tuple[Site | None, float]] = [*after.get(site.weight, [(None, 1.0)])]
        row.encoding = _joined(
            str(now.source.args[1]) if now is not None and now.encoded else "dense" for now, _ in became
        )
        row.activation = _joined(activation_spec(now) for now, _ in became)
        kernels = []
        for now, share in became:
            stored = now.weight if now is not None else site.weight
            size, kernel = round(share * files.site(stored, now)), emission.kernels.get(stored)
            row.file_bytes += size
            row.resident_bytes += round(share * kernel.resident_bytes) if kernel else size
            kernels += [kernel] if kernel else []
        row.kernel = _joined(kernel.operator for kernel in kernels)
        note = _joined(kernel.note for kernel in kernels)
        row.note = note or ("" if row.encoding != "dense" else why.get(site.weight, ""))
        rows.append(row)
    return rows


def _joined(texts: Iterable[str]) -> str:
    """Different texts, joined by `+`."""
    return " + ".join(dict.fromkeys(filter(None, texts)))


def _by_origin(program: Program, baseline: Program) -> dict[str, list[tuple[Site, float]]]:
    """The compiled sites that each weight of the baseline went into, and the weight's share of their bytes: weights of
    products that were stacked share a site, and factors of low rank are sites beside the weight, or in its place.
    """
    found: dict[str, list[tuple[Site, float]]] = {}
    sites = find_sites(program)[0]
    left = {site.weight for site in sites}
    for site in sites:
        parts: Any = site.source.args[0] if site.encoded else [site.source]
        origins = program.weights.record(str(parts[0].target)).origins if is_weight(parts[0]) else ()
        here = site.weight in baseline.weights  # else it was made of what may still be there
        known = [site.weight, *(name for name in origins if not (here and name in left))]
        known = [name for name in dict.fromkeys(known) if name in baseline.weights]
        total = sum(baseline.weights[name].nbytes for name in known)
        for name in known:
            into = found.setdefault(name, [])
            into.insert(0 if name == site.weight else len(into), (site, baseline.weights[name].nbytes / total))
    return found


def activation_spec(site: Site | None) -> str:
    """The spec that the input of a site's first product is quantized to; several are joined by `+`."""
    inputs = (use.input for use in site.uses if use.input is not None) if site is not None else iter(())
    node: Any = next(inputs, None)
    specs: list[str] = []
    stack = [node]
    while stack:
        value = stack.pop()
        if is_decode(value):
            specs.append(str(value.args[1]))
        elif (
            isinstance(value, fx.Node)
            and value.target is torch.ops.aten.add.Tensor
            and any(map(is_decode, value.all_input_nodes))
        ):
            stack.extend(value.all_input_nodes)
    return "+".join(specs)


class FileBytes:
    """The tensors of an artifact's weights file: the target's, and the program's weights that are not among them."""

    def __init__(self, program: Program, emission: Emission) -> None:
        """Args: the compiled program, and what the target made of it."""
        rows, tensors = place_weights(program.weights, emission.stored)
        self._bytes = {name: tensor.nbytes for name, tensor in tensors.items()}
        self._places = {name: str(row["tensor"]) for name, row in rows.items()}
        self._made = [(each.site, each.name) for each in emission.stored if each.site]
        self._read = {each.name for each in emission.stored}

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return sum(self._bytes.values())

    @property
    def read(self) -> int:
        """Bytes of those that the target reads."""
        return sum(self._bytes[name] for name in self._read)

    def site(self, weight: str, site: Site | None, *, read: bool = False) -> int:
        """Bytes of the tensors that stand for one weight: its parts, and what the target made of them.

        Args:
            weight: the original weight's name.
            site: the site in the compiled program; None when it is gone.
            read: only those that the target reads.
        """
        parts: Any = site.source.args[0] if site is not None and site.encoded else []
        names = [str(part.target) for part in parts] or [weight]
        tensors = {self._places[name] for name in names if name in self._places}
        tensors |= {name for made_from, name in self._made if made_from == weight}
        return sum(self._bytes[name] for name in tensors if name in self._read or not read)


def run_all(run: Callable[[Sequence[Tensor]], list[Any]], batches: Sequence[list[Tensor]]) -> list[list[Any]]:
    """The flat outputs for every batch."""
    return [run(tensors) for tensors in batches]


def summarize(
    reference: Program, program: Program, emission: Emission, samples: Samples, target: str, dense_bytes: int
) -> Summary:
    """Check the emission, and state sizes and output errors of the artifact in the target's runtime on held-out inputs.

    Args:
        reference: the captured model.
        program: the compiled program.
        emission: what the target made of it.
        samples: held-out inputs of the captured model.
        target: the target's name.
        dense_bytes: bytes of the captured model's weights.

    Raises:
        LoweringError: SPARC402 or SPARC404 when the emission does not compute what the program computes.
    """
    files = FileBytes(program, emission)
    carried = sum(kernel.resident_bytes for kernel in emission.kernels.values())
    resident = files.read + carried - _carried_bytes(program, emission, files)
    summary = Summary(target, "synthetic" if samples.synthetic else "held out", dense_bytes, files.total, resident)
    for entry, batches in samples.held_out.items():
        errors, parity = _output_evidence(reference, program, emission, entry, batches[:4])
        prefix = f"{entry}: " if len(program.entries) > 1 else ""
        summary.errors.update((prefix + name, figures) for name, figures in errors.items())
        summary.parity.update((prefix + name, figure) for name, figure in parity.items())
    return summary


def _output_evidence(
    reference: Program, program: Program, emission: Emission, entry: str, batches: Sequence[list[Tensor]]
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Of one entry: the outputs' errors against the reference, and their differences from the program."""
    chosen = program.entries[entry]
    names = chosen.signature.output_names
    expected = run_all(lambda tensors: reference.run_flat(list(tensors), entry=entry), batches)
    batches = [fit(chosen, tensors) for tensors in batches]
    cut = {slot.output for slot in chosen.cache.slots if slot.kept} if chosen.cache is not None else set()
    known = {name: value for name, value in zip(names, expected[0], strict=True) if name not in cut}
    parity = emission.check(program, {entry: batches[0]}, {entry: known})
    run = emission.runner(entry) if emission.native else lambda tensors: program.run_flat(list(tensors), entry=entry)
    actual = run_all(run, batches)
    check_finite(names, expected, actual)
    inner = _inner_outputs(program, entry)
    label = f"cache, worst of {len(inner)}"
    errors = _with_one_row(output_errors(names, expected, actual), inner, label)
    shown = {name: value for name, value in parity.items() if name not in inner}
    if inner & parity.keys():
        shown[label] = max(parity[name] for name in inner & parity.keys())
    return errors, shown


def _inner_outputs(program: Program, entry: str) -> set[str]:
    """The outputs of an entry that only the program's entries read: its own next call, or another entry."""
    cache = program.entries[entry].cache
    read = {name for each in program.entries.values() if each.cache is not None for name in each.cache.source}
    own = {slot.output for slot in cache.slots} if cache is not None else set()
    return own | (read & set(program.entries[entry].signature.output_names))


def _with_one_row(errors: dict[str, dict[str, float]], inner: set[str], label: str) -> dict[str, dict[str, float]]:
    """One row of worst figures in place of the rows of `inner` outputs."""
    rows = {name: figures for name, figures in errors.items() if name not in inner}
    for name, worst in (("relative error", max), ("cosine", min), ("snr_db", min)):
        found = [figures[name] for output, figures in errors.items() if output in inner and name in figures]
        if found:
            rows.setdefault(label, {})[name] = worst(found)
    return rows


def check_finite(names: Sequence[str], expected: Sequence[Sequence[Any]], actual: Sequence[Sequence[Any]]) -> None:
    """Where the captured model's output is finite, the artifact's is too.

    Raises:
        VerifyError: SPARC305.
    """
    for before, after in zip(expected, actual, strict=True):
        for name, a, b in zip(names, before, after, strict=True):
            if isinstance(b, Tensor) and bool(torch.isfinite(a).all()) and not bool(torch.isfinite(b).all()):
                raise VerifyError(codes.NOT_FINITE, f"output {name!r} is not finite any more")


def _carried_bytes(program: Program, emission: Emission, files: FileBytes) -> int:
    """Bytes the target reads for weights whose resident size it states itself."""
    sites = {site.weight: site for site in find_sites(program)[0]}
    return sum(files.site(name, sites.get(name), read=True) for name in emission.kernels)


def latencies(
    runner: Runner,
    dense: Runner | None,
    model: nn.Module | None,
    example: Mapping[str, Any],
    tensors: list[Tensor],
    *,
    label: str = "",
    budget: float = 6.0,
    dense_tensors: list[Tensor] | None = None,
) -> list[Ratio]:
    """The artifact's time against the uncompressed model in the same runtime, and against eager torch, at the
    example's shapes, which `label` describes where there are several. The uncompressed model's tensors differ where a
    cache was cut.
    """
    others = tensors if dense_tensors is None else dense_tensors
    found = []
    end = f": {label}" if label else ""
    if dense is not None:
        against = f"uncompressed, same runtime{end}"
        found.append(paired_ratio(lambda: runner(tensors), lambda: dense(others), against, budget=budget))
    if model is not None:
        with torch.no_grad():
            against = f"eager torch{end}"
            found.append(paired_ratio(lambda: runner(tensors), lambda: model(**example), against, budget=budget))
    return found


def check_metric(metric: Callable[[Any], Any] | None, artifact: Any) -> float | None:
    """What the user's metric says of the artifact.

    Raises:
        VerifyError: SPARC303 when it returns False or no number, or raises.
    """
    if metric is None:
        return None
    try:
        value = metric(artifact)
        if value is not False:
            return float(value)
    except SparcError:
        raise
    except Exception as error:  # the user's own code
        why = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        hint = "metric(artifact) returns a number, or False to stop"
        raise VerifyError(
            codes.METRIC_FAILED, "metric= gave no number", where=raised_at(error), why=why, hint=hint
        ) from error
    raise VerifyError(codes.METRIC_FAILED, "the user's metric failed", why="metric(artifact) returned False")


def skip_reasons(diagnostics: Iterable[Diagnostic]) -> dict[str, str]:
    """For each candidate that a pass left alone, the last reason given."""
    return {
        item.what.removesuffix(" was left alone"): item.why
        for item in diagnostics
        if item.code is codes.NOT_MATCHED and item.what.endswith(" was left alone")
    }
