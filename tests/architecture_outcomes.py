"""What the sweep of compilations expects; docs/architectures.md is written from it."""

from dataclasses import dataclass

from tests.architectures import ARCHITECTURES, Architecture
from tests.more_architectures import MORE

SWEPT: dict[str, Architecture] = {**ARCHITECTURES, **MORE}
FLOOR_DB = 20.0


@dataclass(frozen=True)
class Refusal:
    """Why an architecture cannot be compiled.

    Args:
        code: the diagnostic's.
        where: what its place names.
        reason: what stands in the way, and whose it is.
    """

    code: str
    where: str
    reason: str


_READS_VALUES = "torch.export: the model decides in Python on values of tensors"

REFUSED: dict[str, Refusal] = {
    "xlnet": Refusal("SPARC104", "", "torch.export: it cannot prove that (2n − 1) mod n ≠ 0, which holds for n ≥ 2"),
    "longformer": Refusal("SPARC101", "in _chunk", f"{_READS_VALUES} (the number of chunks goes through a tensor)"),
    "reformer": Refusal("SPARC109", "", "the model returns a cache of a class that torch cannot take apart"),
    "recurrent_gemma": Refusal(
        "SPARC104",
        "",
        "the model walks over the positions in Python: `seq` cannot vary (with `batch` alone it compiles)",
    ),
    "jamba": Refusal(
        "SPARC104",
        "",
        "the model walks over the positions in Python: `seq` cannot vary (with `batch` alone it compiles)",
    ),
    "dbrx": Refusal("SPARC101", "expert_idx in expert_hit", f"{_READS_VALUES} (which experts are hit)"),
    "fsmt": Refusal("SPARC101", "make_padding_mask", f"{_READS_VALUES} (whether anything is padded)"),
    "vit_mae": Refusal("SPARC111", "embeddings", "the model masks random patches, also in eval mode"),
    "encodec": Refusal("SPARC101", "in _pad1d", f"{_READS_VALUES} (a length is kept in a tensor)"),
    "vits": Refusal("SPARC111", "duration_predictor", "the model samples noise, also in eval mode"),
    "vilt": Refusal("SPARC101", "interpolate", f"{_READS_VALUES} (the image's size is read from its mask)"),
}
