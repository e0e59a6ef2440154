"""What an ONNX target made of a program: models without weights, and the tensors they read."""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from torch import Tensor

from sparc import codes
from sparc.cache import LOGITS, Cache
from sparc.codegen.onnx.check import check_model, check_parity
from sparc.codegen.onnx.cuda import uncovered
from sparc.codegen.onnx.runtime import NO_SPIN, OnnxRunner, has_cuda
from sparc.codegen.onnx.session import CacheSession, keeps_cache_in_place
from sparc.codegen.onnx.store import part_of, raw_bytes, read_by, stored_name
from sparc.diag import ArtifactError
from sparc.program import Program
from sparc.target import KernelUse, Span, StoredTensor

WEIGHTS_FILE = "weights.safetensors"
_EMBED_LIMIT = int(1.5e9)
_SMALL = 1024
_ALIGN = 4096


@dataclass
class OnnxEmission:
    """Models by entry; their external initializers are the stored tensors.

    Args:
        target: the target's name.
        models: one model per entry, external data left open.
        stored: every stored tensor once.
        kernels: what carries each compressed weight.
        caches: by entry, which of its tensors one call leaves for the next.
    """

    target: str
    models: dict[str, onnx.ModelProto]
    stored: list[StoredTensor]
    kernels: Mapping[str, KernelUse] = field(default_factory=dict)
    caches: Mapping[str, Cache] = field(default_factory=dict)
    _opened: dict[str, tuple[int | None, OnnxRunner]] = field(default_factory=dict, init=False, repr=False)

    @property
    def native(self) -> bool:
        """ONNX Runtime runs everywhere."""
        return True

    def file_name(self, entry: str) -> str:
        """The entry's model file: `model.onnx` for the first."""
        return "model.onnx" if entry == next(iter(self.models)) else f"{entry}.onnx"

    def runner(
        self,
        entry: str | None = None,
        *,
        threads: int | None = None,
        spin: bool = True,
        options: Mapping[str, str] | None = None,
    ) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """A callable on one tensor per input, in ONNX Runtime.

        Args:
            entry: the entry; the first by default.
            threads: threads of one operator.
            spin: whether idle threads wait actively.
            options: session configuration entries of ONNX Runtime.

        Raises:
            LoweringError: SPARC405 without ONNX Runtime, SPARC406 when it refuses the model.
        """
        cuda = self.target == "onnx:cuda" and has_cuda()
        entries = {**({} if spin else NO_SPIN), **(options or {})}
        return OnnxRunner(self._model(entry), self._by_name(), threads=threads, cuda=cuda, options=entries)

    def session(self, entry: str | None, batch: int, length: int, *, threads: int | None = None) -> CacheSession:
        """An entry with a cache, which is kept from call to call.

        All of an entry's sessions run in the same one of ONNX Runtime, which takes as long to open as many tokens.

        Args:
            entry: the entry; the first by default.
            batch: how many sequences.
            length: how many places the cache gets at most.
            threads: threads of one operator.

        Raises:
            LoweringError: SPARC405 without ONNX Runtime, SPARC406 when it refuses the model.
        """
        name = entry or next(iter(self.models))
        if name not in self._opened or self._opened[name][0] != threads:
            self._opened[name] = threads, OnnxRunner(self.models[name], self._by_name(), threads=threads)
        return CacheSession(self._opened[name][1], self.models[name], self.caches[name], batch, length)

    def shares_cache(self, entry: str) -> bool:
        """Whether past and present may be one buffer of a fixed length."""
        return entry in self.caches and keeps_cache_in_place(self.models[entry], self.caches[entry])

    def declare_one_place(self, entry: str) -> None:
        """State in the model that logits have one place, as they do where `logits_to_keep` is left out: runtimes that
        make room for results before they run go by that.
        """
        for output in self.models[entry].graph.output:
            if output.name == LOGITS:
                place = output.type.tensor_type.shape.dim[1]
                place.Clear()
                place.dim_value = 1

    def check(
        self, program: Program, inputs: Mapping[str, Sequence[Tensor]], reference: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, float]:
        """Every model is valid ONNX, and computes in ONNX Runtime what the program computes; see `check_parity`.

        Args:
            program: what was emitted.
            inputs: for each entry to run, one tensor per input.
            reference: for each entry, the uncompressed model's outputs by name.

        Returns:
            For each output of the entries that ran, its largest relative difference.

        Raises:
            LoweringError: SPARC402, SPARC404.
        """
        for model in self.models.values():
            check_model(model)
        found = {}
        for entry, tensors in inputs.items():
            run = self.runner(entry)
            for parity in check_parity(program, run, tensors, entry=entry, reference=reference.get(entry)):
                found[parity.output] = parity.difference
        return found

    def without_kernel(self) -> list[dict[str, str]]:
        """What ONNX Runtime leaves to the CPU, for the CUDA flavour: `entry`, `node`, `operator` and `why`."""
        if self.target != "onnx:cuda":
            return []
        return [
            {"entry": entry, "node": each.node, "operator": each.operator, "why": each.why}
            for entry, model in self.models.items()
            for each in uncovered(model)
        ]

    def files(self, spans: Mapping[str, Span]) -> dict[str, bytes]:
        """The model files, whose external data points into `weights.safetensors`.

        Args:
            spans: where each stored tensor lies in that file, by name.
        """
        made = {}
        for entry, model in self.models.items():
            placed = onnx.ModelProto()
            placed.CopyFrom(model)
            for tensor in _external(placed):
                self._point(tensor, WEIGHTS_FILE, spans[stored_name(tensor.name)])
            made[self.file_name(entry)] = placed.SerializeToString(deterministic=True)
        return made

    def export_onnx(
        self, path: str | os.PathLike[str], *, external_data: bool | None = None, entry: str | None = None
    ) -> None:
        """Write one entry as a model of its own: whole or not at all.

        Args:
            path: the file to write.
            external_data: keep weights beside it in `NAME.data`; by default only above 1.5 GB.
            entry: the entry; the first by default.

        Raises:
            ArtifactError: SPARC505 when a file cannot be written, or the weights do not fit into one file.
        """
        target = Path(path)
        model = onnx.ModelProto()
        model.CopyFrom(self._model(entry))
        read = {stored_name(tensor.name) for tensor in _external(model)}
        total = sum(self._by_name()[name].tensor.nbytes for name in read)
        if external_data is False and total >= onnx.checker.MAXIMUM_PROTOBUF:
            raise ArtifactError(
                codes.WRITE_FAILED, "weights above 2 GB do not fit into one file", hint="pass external_data=True"
            )
        beside = external_data if external_data is not None else total > _EMBED_LIMIT
        try:
            if beside:
                write_whole(target.with_name(target.name + ".data"), self._place_beside(model, target.name + ".data"))
            else:
                self._embed(model)
            write_whole(target, [model.SerializeToString(deterministic=True)])
        except OSError as error:
            raise ArtifactError(
                codes.WRITE_FAILED, f"cannot write {target.name}", why=str(error.strerror or error)
            ) from None

    def _model(self, entry: str | None) -> onnx.ModelProto:
        return self.models[entry or next(iter(self.models))]

    def _by_name(self) -> dict[str, StoredTensor]:
        return {stored.name: stored for stored in self.stored}

    def _embed(self, model: onnx.ModelProto, limit: float = float("inf")) -> None:
        stored = self._by_name()
        for tensor in _external(model):
            held = read_by(tensor.name, stored)
            if held.nbytes < limit:
                tensor.data_location = onnx.TensorProto.DEFAULT
                del tensor.external_data[:]
                tensor.raw_data = raw_bytes(held)

    def _place_beside(self, model: onnx.ModelProto, file: str) -> list[bytes | Tensor]:
        """Point the model's large tensors into one aligned file; its content in pieces."""
        self._embed(model, limit=_SMALL)
        stored, end = self._by_name(), 0
        places: dict[str, Span] = {}
        pieces: list[bytes | Tensor] = []
        for tensor in _external(model):
            name = stored_name(tensor.name)
            if name not in places:
                gap = -end % _ALIGN
                pieces += [bytes(gap), stored[name].tensor]
                places[name] = Span(end + gap, stored[name].tensor.nbytes)
                end += gap + stored[name].tensor.nbytes
            self._point(tensor, file, places[name])
        return pieces

    def _point(self, tensor: onnx.TensorProto, file: str, span: Span) -> None:
        """Point an initializer to what it reads of its stored tensor, which lies at `span` of a file."""
        length = read_by(tensor.name, self._by_name()).nbytes
        offset = span.offset + length * (part_of(tensor.name) or 0)
        del tensor.external_data[:]
        for key, value in (("location", file), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)


def _external(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    return [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]


def write_whole(path: Path, pieces: Sequence[bytes | Tensor]) -> None:
    """Write a file under a temporary name, flush it to disk, then rename it; nothing is left behind on failure."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for piece in pieces:
                file.write(raw_bytes(piece) if isinstance(piece, Tensor) else piece)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
