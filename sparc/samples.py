"""The inputs that checks and calibration run on: the user's data, split, or seeded variations of the example inputs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from sparc import codes
from sparc.diag import CaptureError, Diagnostics, SparcError
from sparc.inputs import InputCheck
from sparc.pass_base import Samples
from sparc.program import Program
from sparc.progress import collect
from sparc.source import raised_at

Data = Iterable[Any] | Callable[[], Iterable[Any]] | None
_LIMIT = 1024
_DATA = "data= is a sequence of inputs like example_inputs, or a function that returns one"
_FINITE = "give example_inputs and data= without NaN"
_HELD_OUT_SHARE = 4


def make_samples(program: Program, examples: Any, data: Data, diagnostics: Diagnostics) -> Samples:
    """Samples for the program's first entry.

    Args:
        program: the captured program.
        examples: the example inputs, positional or by name.
        data: more inputs like them, or a function that returns them; every fourth one is held out from calibration.
        diagnostics: told when there is no data.

    Raises:
        CaptureError: SPARC102 when an item does not fit the program's signature.
    """
    entry = next(iter(program.entries))
    example = bind(program, examples)
    if data is None:
        diagnostics.remark(codes.SYNTHETIC_DATA, "measurements ran on synthetic inputs", why="data= was not given")
        cached = set(program.main.cache.inputs) if program.main.cache is not None else set()
        kept = [name in cached for name in program.main.signature.input_names]
        made = [example, *(vary(example, seed, kept) for seed in (1, 2))]
        return Samples({entry: made[:2]}, {entry: made[1:]}, True, {entry: example})
    bound = [bind(program, item) for item in _read(data)]
    if not bound:
        raise CaptureError(
            codes.INPUTS_MISSING, "data= is empty", hint="give at least one input, better sixteen or more"
        )
    held_out = bound[_HELD_OUT_SHARE - 1 :: _HELD_OUT_SHARE] or [example]
    calibration = [item for index, item in enumerate(bound) if index % _HELD_OUT_SHARE != _HELD_OUT_SHARE - 1]
    return Samples({entry: held_out}, {entry: calibration or bound}, False, {entry: example})


def _read(data: Iterable[Any] | Callable[[], Iterable[Any]]) -> list[Any]:
    try:
        return collect(data() if callable(data) else data, "reading data", _LIMIT)
    except SparcError:
        raise
    except Exception as error:  # the user's own code
        why = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise CaptureError(
            codes.INPUTS_MISSING, "data= could not be read", where=raised_at(error), why=why, hint=_DATA
        ) from error


def bind(program: Program, item: Any) -> list[Tensor]:
    """One item of data as flat tensors.

    Raises:
        CaptureError: SPARC102 when it does not fit.
    """
    signature = program.main.signature
    try:
        if isinstance(item, Mapping):
            known = {name: value for name, value in item.items() if name in signature.parameters}
            tensors = program.main.bind((), known)
        else:
            tensors = program.main.bind(item if isinstance(item, (tuple, list)) else (item,), {})
        InputCheck(program.main)(tensors)
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
