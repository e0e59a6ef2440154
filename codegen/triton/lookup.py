"""Products by lookup, for one token: tables of the sums a chunk of columns can have, and keys into them.

LUT-GEMM (Park et al. 2022, arXiv 2206.09557, section 3): where a weight is a sum of ±1 matrices, the signs of eight
columns are a key into the 256 sums of the activation's chunk with every choice of signs. A program makes the tables of
its columns once, for all of its rows, and each row adds up an entry for each byte of its signs.

A step has 256 columns, 32 chunks of 8. A chunk is what a byte of words holds (`sparc.codegen.triton.words`, codes of 1
bit), so that words of signs serve here as they are: byte `b` of word `k` is the key of chunk `4 * k + b`, and its bit
`j` is the sign of column `2 * k + b // 2` of plane `8 * (b % 2) + j`.

What was weighed in machine code for sm_90 (3 bits, groups of 128 columns, 256 rows), in instructions for one weight:
2.4 with tables of 8 columns in shared memory that tensor cores make (a matrix of signs times the chunks), 4.7 where
sums are added up one by one; 6.2 with tables of 4 columns in registers, read by shuffles, 11 with those of 8; decoding
takes 12.6. What bounds it is shared memory, whose banks random keys share: 1.7 accesses for one weight.
"""

from collections.abc import Sequence

from sparc.codegen.triton.tiles import Product

CHUNK = 8
ENTRIES = 1 << CHUNK
COLUMNS = 256  # of a step
TABLES = COLUMNS // CHUNK
_PLANES = 16
# Accesses that wait for one another's banks, for one that 32 threads make: of random entries of tables, the greatest
# number in one of 32 banks, on average; and of the products of tensor cores that become tables, whose threads write to
# four of them.
_READS, _WRITES = 3.3, 4.0
_HALVES = 2  # planes of a word's even bytes, and of its odd ones


def columns(first: str, run: int) -> str:
    """An expression for a step's columns, int32 `[16 planes, 16]`.

    Args:
        first: the first of them.
        run: columns of a plane that are neighbours (`sparc.codegen.triton.words.plane_columns`).
    """
    plane, position = f"tl.arange(0, {_PLANES})[:, None]", f"tl.arange(0, {_PLANES})[None, :]"
    if run == _PLANES:
        return f"{first} + {plane} * {_PLANES} + {position}"
    return (
        f"{first} + {plane} // {CHUNK} * {CHUNK * _PLANES} + {position} // {run} * {CHUNK * run}"
        f" + {plane} % {CHUNK} * {run} + {position} % {run}"
    )


def before(product: Product) -> list[str]:
    """Code that defines `signs`, `[2 * 256, 16]`: the sign of a plane in a key, and 0 in keys of the other half."""
    return [
        f"key = tl.arange(0, {_HALVES * ENTRIES})[:, None]",
        f"plane = tl.arange(0, {_PLANES})[None, :]",
        f"sign = ((key >> (plane % {CHUNK})) & 1) * 2 - 1",
        f"signs = tl.where(key // {ENTRIES} == plane // {CHUNK}, sign, 0).to(tl.float32).to(tl.{product})",
    ]


def table(product: Product) -> list[str]:
    """Code that defines `table`, float32 `[32 * 256]`, from `value` `[16 planes, 16]`: that of chunk `c` begins at
    `256 * c`.
    """
    precision = ', input_precision="tf32x3"' if product == "float32" else ""
    return [f"table = tl.trans(tl.dot(signs, value{precision})).reshape({TABLES * ENTRIES})"]


def total(name: str, pieces: int) -> str:
    """Code that defines `name`, float32 `[pieces]`: the sums of `value`, by pieces (`add`)."""
    halves = min(pieces, _HALVES)
    runs = pieces // halves
    if pieces == 1:
        return f"{name} = tl.sum(value.to(tl.float32).reshape(1, {COLUMNS}), 1)"
    parts = f"value.to(tl.float32).reshape({_HALVES}, {CHUNK}, {runs}, {_PLANES // runs})"
    return f"{name} = tl.sum(tl.permute({parts}, (2, 0, 1, 3)).reshape({pieces}, {COLUMNS // pieces}), 1)"


def add(name: str, words: Sequence[str], factors: Sequence[str], block_rows: int, pieces: int) -> list[str]:
    """Code that adds to `name`, float32 `[block_rows, pieces]`: sums of entries, times factors.

    One gather serves all words, since each writes the tables to shared memory anew; it takes a power of two of them, so
    that a fourth stands beside three, which always reads the first entry.

    Args:
        name: what is added to.
        words: names of words of signs, int32 `[block_rows, 8]`, at most 4.
        factors: for each of them, the name of what its sums are multiplied by, `[block_rows, pieces]`.
        block_rows: rows of the tile.
        pieces: parts of a step's columns that are summed apart: 1, or for each run of a plane's columns 2, those of the
            first eight planes and those of the others.
    """
    count, halves = 1 << (len(words) - 1).bit_length(), min(pieces, _HALVES)
    missing = count - len(words)
    keys = [*(f"{each}_keys" for each in words), *["no_keys"] * missing]
    factors = [*factors, *["no_factors"] * missing]
    shape = f"{block_rows}, {pieces // halves}, {TABLES // pieces}, {halves}, {count}"
    lines = [line for each in words for line in _keys(each)]
    if missing:
        lines.append(f"no_keys = tl.zeros(({block_rows}, {COLUMNS // 32}, 2, 2), tl.int32)")
        lines.append(f"no_factors = tl.zeros(({block_rows}, {pieces}), tl.float32)")
    return [
        *lines,
        f"entries = tl.gather(table, {_joined(keys)}.reshape({block_rows * TABLES * count}), 0)",
        f"sums = tl.sum(entries.reshape({shape}), 2).reshape({block_rows}, {pieces}, {count})",
        f"{name} += tl.sum(sums * {_joined(factors)}.reshape({block_rows}, {pieces}, {count}), 2)",
    ]


def _keys(words: str) -> list[str]:
    """Where the entries lie that words choose, int32 `[block_rows, 8, 2, 2]`: in the order of their bytes."""
    base = f"tl.arange(0, {COLUMNS // 32})[None, :] * {4 * ENTRIES}"
    low, second, third, high = (
        f"(({words} >> {8 * byte}) & {ENTRIES - 1}) + ({base} + {byte * ENTRIES})" for byte in range(4)
    )
    return [
        f"{words}_even = tl.join({low}, {third})",
        f"{words}_odd = tl.join({second}, {high})",
        f"{words}_keys = tl.join({words}_even, {words}_odd)",
    ]


def _joined(names: Sequence[str]) -> str:
    """Tensors side by side, along axes behind their own; of one, itself."""
    half = len(names) // 2
    return f"tl.join({_joined(names[:half])}, {_joined(names[half:])})" if half else names[0]


def shared_bytes(element: int) -> int:
    """Shared memory of a program: tables, signs and the activation, whose elements take `element` bytes."""
    return TABLES * ENTRIES * 4 + (_HALVES * ENTRIES * _PLANES + 2 * COLUMNS) * element


def shared_accesses(words: int, block_rows: int) -> float:
    """Accesses of shared memory for one weight: entries for `words` bits, and tables for all of a tile's rows."""
    return _READS * words / CHUNK + _WRITES * TABLES * ENTRIES / (COLUMNS * block_rows)
