"""The inputs that checks and calibration run on: the user's data, split, or seeded variations of the example inputs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from sparc import codes
from sparc.cache import fit
from sparc.diag import CaptureError, Diagnostics, SparcError
from sparc.inputs import InputCheck
from sparc.pass_base import Samples
from sparc.program import Entry, Program
from sparc.progress import collect
from sparc.source import raised_at

Data = Iterable[Any] | Callable[[], Iterable[Any]] | None
Feed = Callable[[Program, Any], Mapping[str, Any]]
_LIMIT = 1024
_DATA = "data= is a sequence of inputs like example_inputs, or a function that returns one"
_FINITE = "give example_inputs and data= without NaN"
_HELD_OUT_SHARE = 4


def make_samples(
    program: Program,
    examples: Mapping[str, Any],
    data: Data,
    diagnostics: Diagnostics,
    feed: Feed | None = None,
    written: Callable[[], Iterable[Any]] | None = None,
) -> Samples:
    """Samples for every entry that has examples.

    Args:
        program: the captured program.
        examples: for each entry, its example inputs, positional or by name.
        data: more inputs, or a function that returns them; every fourth one is held out from calibration.
        diagnostics: told when there is no data.
        feed: what an item of data is to each entry, by name; without, items are inputs of the first one.
        written: inputs of the first entry to calibrate it on where there is no data.

    Raises:
        CaptureError: SPARC102 when an item does not fit the program's signature.
    """
    example = {entry: bind(program, given, entry) for entry, given in examples.items()}
    samples = Samples(synthetic=data is None, example=example)
    if data is None:
        diagnostics.remark(codes.SYNTHETIC_DATA, "measurements ran on synthetic inputs", why="data= was not given")
        for entry, tensors in example.items():
            varied = [vary(tensors, seed, _kept(program.entries[entry])) for seed in (1, 2)]
            samples.held_out[entry], samples.calibration[entry] = [tensors, varied[0]], varied
        if written is not None:
            first = next(iter(example))
            diagnostics.remark(codes.OWN_TEXT, "statistics are of text that the model wrote", why="data= was not given")
            samples.calibration[first] = [bind(program, item, first) for item in written()]
        return samples
    items = _read(data)
    if len(items) > _LIMIT:
        del items[_LIMIT:]
        diagnostics.remark(codes.DATA_CUT, f"only the first {_LIMIT} items of data= are used", why="it holds more")
    fed = [feed(program, item) if feed is not None else dict.fromkeys(example, item) for item in items]
    if not fed:
        raise CaptureError(
            codes.INPUTS_MISSING, "data= is empty", hint="give at least one input, better sixteen or more"
        )
    for entry, tensors in example.items():
        bound = [bind(program, given[entry], entry) for given in fed]
        samples.held_out[entry] = bound[_HELD_OUT_SHARE - 1 :: _HELD_OUT_SHARE] or [tensors]
        rest = [item for index, item in enumerate(bound) if index % _HELD_OUT_SHARE != _HELD_OUT_SHARE - 1]
        samples.calibration[entry] = rest or bound
    return samples


def _kept(entry: Entry) -> list[bool]:
    """For each input, whether it holds what a model made of tokens."""
    cache = entry.cache
    made = {*cache.inputs, *cache.source} if cache is not None else set()
    return [name in made for name in entry.signature.input_names]


def _read(data: Iterable[Any] | Callable[[], Iterable[Any]]) -> list[Any]:
    try:
        items = data() if callable(data) else data
        if not isinstance(items, Sequence):  # what makes them one by one may use one buffer for all
            items = (tree_map_only(Tensor, Tensor.clone, item) for item in items)
        return collect(items, "reading data", _LIMIT + 1)
    except SparcError:
        raise
    except Exception as error:  # the user's own code
        why = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise CaptureError(
            codes.INPUTS_MISSING, "data= could not be read", where=raised_at(error), why=why, hint=_DATA
        ) from error


def bind(program: Program, item: Any, name: str | None = None) -> list[Tensor]:
    """One item of data as flat tensors of an entry, by default the first.

    Raises:
        CaptureError: SPARC102 when it does not fit.
    """
    entry = program.entry(name)
    signature = entry.signature
    try:
        if isinstance(item, Mapping):
            known = {name: value for name, value in item.items() if name in signature.parameters}
            tensors = entry.bind((), known)
        else:
            tensors = entry.bind(item if isinstance(item, (tuple, list)) else (item,), {})
        InputCheck(entry)(tensors)
    except Exception as error:  # ArtifactError of a mismatch, or whatever an odd item raises
        said = error.diagnostic if isinstance(error, SparcError) else None
        why = said.what if said is not None else (str(error).splitlines() or [""])[0]
        what = "an input of data= does not fit the model"
        raise CaptureError(codes.INPUTS_MISSING, what, why=why, hint=said.hint if said is not None else "") from None
    for name, tensor in zip(signature.input_names, tensors, strict=True):
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise CaptureError(
                codes.INPUTS_MISSING, f"input {name!r} contains NaN", why="nothing can be checked on it", hint=_FINITE
            )
    return tensors


def vary(tensors: list[Tensor], seed: int, kept: Sequence[bool] = ()) -> list[Tensor]:
    """A seeded variation: floats become normal numbers of the same mean and spread, integers of many values are
    shuffled; flags stay, floats that are not all finite (masks), and those that are `kept`: a cache of random numbers
    is like none that a model makes.
    """
    generator = torch.Generator().manual_seed(seed)
    varied = []
    for tensor, keep in zip_longest(tensors, kept, fillvalue=False):
        assert isinstance(tensor, Tensor)
        if keep:
            varied.append(tensor)
        elif tensor.is_floating_point() and tensor.numel() > 1 and bool(tensor.isfinite().all()):
            mean, spread = tensor.double().mean(), tensor.double().std()
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            varied.append((noise * spread + mean).to(tensor.dtype))
        elif tensor.dtype in (torch.int32, torch.int64) and tensor.unique().numel() > 2:
            order = torch.randperm(tensor.numel(), generator=generator)
            varied.append(tensor.flatten()[order].reshape(tensor.shape))
        else:
            varied.append(tensor)
    return varied


def fit_samples(samples: Samples, program: Program) -> Samples:
    """The captured model's samples as inputs of a program whose caches may have been cut."""
    held_out, calibration = (
        {entry: [fit(program.entries[entry], tensors) for tensors in batches] for entry, batches in each.items()}
        for each in (samples.held_out, samples.calibration)
    )
    example = {entry: fit(program.entries[entry], tensors) for entry, tensors in samples.example.items()}
    return replace(samples, held_out=held_out, calibration=calibration, example=example)
