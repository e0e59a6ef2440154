"""Codes of few bits packed into words so that one shift and one mask yield two of them.

The columns of a row are cut into units. A unit of `U` columns takes `U * bits / 32` words; column `c` of the unit
lies in
plane `p = c // width`, where `width = U * bits / 16`, at word `(c % width) // 2`, in the low half word if `c` is
even and the
high one if it is odd, at bit `p * bits` of the half. So `(words >> (p * bits)) & mask` holds two neighbouring codes of
plane `p` in the places where two half-precision numbers have their mantissas.
"""

import sympy
import torch
from torch import Tensor

from sparc.codegen.triton import index
from sparc.codegen.triton.tiles import Tile

LEAST_WIDTH = 16  # what a tensor core multiplies at once
LEAST_WIDTH_OF_BYTES = 32  # likewise, of numbers of 8 bits
_GREATEST_WIDTH = 128


def unit_of(columns: int, bits: int, group: int | None = None, width: int = LEAST_WIDTH) -> int:
    """The columns of a unit: as many as possible without storing many that do not exist.

    Args:
        columns: the row's columns.
        bits: 1, 2, 4 or 8.
        group: columns that share a scale, if they are a power of two: a plane does not cross them.
        width: the least number of columns of a plane.
    """
    least = width * 16 // bits
    widest = min(group, _GREATEST_WIDTH) if group is not None and group >= LEAST_WIDTH else _GREATEST_WIDTH
    padded = -(-columns // least) * least
    unit = least
    while unit * 2 * bits // 16 <= widest and padded % (unit * 2) == 0:
        unit *= 2
    return unit


def pack(codes: Tensor, bits: int, unit: int) -> Tensor:
    """Codes below `2**bits`, uint8 `[rows, columns]`, as words: int32 `[rows, columns * bits / 32]`, `unit` dividing
    columns.
    """
    planes, width = 16 // bits, unit * bits // 16
    units = codes.shape[1] // unit
    split = codes.to(torch.int64).reshape(codes.shape[0], units, planes, width // 2, 2)
    shift = torch.arange(planes, device=codes.device).reshape(planes, 1, 1) * bits
    place = shift + torch.tensor([0, 16], device=codes.device)
    words = (split << place).sum((2, 4))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).flatten(1)


def in_runs(codes: Tensor, unit: int, run: int) -> Tensor:
    """Codes `[rows, columns]` in another order, so that eight planes of 1-bit codes take turns: `run` columns each.

    A byte of words is then of `8 * run` neighbouring columns. What `pack` makes of this order, `plane_columns` knows by
    `run`.
    """
    split = codes.reshape(codes.shape[0], codes.shape[1] // unit, 2, -1, 8, run)
    return split.transpose(3, 4).flatten(1)


def load_words(tile: Tile, buffer: str, columns: int, bits: int) -> list[str]:
    """Code that defines `words`, int32 `[block_rows, block_columns * bits / 32]`.

    Args:
        tile: the tile.
        buffer: the argument's name, without suffix.
        columns: those stored in a row.
        bits: of a code.
    """
    places = tile.entries(columns * bits // 32, 32 // bits)
    end = tile.suffix
    return [f'{buffer}_words{end} = tl.load({buffer}{end} + {places}, eviction_policy="evict_first")']


def plane_columns(
    tile: Tile, unit: int, bits: int, plane: int, name: str, run: int | None = None
) -> tuple[str, sympy.Expr, index.Indices]:
    """The columns of a plane.

    Args:
        tile: the tile.
        unit: columns of a unit.
        bits: of a code.
        plane: which one.
        name: of the index that runs over the plane's columns.
        run: of 1-bit codes, how many neighbours of a plane are neighbours in the matrix (`in_runs`); all by default.

    Returns:
        The expression as text, the expression, and what is known of its symbols.
    """
    indices = tile.indices()
    width = unit * bits // 16
    total = tile.block_columns * bits // 16
    position = indices.symbol(name, 0, total - 1)
    first = next(symbol for symbol in indices.bounds if symbol.name == tile.first)
    start, within = plane * width, indices.modulo(position, width)
    if run is not None:
        start = plane // 8 * 8 * width + plane % 8 * run
        within = 8 * run * indices.divide(within, run) + indices.modulo(within, run)
    columns = first + unit * indices.divide(position, width) + start + within
    return index.text(columns), columns, indices


def shifted(words: str, shift: int, mask: int) -> str:
    """The pair of codes at `shift`: `mask` is that of one code, and is applied to both halves."""
    both = mask | mask << 16
    return f"({words} & 0x{both:08X})" if shift == 0 else f"(({words} >> {shift}) & 0x{both:08X})"


def to_numbers(pairs: str, offset: str, tile: Tile, bits: int, name: str, width: int) -> list[str]:
    """Code that defines `name`, `[block_rows, width]`: the codes in `pairs` less `offset`, exactly.

    Half precision: a code in the low mantissa bits of 1024 (float16) or 128 (bfloat16) is that number plus the code; no
    conversion is needed, which would run at an eighth of the speed. Float32 uses 2^23 in the same way.

    Args:
        pairs: an expression, int32, with a code in each half word.
        offset: a number, or an expression `[block_rows, 1]` in float32 that is a small integer.
        tile: the tile, for the product's type and its rows.
        bits: of a code.
        name: what is defined.
        width: its columns.
    """
    shape = f"{tile.block_rows}, {width}"
    if tile.product == "float16" or (tile.product == "bfloat16" and bits <= 4):
        one, base = (0x64006400, 1024) if tile.product == "float16" else (0x43004300, 128)
        lines = from_halves(f"{pairs} | 0x{one:08X}", tile, name, width)
        return [*lines, f"{name} = {_less(name, offset, base, f'tl.{tile.product}')}"]
    if tile.product == "int8":
        return [
            f"{name}_pairs = {pairs}",
            f"{name} = tl.join({name}_pairs & 0xFFFF, ({name}_pairs >> 16) & 0xFFFF).reshape({shape})",
            f"{name} = ({name} - {_integer(offset)}).to(tl.int8)",
        ]
    lines = [
        f"{name}_pairs = {pairs}",
        f"{name}_low = (({name}_pairs & 0xFFFF) | 0x4B000000).to(tl.float32, bitcast=True)",
        f"{name}_high = ((({name}_pairs >> 16) & 0xFFFF) | 0x4B000000).to(tl.float32, bitcast=True)",
        f"{name} = tl.join({name}_low, {name}_high).reshape({shape})",
        f"{name} = {name} - ({offset} + 8388608.0)",
    ]
    return lines if tile.product == "float32" else [*lines, f"{name} = {name}.to(tl.{tile.product})"]


def _less(name: str, offset: str, base: int, kind: str) -> str:
    return (
        f"{name} - {base + float(offset):.1f}" if _is_number(offset) else f"{name} - ({offset} + {base}.0).to({kind})"
    )


def _integer(offset: str) -> str:
    return str(int(float(offset))) if _is_number(offset) else f"({offset}).to(tl.int32)"


def _is_number(text: str) -> bool:
    return text.lstrip("-").replace(".", "").isdigit()


def from_halves(pairs: str, tile: Tile, name: str, width: int) -> list[str]:
    """Code that defines `name`, `[block_rows, width]`: the halves of `pairs` as float16 or bfloat16, by their bits.

    Args:
        pairs: an expression, int32.
        tile: the tile, for the product's type and its rows.
        name: what is defined.
        width: its columns.
    """
    return [
        f"{name}_pairs = {pairs}",
        f"{name}_low = ({name}_pairs & 0xFFFF).to(tl.int16).to(tl.{tile.product}, bitcast=True)",
        f"{name}_high = ({name}_pairs >> 16).to(tl.int16).to(tl.{tile.product}, bitcast=True)",
        f"{name} = tl.join({name}_low, {name}_high).reshape({tile.block_rows}, {width})",
    ]


# floats of few bits -----------------------------------------------------------------------------------------------
_WIDE = {"float16": (16, 10), "bfloat16": (16, 7), "float32": (32, 23)}  # bits, and those of the mantissa


def small_floats(words: str, shift: int, bits: int, mantissa: int, tile: Tile, name: str, width: int) -> list[str]:
    """Code that defines `name`, `[block_rows, width]`: floats of few bits, over `small_float_factor`, exactly.

    A float's bits, put where a wider type has its sign, the end of its exponent and the beginning of its mantissa, are
    the same number but for a power of two, subnormal ones included.

    Args:
        words: an expression, int32, with the bits of a float at `shift` of each half word.
        shift: where they are.
        bits: of a float: sign, exponent, mantissa.
        mantissa: those of the mantissa.
        tile: the tile, for the product's type, one of floats of 16 or 32 bits, and its rows.
        name: what is defined.
        width: its columns.
    """
    full, fraction = _WIDE[tile.product]
    sign, rest = 1 << full - 1, ((1 << bits - 1) - 1) << fraction - mantissa
    up, places = full - bits - shift, fraction - mantissa - shift
    if full == 16:
        both = 0x10001
        pairs = f"({_moved(words, up)} & {_signed(sign * both)}) | ({_moved(words, places)} & {rest * both})"
        return from_halves(pairs, tile, name, width)
    lines = [f"{name}_words = {words}"]
    for half, lower in (("low", 0), ("high", 16)):
        moved = f"({_moved(f'{name}_words', up - lower)} & {_signed(sign)})"
        moved += f" | ({_moved(f'{name}_words', places - lower)} & {rest})"
        lines.append(f"{name}_{half} = ({moved}).to(tl.float32, bitcast=True)")
    return [*lines, f"{name} = tl.join({name}_low, {name}_high).reshape({tile.block_rows}, {width})"]


def small_float_factor(bits: int, mantissa: int, product: str) -> float:
    """What numbers of `small_floats` are divided by."""
    full, fraction = _WIDE[product]
    return 2.0 ** ((1 << full - fraction - 2) - (1 << bits - mantissa - 2))


def bytes_of(words: str, plane: int, tile: Tile, name: str, width: int) -> list[str]:
    """Code that defines `name`, `[block_rows, width]`: a plane of bytes, reinterpreted in the product's type of 8
    bits.
    """
    kind = f".to(tl.uint8).to(tl.{tile.product}, bitcast=True)"
    return [
        f"{name}_low = ({words} >> {8 * plane}){kind}",
        f"{name}_high = ({words} >> {8 * plane + 16}){kind}",
        f"{name} = tl.join({name}_low, {name}_high).reshape({tile.block_rows}, {width})",
    ]


def signs(words: str, shift: int, kind: str, tile: Tile, name: str, width: int) -> list[str]:
    """Code that defines `name`, `[block_rows, width]`: 1 where a bit is set, -1 where it is not, by their bits.

    Args:
        words: an expression, int32, with a bit at `shift` of each half word.
        shift: where they are.
        kind: `float16` or `float32`.
        tile: the tile, for its rows.
        name: what is defined.
        width: its columns.
    """
    if kind == "float16":
        return from_halves(
            f"({_moved(words, 15 - shift)} & {_signed(0x80008000)}) ^ {_signed(0xBC00BC00)}", tile, name, width
        )
    lines = [
        f"{name}_{half} = (({_moved(words, 31 - shift - lower)} & {_signed(1 << 31)}) ^ {_signed(0xBF800000)})"
        ".to(tl.float32, bitcast=True)"
        for half, lower in (("low", 0), ("high", 16))
    ]
    return [*lines, f"{name} = tl.join({name}_low, {name}_high).reshape({tile.block_rows}, {width})"]


def _signed(mask: int) -> int:
    return mask - (1 << 32) if mask >> 31 else mask


def _moved(words: str, places: int) -> str:
    return words if places == 0 else f"({words} << {places})" if places > 0 else f"({words} >> {-places})"


# one more bit beside two ---------------------------------------------------------------------------------------------
def pack_ones(bits: Tensor, unit: int) -> Tensor:
    """Single bits, uint8 `[rows, columns]`, beside 2-bit words: int16 `[rows, columns / 16]`.

    The entry beside a word holds, for plane `p`, the bit of its low half at `p` and that of its high half at `8 + p`.
    """
    width = unit // 8
    units = bits.shape[1] // unit
    split = bits.to(torch.int32).reshape(bits.shape[0], units, 8, width // 2, 2)
    place = torch.arange(8, device=bits.device).reshape(8, 1, 1) + torch.tensor([0, 8], device=bits.device)
    entries = (split << place).sum((2, 4))
    return torch.where(entries >= 1 << 15, entries - (1 << 16), entries).to(torch.int16).flatten(1)


def load_ones(tile: Tile, buffer: str, columns: int) -> list[str]:
    """Code that defines `ones_words`, int32 in the shape of the 2-bit words: plane `p`'s bits are at `p` and `16 +
    p`.
    """
    places, end = tile.entries(columns // 16, 16), tile.suffix
    return [
        f'{buffer}_words{end} = tl.load({buffer}{end} + {places}, eviction_policy="evict_first").to(tl.int32)',
        f"{buffer}_words{end} = ({buffer}_words{end} & 0xFF) | (({buffer}_words{end} & 0xFF00) << 8)",
    ]
