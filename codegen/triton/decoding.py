"""The kernel that decodes a whole weight into memory, for products with so many tokens that torch's own is faster."""

import hashlib

from sparc.codegen.triton.generate import template
from sparc.codegen.triton.kernel import Argument, Kernel
from sparc.codegen.triton.problem import TRITON
from sparc.codegen.triton.tiles import Tile, WeightLowering

_ROWS = 32
_PLACEHOLDER = "__kernel__"


def generate_decoding(weight: WeightLowering, dtype: str) -> Kernel:
    """The kernel that writes `dense` `[rows, columns]`; one program for each block of rows.

    What a sparse weight does not store is not written: `dense` holds zeros before.

    Args:
        weight: the lowering.
        dtype: of the dense weight, as torch names it.
    """
    height = weight.block_rows or _ROWS
    tile = Tile("rows", "first", height, weight.unit, dtype, "tile")  # type: ignore[arg-type]
    code, loop = weight.decode(tile), weight.loop(tile)
    body = [*loop.lines, *code.setup]
    masks = [] if weight.padded_columns == weight.columns else [f"(column < {weight.columns})[None, :]"]
    masks += [f"(own_rows < {weight.rows})[:, None]"] if weight.rows % height else []
    guard = f", mask={' & '.join(masks)}" if masks else ""
    factors = f" * ({code.scale})[:, None]" if code.scale else ""
    for plane in code.planes:
        own = f" * {plane.scale}[:, None]" if plane.scale else ""
        value = f"{plane.value}.to(tl.float32){factors}{own}" if factors or own else plane.value
        body += [f"column = {plane.columns}", *plane.lines]
        body.append(
            f"tl.store(dense + rows[:, None] * {weight.columns} + column[None, :], ({value}).to(tl.{dtype}){guard})"
        )
    arguments = [
        *(Argument(each.name, f"*{each.type}", True) for each in weight.buffers),
        Argument("dense", f"*{TRITON[dtype]}", True),
    ]
    source = template("decode.py.jinja").render(
        name=_PLACEHOLDER,
        rows=weight.rows,
        columns=weight.columns,
        encoding=weight.key(),
        dtype=dtype,
        arguments=[argument.name for argument in arguments],
        block_rows=height,
        before=[*loop.before, *code.before],
        loop=[f"for step in range(0, {loop.steps}):"],
        body=body,
    )
    name = f"decode_{hashlib.sha256(source.encode()).hexdigest()[:12]}"
    return Kernel(name, source.replace(_PLACEHOLDER, name), tuple(arguments), num_warps=4, num_stages=2)


def decoding_grid(weight: WeightLowering) -> tuple[int, int, int]:
    """How many programs are launched."""
    return -(-weight.rows // (weight.block_rows or _ROWS)), 1, 1
