"""From a problem and a configuration to a kernel: the template's skeleton, filled with the parts' code."""

import hashlib
from importlib.resources import files
from typing import Literal

import jinja2

from sparc.codegen.triton import activation, ending, lookup
from sparc.codegen.triton.kernel import Argument, Kernel
from sparc.codegen.triton.problem import TRITON, Configuration, Problem
from sparc.codegen.triton.resources import expected
from sparc.codegen.triton.tiles import Loop, Tile, TileCode, WeightLowering

GROUPED = 8  # tiles of rows that neighbouring programs share their tokens' tiles with, where there are many tokens


def environment() -> jinja2.Environment:
    """The templates' environment; an undefined name is an error."""
    return jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)


def template(name: str) -> jinja2.Template:
    """A template of this package, by file name."""
    return environment().from_string(files("sparc.codegen.triton.templates").joinpath(name).read_text("utf-8"))


def generate(problem: Problem, configuration: Configuration) -> Kernel:
    """The kernel of a problem.

    Args:
        problem: what is computed.
        configuration: the tiles; its block of columns is a multiple of the lowering's unit that divides the columns
            stored, and its split divides the steps.

    Returns:
        The kernel; `sparc.codegen.triton.launch` says how it is launched.
    """
    parts = _Parts(problem, configuration)
    source = template("product.py.jinja").render(parts.context())
    launched = f"{source}{configuration.num_warps} {configuration.num_stages}"
    name = f"product_{hashlib.sha256(launched.encode()).hexdigest()[:12]}"
    weight = problem.weights[0]
    return Kernel(
        name,
        source.replace(_PLACEHOLDER, name),
        parts.arguments,
        configuration.num_warps,
        configuration.num_stages,
        len(problem.weights) * configuration.block_rows * configuration.block_columns,
        int(parts.loop.steps) // configuration.split if parts.loop.static else 0,
        weight.cost(problem.product).bits,
        expected(problem, configuration),
    )


def is_grouped(configuration: Configuration) -> bool:
    """Whether tiles are numbered along one axis, in groups that share what they read."""
    return configuration.block_tokens >= 64


def row_places(weight: WeightLowering, block_rows: int, batch: int | None = None) -> list[str]:
    """Code that defines `rows`, the program's rows, of which those beyond the end are the last one; `own_rows` are not
    so limited. With a batch, the rows of one `matrix`, in which they are `matrix_rows`, as `own_rows` are.
    """
    height = weight.rows // (batch or 1)
    block, name = "rows_block", "rows"
    lines = []
    if batch is not None:
        tiles = -(-height // block_rows)
        lines.append(f"matrix = rows_block // {tiles}")
        block, name = f"rows_block % {tiles}", "matrix_rows"
    lines.append(f"own_rows = {block} * {block_rows} + tl.arange(0, {block_rows})")
    lines.append(f"{name} = own_rows" if height % block_rows == 0 else f"{name} = tl.minimum(own_rows, {height - 1})")
    lines += [f"rows = matrix * {height} + matrix_rows"] if batch is not None else []
    if weight.rows * weight.padded_columns >= 1 << 31:
        lines.append("rows = rows.to(tl.int64)")
    return lines


def sizes(rows: int, batch: int) -> str:
    """The rows of a weight, in words."""
    return f"{rows} rows" if batch == 1 else f"{batch} matrices of {rows} rows"


_PLACEHOLDER = "__kernel__"


class _Parts:
    """The pieces that the template puts together."""

    def __init__(self, problem: Problem, configuration: Configuration) -> None:
        self.problem, self.configuration = problem, configuration
        self.single = configuration.block_tokens == 1
        self.lookup = configuration.form == "lookup"
        self.suffixes = ["", *(f"_{index}" for index in range(1, len(problem.weights)))]
        by_product = configuration.block_tokens <= 16 or problem.product in ("int8", "float8e4nv")
        scaled: Literal["tile", "product"] = "product" if by_product else "tile"
        self.tiles = [
            Tile(
                "rows",
                "first",
                configuration.block_rows,
                configuration.block_columns,
                problem.product,
                scaled,
                suffix,
                matrix="matrix" if problem.access.kind == "batched" else "",
            )
            for suffix in self.suffixes
        ]
        pairs = zip(problem.weights, self.tiles, strict=True)
        self.codes: list[TileCode] = [
            weight.lookup(tile) if self.lookup else weight.decode(tile) for weight, tile in pairs
        ]
        self.loop: Loop = problem.weights[0].loop(self.tiles[0])
        self.integer = problem.product == "int8" and not any(
            plane.scale for code in self.codes for plane in code.planes
        )

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """The activation, the weights' buffers, what the prologue and the epilogue read, the output, the workspace."""
        problem = self.problem
        found = [Argument("x", f"*{TRITON[problem.read]}", aligned=True)]
        for weight, suffix in zip(problem.weights, self.suffixes, strict=True):
            found += [
                Argument(buffer.name + suffix, f"*{buffer.type}", aligned=True) for buffer in problem.buffers(weight)
            ]
        found += problem.prologue.arguments
        found += [Argument(each.name, f"*{TRITON[each.dtype]}", True) for each in problem.epilogue.inputs]
        found.append(Argument("y", f"*{TRITON[problem.epilogue.dtype]}", aligned=True))
        if self.configuration.split > 1:
            found += [Argument("workspace", "*fp32", aligned=True), Argument("counters", "*i32", aligned=True)]
        return (*found, *(() if self.single else (Argument("tokens", "i32"),)))

    def context(self) -> dict[str, object]:
        """What the template is rendered with."""
        problem, chosen = self.problem, self.configuration
        tiles_of_rows = problem.tiles_of_rows(chosen.block_rows)
        shape = f"{chosen.block_rows}," if self.single else f"{chosen.block_rows}, {chosen.block_tokens}"
        width = {plane.width for code in self.codes for plane in code.planes}
        return {
            "equation": problem.equation,
            "rows": sizes(problem.rows, problem.access.batch),
            "columns": problem.columns,
            "encoding": problem.weights[0].key(),
            "product": f"{problem.product}, looked up" if self.lookup else problem.product,
            "name": _PLACEHOLDER,
            "arguments": [argument.name for argument in self.arguments],
            "single_token": self.single,
            "grouped": GROUPED if is_grouped(chosen) else 0,
            "block_tokens": chosen.block_tokens,
            "tiles_of_rows": tiles_of_rows,
            "before": [*self._places(), *self._before()],
            "accumulators": [f"sum{suffix}" for suffix in self.suffixes],
            "accumulator_shape": f"{chosen.block_rows}, {max(width)}" if self.single else shape,
            "accumulator_type": "int32" if self.integer else "float32",
            "loop": self._loop(),
            "body": self._body(),
            "after": self._after(),
            "split": chosen.split,
            "tile": "rows_block" if self.single else f"tokens_block * {tiles_of_rows} + rows_block",
            "deterministic": chosen.deterministic,
            "products": [f"product{suffix}" for suffix in self.suffixes],
            "tile_size": chosen.block_rows * chosen.block_tokens,
            "tile_shape": shape,
            "inside_tile": self._inside_tile(),
            "ending": ending.lines(problem, chosen),
        }

    def _places(self) -> list[str]:
        """Which rows and tokens the program has; those beyond the end are computed twice, and not stored."""
        chosen, access = self.configuration, self.problem.access
        batch = access.batch if access.kind == "batched" else None
        lines = row_places(self.problem.weights[0], chosen.block_rows, batch)
        token = "0"
        if not self.single:
            lines.append(f"own_tokens = tokens_block * {chosen.block_tokens} + tl.arange(0, {chosen.block_tokens})")
            token = "tl.minimum(own_tokens, tokens - 1)"
        lines.append(f"token = {token}")
        if batch is not None:
            lines.append("output_token = matrix" if self.single else "output_token = matrix * tokens + token")
            lines += [] if access.shared else ["token = output_token"]
        return lines

    def _before(self) -> list[str]:
        lines = activation.statistics(self.problem, self.single)
        lines += self.loop.before
        lines += lookup.before(self.problem.product) if self.lookup else []
        if self.configuration.split > 1:
            lines.append("part = tl.program_id(1)")
        return [*lines, *(line for code in self.codes for line in code.before)]

    def _loop(self) -> list[str]:
        """The loop's header, and the index of the step."""
        split, steps = self.configuration.split, self.loop.steps
        if not self.loop.static:
            return [f"for step in range({'part' if split > 1 else '0'}, {steps}, {split}):"]
        if split == 1:
            return [f"for step in range(0, {steps}):"]
        each = int(steps) // split
        return [f"for iteration in range(0, {each}):", f"    step = part * {each} + iteration"]

    def _body(self) -> list[str]:
        """Read, decode, multiply, plane by plane; or read, make tables, look up."""
        lines = [*self.loop.lines, *(line for code in self.codes for line in code.setup)]
        padded = self.problem.weights[0].padded_columns != self.problem.columns
        for index, plane in enumerate(self.codes[0].planes):
            lines += [f"column = {plane.columns}", *activation.load(self.problem, self.single, padded)]
            lines += lookup.table(self.problem.product) if self.lookup else []
            for code, suffix in zip(self.codes, self.suffixes, strict=True):
                piece = code.planes[index]
                lines += [*piece.lines, self._multiply(f"sum{suffix}", piece.value, piece.scale)]
        return lines

    def _multiply(self, total: str, value: str, scale: str) -> str:
        if self.lookup:
            return f"{total} += {value}"
        if self.single:
            product = f"{value}.to(tl.float32) * value.to(tl.float32)[None, :]"
            return f"{total} += {product} * {scale}[:, None]" if scale else f"{total} += {product}"
        kind = ", out_dtype=tl.int32" if self.problem.product == "int8" else ""
        precision = ', input_precision="tf32x3"' if self.problem.product == "float32" else ""
        if scale or (self.problem.product == "int8" and not self.integer):
            wide = ".to(tl.float32)" if self.problem.product == "int8" else ""
            factor = f" * {scale}[:, None]" if scale else ""
            return f"{total} += tl.dot({value}, value{kind}{precision}){wide}{factor}"
        return f"{total} = tl.dot({value}, value, {total}{kind}{precision})"

    def _after(self) -> list[str]:
        """The products in float32, with the scales that multiply all of them."""
        lines = []
        spread = "" if self.single else "[:, None]"
        if self.problem.prologue.codes == "uint8" and self.configuration.split > 1:
            lines.append("x_offset = tl.where(part == 0, x_offset, 0)")
        for weight, code, suffix in zip(self.problem.weights, self.codes, self.suffixes, strict=True):
            text = f"tl.sum(sum{suffix}, 1)" if self.single else f"sum{suffix}"
            sums = f" - x_offset * tl.load(row_sums{suffix} + rows){spread}"
            sums = sums if self.problem.prologue.codes == "uint8" else ""
            text = f"({text}{sums})" if sums and weight.integer_sums else text
            text = f"{text}.to(tl.float32)" if self.integer else text
            text = f"{text} * ({code.scale}){spread}" if code.scale else text
            text = f"({text}{sums})" if sums and not weight.integer_sums else text
            lines.append(f"product{suffix} = {' * '.join([text, *self._factors()])}")
        return lines

    def _factors(self) -> list[str]:
        """The activation's scale."""
        if self.problem.prologue.codes:
            return ["x_scale_value"]
        scale = "token_scale" if self.single else "token_scale[None, :]"
        return [scale] if self.problem.prologue.quantized else []

    def _inside_tile(self) -> str:
        rows, tokens = self.configuration.block_rows, self.configuration.block_tokens
        if self.single:
            return f"tl.arange(0, {rows})"
        return f"tl.arange(0, {tokens})[None, :] * {rows} + tl.arange(0, {rows})[:, None]"
