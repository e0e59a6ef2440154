"""Measured times of candidates on the GPU that is here, kept on disk: what the cost model says is corrected by them."""

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton

from sparc import codes, files
from sparc.codegen.triton.checking import random_operand, random_value
from sparc.codegen.triton.launch import make_scratch
from sparc.codegen.triton.operator import SiteOperator, SiteTensors
from sparc.codegen.triton.operators import launch
from sparc.codegen.triton.problem import Configuration
from sparc.codegen.triton.regimes import Regime
from sparc.codegen.triton.sites import Site, buffers
from sparc.codegen.triton.timing import copies_of, record, time_in_turns
from sparc.diag import Diagnostics, SparcError
from sparc.program import location

Timer = Callable[[Sequence[Callable[[], object]]], float]

_LIMIT = 1 << 25  # bytes of a cache that is read
_COPIES = 64


def default_folder() -> Path:
    """Where times are kept: the user's cache folder."""
    return Path.home() / ".cache" / "sparc"


class TuningCache:
    """Seconds by what was timed: one JSON file for each device and version of Triton.

    A file that cannot be read counts as empty, and one that cannot be written is not written: nothing depends on it but
    time.
    """

    def __init__(self, folder: Path, device: str) -> None:
        """Args: the folder; the GPU's name."""
        name = "".join(each if each.isalnum() else "-" for each in f"{device} triton {triton.__version__}")
        self._folder, self._name = folder, f"tuning-{name.lower()}.json"
        self._times = self._read()

    def get(self, key: str) -> float | None:
        """The seconds of a key; infinite where it does not run."""
        return self._times.get(key)

    def put(self, key: str, seconds: float) -> None:
        """Keep a time."""
        self._times[key] = seconds

    def write(self) -> None:
        """Write the file, whole or not at all."""
        text = json.dumps(dict(sorted(self._times.items())), indent=0)
        with contextlib.suppress(OSError, SparcError):
            self._folder.mkdir(parents=True, exist_ok=True)
            files.replace_file(self._folder / self._name, text.encode())

    def _read(self) -> dict[str, float]:
        try:
            if (self._folder / self._name).stat().st_size > _LIMIT:
                return {}
            content = json.loads((self._folder / self._name).read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        known = content.items() if isinstance(content, dict) else ()
        return {key: float(value) for key, value in known if isinstance(value, (int, float))}


class Tuner:
    """Times sites on the GPU, once each.

    Attributes:
        cache: what was timed before.
        timings: seconds of every kernel that was asked for, by its digest.
    """

    def __init__(
        self, cache: TuningCache, diagnostics: Diagnostics, timer: Timer | None = None, device: str = "cuda"
    ) -> None:
        """Args: the cache; where remarks go; what times functions that do the same; where tensors are."""
        self.cache = cache
        self.timings: dict[str, float] = {}
        self._diagnostics, self._timer, self._device = diagnostics, timer or _graph_seconds, device

    def seconds(self, site: Site, configuration: Configuration | None, tokens: int) -> float:
        """The time of a site served by one configuration (None: by torch), at a number of tokens; infinite if it
        fails.
        """
        operator = SiteOperator(site, [Regime(None, configuration, 0)])
        key = f"{operator.digest}-{tokens}"
        known = self.cache.get(key)
        if known is None:
            known = self._measure(operator, tokens)
            self.cache.put(key, known)
        self.timings.update({kernel.digest: known for kernel in operator.kernels if kernel is not None})
        return known

    def _measure(self, operator: SiteOperator, tokens: int) -> float:
        site = operator.site
        generator = torch.Generator().manual_seed(0)
        try:
            x = random_value(site.x, generator, tokens).to(self._device)
            operands = [random_operand(each, generator, x, operator).to(self._device) for each in site.operands]
            laid = [tensor.to(self._device) for tensor in buffers(site)]
            scratch = make_scratch(operator.scratch_sizes(operator.tokens(x)), self._device)
            copies = min(copies_of(sum(tensor.nbytes for tensor in laid)), _COPIES)
            sets = [SiteTensors([tensor.clone() for tensor in laid], operands) for _ in range(copies)]

            def call(tensors: SiteTensors) -> Callable[[], object]:
                return lambda: operator.run(x, tensors, scratch, launch, 0)

            return self._timer([call(each) for each in sets])
        except Exception as error:  # whatever the compiler or the driver raises: the candidate is out
            why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            what = f"a kernel of {site.names[0]} was not timed"
            self._diagnostics.remark(codes.LEFT_TO_TORCH, what, where=location(site.anchors[0]), why=why)
            return math.inf


def _graph_seconds(functions: Sequence[Callable[[], object]]) -> float:
    return time_in_turns({"": record(functions)}, rounds=15)[""]
