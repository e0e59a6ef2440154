"""A matrix whose rows are looked up and which integer products multiply by: a head tied to an embedding, stored once.

ONNX Runtime packs constant matrices of rank 2 into a copy of its own and would hold the table beside it; matrices of
rank 3 it reads as they are. So both uses read one tensor `[1, reduce, out]`: products multiply by it, lookups gather
its columns. A product then takes longer for few rows of x than on a packed copy, and the weight half the memory.
"""

from collections.abc import Iterator

import onnx_ir as ir
from torch import fx

from sparc.codegen.onnx.emit import Emitter
from sparc.codegen.onnx.sites.codes import IntMatrix
from sparc.codegen.onnx.sites.product import match_product, takes_integers
from sparc.program import weight_nodes

LOOKUP = "aten.embedding.default"


def shares_columns(e: Emitter, w: IntMatrix) -> bool:
    """Whether lookups and integer products read one copy of a matrix: when it has both, and no other use."""
    if not w.rows_are_read():
        return False
    others = [node for node in readers(e, w) if str(node.target) != LOOKUP]
    sites = [match_product(e, node) for node in others]
    return bool(sites) and all(
        site is not None and takes_integers(e, site) and site.node.meta["val"].ndim > 1 for site in sites
    )


def shared_codes(w: IntMatrix) -> tuple[ir.Value, ir.Value | None]:
    """The int8 codes that lookups and products share, `[1, reduce, out]`, and the products' zero point: 0-d, or
    `[1, 1, out]`; None for zero.
    """
    out, reduce = w.shape
    if w.grid.symmetric:
        return w.read("codes", "transpose", dims=(1, reduce, out)), None
    codes = w.read("codes", "transpose+flip_sign", dims=(1, reduce, out))
    count = w.part("zero").numel()
    return codes, w.read("zero", "flip_sign", dims=() if count == 1 else (1, 1, count))


def readers(e: Emitter, w: IntMatrix) -> Iterator[fx.Node]:
    """Every operator, of every entry, that reads the decoded matrix."""
    for entry in e.program.entries.values():
        for codes in weight_nodes(entry.graph, w.weight.parts["codes"]):
            for decode in codes.users:
                yield from decode.users
