"""The kernel that decodes a whole weight into memory, for products with so many tokens that torch's own is faster."""

import hashlib

from sparc.codegen.triton.generate import row_places, sizes, template
from sparc.codegen.triton.kernel import Argument, Kernel
from sparc.codegen.triton.problem import TRITON
from sparc.codegen.triton.tiles import Tile, WeightLowering

_ROWS = 32
_PLACEHOLDER = "__kernel__"


def generate_decoding(weight: WeightLowering, dtype: str, batch: int | None = None) -> Kernel:
    """The kernel that writes `decoded` `[rows, columns]`; one program for each block of rows of one matrix.

    What a sparse weight does not store is not written: `decoded` holds zeros before.

    Args:
        weight: the lowering.
        dtype: of the dense weight, as torch names it.
        batch: the matrices that the rows belong to, where there is a batch of them.
    """
    height = weight.block_rows or _ROWS
    matrix = "matrix" if batch is not None else ""
    tile = Tile("rows", "first", height, weight.unit, dtype, "tile", matrix=matrix)  # type: ignore[arg-type]
    code, loop = weight.decode(tile), weight.loop(tile)
    body = [*loop.lines, *code.setup]
    masks = [] if weight.padded_columns == weight.columns else [f"(column < {weight.columns})[None, :]"]
    own_height = weight.rows // (batch or 1)
    masks += [f"(own_rows < {own_height})[:, None]"] if own_height % height else []
    guard = f", mask={' & '.join(masks)}" if masks else ""
    factors = f" * ({code.scale})[:, None]" if code.scale else ""
    for plane in code.planes:
        own = f" * {plane.scale}[:, None]" if plane.scale else ""
        value = f"{plane.value}.to(tl.float32){factors}{own}" if factors or own else plane.value
        body += [f"column = {plane.columns}", *plane.lines]
        body.append(
            f"tl.store(decoded + rows[:, None] * {weight.columns} + column[None, :], ({value}).to(tl.{dtype}){guard})"
        )
    arguments = [
        *(Argument(each.name, f"*{each.type}", True) for each in weight.buffers),
        Argument("decoded", f"*{TRITON[dtype]}", True),
    ]
    source = template("decode.py.jinja").render(
        name=_PLACEHOLDER,
        rows=sizes(own_height, batch or 1),
        columns=weight.columns,
        encoding=weight.key(),
        dtype=dtype,
        arguments=[argument.name for argument in arguments],
        before=[*row_places(weight, height, batch), *loop.before, *code.before],
        loop=[f"for step in range(0, {loop.steps}):"],
        body=body,
    )
    name = f"decode_{hashlib.sha256(source.encode()).hexdigest()[:12]}"
    return Kernel(name, source.replace(_PLACEHOLDER, name), tuple(arguments), num_warps=4, num_stages=2)


def decoding_grid(weight: WeightLowering, batch: int = 1) -> tuple[int, int, int]:
    """How many programs are launched."""
    return batch * -(-weight.rows // batch // (weight.block_rows or _ROWS)), 1, 1
