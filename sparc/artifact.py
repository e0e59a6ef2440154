"""Artifacts: a compiled program with its report, callable like the model, saved as a folder that can be checked.

A folder holds `manifest.json` (written last; sizes and SHA-256 of the rest), `program.json`, `target.json`,
`report.json`, `recipe.toml`, `weights.safetensors`, the target's own files, and outside of the manifest `timings.json`.
Identical inputs give identical bytes.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from sparc import codes, files
from sparc.checkpoint.export import Exported, export_checkpoint
from sparc.diag import ArtifactError, Diagnostic, LoweringError, SparcError
from sparc.encoding.base import Encoding
from sparc.encoding.parse import parse_spec
from sparc.files import FileRecord
from sparc.generation.artifact import generate, open_session, stream
from sparc.generation.attachments import ATTACHMENTS
from sparc.generation.session import Session
from sparc.inputs import InputCheck
from sparc.ledger import Ledger
from sparc.program import Program
from sparc.report import Report
from sparc.serialize import TensorFile, TensorReader, program_from_dict, program_to_dict, schema
from sparc.serialize.masked import masked_from_json, masked_to_json
from sparc.serialize.records import records_from_dict, records_to_dict, timings_to_dict
from sparc.serialize.schema import malformed
from sparc.target import Emission, EmitContext, Lowering, Runner, StoredTensor, Target

FORMAT = "sparc artifact"
VERSION = 1
_MANIFEST, _TIMINGS, _WEIGHTS, _RECIPE = "manifest.json", "timings.json", "weights.safetensors", "recipe.toml"
_OWN = ("program.json", "target.json", "report.json", _RECIPE, _WEIGHTS)
_BESIDE = frozenset({_MANIFEST, _TIMINGS, "report.html"})
_MANIFEST_LIMIT = 1 << 20
_JSON_LIMIT = 1 << 28
_FILE_LIMIT = 1 << 31
_HASH = re.compile(r"[0-9a-f]{64}")


class Artifact:
    """A compiled model: callable like the model it was compiled from.

    Attributes:
        program: what was compiled, runnable in eager torch.
        ledger: what every pass did, as records.
        diagnostics: warnings and remarks.
        emission: what the target made of the program.
        recipe_text: the recipe as TOML.
        attachments: files that came with the model, such as its tokenizer's (`ATTACHMENTS`).
    """

    def __init__(
        self,
        program: Program,
        ledger: Ledger,
        diagnostics: Iterable[Diagnostic],
        emission: Emission,
        recipe_text: str = "",
        attachments: Mapping[str, bytes] | None = None,
    ) -> None:
        """Args: see the attributes."""
        self.program = program
        self.ledger = ledger
        self.diagnostics = diagnostics
        self.emission = emission
        self.recipe_text = recipe_text
        self.attachments = dict(attachments or {})
        self._threads: int | None = None
        self._runners: dict[str, tuple[InputCheck, Runner]] = {}

    @property
    def report(self) -> Report:
        """What was done, what it gained and what it cost."""
        return Report(self.ledger, self.diagnostics)

    @property
    def target(self) -> str:
        """The target's name."""
        return self.emission.target

    @property
    def sources(self) -> Mapping[str, str]:
        """The program, and whatever code the target generated, as text by file name."""
        return {"program.txt": self.program.text(), **getattr(self.emission, "sources", {})}

    # calling --------------------------------------------------------------------------------------------------------
    @property
    def threads(self) -> int | None:
        """How many threads the runtime uses; None leaves it to the runtime."""
        return self._threads

    @threads.setter
    def threads(self, count: int | None) -> None:
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise ArtifactError(codes.CALL_MISMATCH, f"threads={count!r} is no positive number")
        if count != self._threads:
            self._threads = count
            self._runners.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the first entry in the target's runtime; inputs and outputs are the model's own.

        Raises:
            ArtifactError: SPARC506 when the inputs do not fit.
        """
        return self.call(next(iter(self.program.entries)), *args, **kwargs)

    def call(self, entry: str, /, *args: Any, **kwargs: Any) -> Any:
        """Run an entry by name."""
        if entry not in self.program.entries:
            raise self._no_entry(entry)
        called = self.program.entries[entry]
        return called.signature.unflatten(self.run_flat(called.bind(args, kwargs), entry))

    def _no_entry(self, name: str) -> ArtifactError:
        known = ", ".join(self.program.entries)
        return ArtifactError(codes.CALL_MISMATCH, f"there is no entry {name!r}", hint=f"the entries are {known}")

    def run_flat(self, tensors: Sequence[Tensor], entry: str | None = None) -> list[Tensor]:
        """Run an entry on one tensor per input; returns the flat outputs.

        Raises:
            ArtifactError: SPARC506 when dtypes or shapes do not fit.
        """
        name = entry if entry is not None else next(iter(self.program.entries))
        if name not in self._runners:
            check = InputCheck(self.program.entries[name])
            self._runners[name] = check, self.emission.runner(name, threads=self._threads)
        check, runner = self._runners[name]
        check(tensors)
        return runner(tensors)

    def session(
        self,
        batch: int = 1,
        length: int | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Session:
        """Sequences to feed and continue: see `sparc.generation.artifact.open_session`."""
        return open_session(self, batch, length, input_ids, attention_mask)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Continue prompts; the arguments, results and errors are those of `sparc.generation.artifact.generate`."""
        return generate(self, input_ids, attention_mask, **options)

    def stream(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Iterator[Tensor]:
        """As `generate`, but yields the next token of every sequence, int64 `[batch]`, as soon as it is known."""
        return stream(self, input_ids, attention_mask, **options)

    # saving ---------------------------------------------------------------------------------------------------------
    def save(self, folder: str | Path) -> Path:
        """Write the artifact's folder, whole or not at all; an artifact that is there is replaced in one rename.

        Returns:
            The folder.

        Raises:
            ArtifactError: SPARC505 when the disk is full, the place is not writable or holds something else, SPARC508
                when the program cannot be stored.
        """
        described = program_to_dict(self.program, self.emission.stored)
        tensors = TensorFile(described.tensors)
        target = {
            "name": self.emission.target,
            "tensors": [_stored_row(each) for each in self.emission.stored],
        }
        contents: dict[str, Iterable[files.Buffer]] = {
            _WEIGHTS: tensors.chunks(),
            "program.json": [schema.to_json(described.program)],
            "target.json": [schema.to_json(target)],
            "report.json": [schema.to_json(records_to_dict(self.ledger, self.diagnostics))],
            _RECIPE: [self.recipe_text.encode()],
        }
        contents.update((name, [content]) for name, content in self.attachments.items() if name in ATTACHMENTS)
        for name, content in self.emission.files(tensors.spans).items():
            files.check_name(name)
            if name in contents or name in _BESIDE:
                raise schema.unwritable(f"the target {self.target} names a file {name!r}", "that name is taken")
            contents[name] = [content]
        with files.new_folder(folder, _may_replace) as temporary:
            records = {name: files.write_file(temporary / name, contents[name]) for name in sorted(contents)}
            files.write_file(temporary / _TIMINGS, [schema.to_json(timings_to_dict(self.ledger))])
            files.write_file(temporary / _MANIFEST, [_manifest_json(self.target, records)])
        return Path(folder)

    def export_onnx(self, path: str | Path, external_data: bool | None = None, *, entry: str | None = None) -> Path:
        """Write an entry, by default the first, as one ONNX file, with its weights inside or (`external_data`, or above
        1.5 GB) beside it.

        Raises:
            LoweringError: SPARC509 when the target is not ONNX.
            ArtifactError: SPARC505, SPARC506 for an entry that does not exist.
        """
        export = getattr(self.emission, "export_onnx", None)
        if export is None:
            raise LoweringError(codes.NOT_EXPORTABLE, f"target {self.target!r} does not export ONNX")
        if entry is not None and entry not in self.program.entries:
            raise self._no_entry(entry)
        export(Path(path), external_data=external_data, entry=entry)
        return Path(path)

    def export_checkpoint(self, folder: str | Path) -> Exported:
        """Write a Hugging Face folder with packed weights, for vLLM: see `sparc.checkpoint.export`."""
        return export_checkpoint(self, folder)


def _manifest_json(target: str, records: Mapping[str, FileRecord]) -> bytes:
    described = {
        "format": FORMAT,
        "version": VERSION,
        "sparc": sparc_version(),
        "target": target,
        "files": {name: {"size": record.size, "sha256": record.sha256} for name, record in records.items()},
    }
    return schema.to_json(described)


def sparc_version() -> str:
    """The installed version of sparc."""
    try:
        return metadata.version("sparc-compiler")
    except metadata.PackageNotFoundError:
        return "unknown"


def check_destination(folder: str | Path) -> None:
    """Check, before any work is done, that an artifact could be saved to `folder`.

    Raises:
        ArtifactError: SPARC505.
    """
    files.check_destination(folder, _may_replace)


def _may_replace(folder: Path) -> str | None:
    """Why a folder must not be replaced: it holds something that is not an artifact's."""
    if not folder.is_dir():
        return "a file is there"
    present = {each.name for each in folder.iterdir()}
    if not present:
        return None
    if _MANIFEST not in present:
        return "the folder is not empty and holds no artifact"
    try:
        listed = _read_manifest(folder)[1]
    except ArtifactError:
        return "the folder holds a manifest that is not sparc's"
    foreign = sorted(present - set(listed) - _BESIDE)
    return f"the folder also holds {foreign[0]!r}" if foreign else None


# loading ------------------------------------------------------------------------------------------------------------
def load_artifact(
    folder: str | Path,
    encodings: Mapping[str, type[Encoding]],
    find_target: Callable[[str], Target],
    lowerings: Mapping[tuple[str, str], Lowering] | None = None,
) -> Artifact:
    """Read an artifact from its folder; every file is checked before it is used, and weights stay on disk until they
    are needed.

    Args:
        folder: the folder.
        encodings: the encodings that may be named, by name.
        find_target: the target of a name; raises SPARC201 when there is none.
        lowerings: extensions' lowerings, as `EmitContext` has them.

    Raises:
        ArtifactError: SPARC501 to SPARC504 when a file is missing, altered, malformed or a link, SPARC507 for another
            format version.
        PassError: SPARC201 when an encoding or the target is not registered.
    """
    place = Path(folder)
    target_name, records = check_folder(place)
    read = partial(_read_json, place)
    stored_rows = schema.fields(read("target.json"), "target.json", ["name", "tensors"])
    if stored_rows["name"] != target_name:
        raise malformed("target.json names another target than the manifest")
    target = find_target(target_name)
    with TensorReader(place / _WEIGHTS) as reader:
        program, _ = program_from_dict(read("program.json"), reader.get, partial(parse_spec, known=encodings))
        with schema.reading("target.json"):
            stored = [_stored(row, reader) for row in schema.items(stored_rows["tensors"], "tensors")]
    timings = _read_json(place, _TIMINGS) if (place / _TIMINGS).exists() else None
    ledger, diagnostics = records_from_dict(read("report.json"), timings)
    beside = {name: files.read_file(place, name, _FILE_LIMIT) for name in records if name not in _OWN}
    own = {name: content for name, content in beside.items() if name not in ATTACHMENTS}
    attached = {name: content for name, content in beside.items() if name in ATTACHMENTS}
    recipe = files.read_file(place, _RECIPE, _MANIFEST_LIMIT).decode(errors="replace")
    context = EmitContext(diagnostics, lowerings=lowerings or {})
    emission = _load_emission(target, program, own, stored, context)
    return Artifact(program, ledger, diagnostics, emission, recipe, attached)


def _load_emission(
    target: Target,
    program: Program,
    own: Mapping[str, bytes],
    stored: Sequence[StoredTensor],
    context: EmitContext,
) -> Emission:
    try:
        return target.load(program, own, stored, context)
    except SparcError:
        raise
    except Exception as error:  # whatever the target's own parser raises
        why = f"{type(error).__name__}: {error}"[:200]
        raise malformed(f"the files of target {target.name!r} cannot be read", why) from None


def check_folder(folder: Path) -> tuple[str, dict[str, FileRecord]]:
    """Check sizes and hashes of a folder's files; returns the target's name and the records.

    Raises:
        ArtifactError: SPARC501 to SPARC504, SPARC507.
    """
    if not folder.is_dir():
        raise ArtifactError(codes.ARTIFACT_MISSING_FILE, f"there is no folder {folder.name!r}", hint="check the path")
    target, records = _read_manifest(folder)
    for name in _OWN:
        if name not in records:
            raise malformed(f"the manifest does not list {name}")
    for name, record in records.items():
        size = files.check_file(folder, name, 1 << 62)
        if size != record.size:
            raise ArtifactError(
                codes.ARTIFACT_ALTERED, f"{name} has another size", why=f"{size} bytes, not {record.size}"
            )
        if files.record_of(folder, name) != record:
            raise ArtifactError(
                codes.ARTIFACT_ALTERED, f"{name} was altered", why="its SHA-256 differs from the manifest's"
            )
    return target, records


def _read_manifest(folder: Path) -> tuple[str, dict[str, FileRecord]]:
    content = schema.from_json(files.read_file(folder, _MANIFEST, _MANIFEST_LIMIT), _MANIFEST)
    if content.get("format") != FORMAT:
        raise malformed(f"{_MANIFEST} is not of a sparc artifact")
    if content.get("version") != VERSION:
        why = f"it is version {str(content.get('version'))[:20]}, written by sparc {str(content.get('sparc'))[:20]}"
        raise ArtifactError(codes.VERSION_UNKNOWN, f"this sparc reads format version {VERSION}", why=why)
    found = schema.fields(content, _MANIFEST, ["format", "version", "sparc", "target", "files"])
    records: dict[str, FileRecord] = {}
    for name, row in schema.entries(found["files"], "files").items():
        files.check_name(name)
        schema.fields(row, f"the record of {name}", ["size", "sha256"])
        if not isinstance(row["sha256"], str) or not _HASH.fullmatch(row["sha256"]):
            raise malformed(f"the record of {name} has no SHA-256")
        records[name] = FileRecord(schema.integer(row["size"], "a size", 0), row["sha256"])
    return schema.text(found["target"], "the target", 128), records


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    return schema.from_json(files.read_file(folder, name, _JSON_LIMIT), name)


def _stored_row(stored: StoredTensor) -> list[Any]:
    return [stored.name, stored.weight, stored.layout, *([masked_to_json(stored.masked)] if stored.masked else [])]


def _stored(row: Any, reader: TensorReader) -> StoredTensor:
    name, weight, layout, *masked = schema.items(row, "a stored tensor")
    if weight is not None:
        schema.text(weight, "a weight's name")
    tensor = reader.get(schema.text(name, "a tensor's name"))
    mask = masked_from_json(*masked) if masked else None
    return StoredTensor(name, tensor, weight, schema.text(layout, "a layout", 256), mask)
