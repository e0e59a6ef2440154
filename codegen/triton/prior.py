"""Which configurations are worth trying for a problem, and what the cost model says of each.

The time of a kernel is that of the scarcest resource (memory, instruction issue, tensor cores), stretched where the
last
wave of programs leaves multiprocessors idle, plus what starting it takes. All of it is an expression in the number of
tokens, so that the number from which one kernel is better than another follows from the model.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import sympy

from sparc.codegen.triton import lookup
from sparc.codegen.triton.problem import Configuration, Problem, Prologue
from sparc.codegen.triton.tiles import Product, Tile
from sparc.cost import Device

TOKENS = sympy.Symbol("tokens", integer=True, positive=True)
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "int8": 1, "uint8": 1, "float8e4nv": 1}

SKINNY = 16  # tokens up to which a normalisation is worth computing again in every program
_PRODUCT_SLOTS = 0.6  # instructions that reading a tile and feeding it to tensor cores take, for one weight
_VECTOR_SLOTS = 4.0  # instructions that one weight takes where there are no tensor cores
_LOOKUP_HEIGHTS = (128, 256)
_NORM_SLOTS = 5.0  # instructions that normalising takes for one element of a tile of tokens
_REACHED = 0.85  # of the memory's bandwidth, by a kernel that reads weights
_FED = {8: 0.15, 16: 0.35, 32: 0.5, 64: 0.6, 128: 0.65}  # of the tensor cores' rate, by tokens of a tile


@dataclass(frozen=True)
class Candidate:
    """A configuration and its time.

    Args:
        configuration: the tiles.
        seconds: an expression in `TOKENS`.
    """

    configuration: Configuration
    seconds: sympy.Expr


def candidates(problem: Problem, device: Device, tokens: int) -> list[Candidate]:
    """Every configuration with tiles of so many tokens that fits the device, the fastest at that number first."""
    own = bare(problem) if tokens > SKINNY else problem
    apart = _norm_seconds(problem, device) if own is not problem else sympy.Integer(0)
    found = [Candidate(each, seconds(own, each, device) + apart) for each in _configurations(own, device, tokens)]
    return sorted(found, key=lambda each: at(each.seconds, tokens))


def bare(problem: Problem) -> Problem:
    """The problem without a normalisation: it is computed apart."""
    if problem.prologue.kind == "none":
        return problem
    return replace(problem, prologue=Prologue(quantized=problem.prologue.quantized))


def _norm_seconds(problem: Problem, device: Device) -> sympy.Expr:
    moved = 2 * TOKENS * _activations(problem) * problem.columns * BYTES[problem.dtype]
    return moved / device.bandwidth + device.launch + device.latency


def _activations(problem: Problem) -> int:
    """How many matrices have an activation of their own."""
    return 1 if problem.access.shared else problem.access.batch


def _configurations(problem: Problem, device: Device, tokens: int) -> Iterator[Configuration]:
    """Tiles of one number of tokens: of several heights and depths, with the split that fills the device."""
    weight = problem.weights[0]
    if tokens == 1 and problem.product not in ("float16", "bfloat16", "float32"):
        return
    if tokens == 1 and weight.lookup_cost(problem.product, _LOOKUP_HEIGHTS[0]):
        yield from _lookups(problem, device)
    heights = [weight.block_rows] if weight.block_rows else [16, 32] if tokens == 1 else [64, 128]
    for height in heights:
        for depth in _depths(problem, tokens):
            for stages in (4, 3, 2):
                warps = 8 if tokens >= 128 and height >= 128 else 4
                each = Configuration(tokens, height, depth, 1, warps, stages)
                if shared_bytes(problem, each) <= device.shared_bytes:
                    yield _split(problem, each, device)
                    break


def _lookups(problem: Problem, device: Device) -> Iterator[Configuration]:
    """The form that looks sums up: the more rows share tables, the fewer programs there are."""
    for height in _LOOKUP_HEIGHTS:
        each = Configuration(1, height, lookup.COLUMNS, 1, height // 32, 2, form="lookup")
        if shared_bytes(problem, each) <= device.shared_bytes:
            yield _split(problem, each, device)


def _depths(problem: Problem, tokens: int) -> list[int]:
    """Columns of a step: as many as fill loads of 16 bytes, within what the weight allows."""
    weight = problem.weights[0]
    found, depth = [], weight.unit
    most = min(weight.greatest, 512 if tokens <= 64 else 128)
    while depth <= max(most, weight.unit):
        if weight.padded_columns % depth == 0:
            found.append(depth)
        depth *= 2
    return found[-3:] or [weight.unit]


def _split(problem: Problem, each: Configuration, device: Device) -> Configuration:
    """Share the columns out among programs until there are two for each multiprocessor."""
    weight = problem.weights[0]
    if each.block_tokens > 64:
        return each
    programs = problem.tiles_of_rows(each.block_rows)
    steps = weight.padded_columns // each.block_columns
    static = weight.loop(Tile("rows", "first", each.block_rows, each.block_columns, problem.product)).static
    wanted = max(1, min(2 * device.multiprocessors // programs, steps // 2, 16))
    split = max(number for number in range(1, wanted + 1) if steps % number == 0 or not static)
    return Configuration(**{**vars(each), "split": split})


def shared_bytes(problem: Problem, each: Configuration) -> int:
    """Shared memory of a program: the tiles that are under way, and room to change the product's layout."""
    weight = problem.weights[0]
    if each.form == "lookup":
        return lookup.shared_bytes(BYTES[problem.product])
    bits = weight.cost(problem.product).bits / max(weight.cost(problem.product).density, 1e-6)
    of_weights = len(problem.weights) * each.block_rows * each.block_columns * min(bits, 32) / 8
    of_tokens = each.block_tokens * each.block_columns * BYTES[problem.product]
    if each.block_tokens == 1:
        return int(of_tokens)
    whole = (of_weights + of_tokens) * each.num_stages
    return int(whole + each.block_rows * each.block_tokens * 4)


def seconds(problem: Problem, each: Configuration, device: Device) -> sympy.Expr:
    """The time of a kernel on a device, as an expression in `TOKENS`."""
    weight = problem.weights[0]
    cost = problem.cost(each)
    anchors = len(problem.weights)
    weights = anchors * weight.rows * weight.columns
    tiles = sympy.ceiling(TOKENS / each.block_tokens)
    tiles_of_rows = problem.tiles_of_rows(each.block_rows)
    programs = tiles_of_rows * tiles * each.split
    # A tile's rows beyond the last one are computed as well.
    computed = anchors * tiles_of_rows * each.block_rows * weight.columns * cost.density * tiles
    written = min(BYTES[problem.dtype], BYTES[problem.epilogue.dtype])
    read = _activations(problem) * weight.columns * BYTES[problem.read]
    moved = weights * cost.bits / 8 + TOKENS * (read + 2 * weight.rows * written)
    if each.split > 1:
        moved += 2 * 4 * each.split * tiles * each.block_tokens * weight.rows * anchors
    slots = cost.issue + _slots_around(problem, each)
    issued = computed * slots / device.issue_rate
    worked = computed * cost.arithmetic / device.arithmetic_rate
    shared = computed * cost.shared / device.shared_rate
    wave = _stretch(programs, device)
    work = [moved / (device.bandwidth * _REACHED), issued * wave, worked * wave, shared * wave]
    if each.block_tokens > 1:
        rate = device.flops[problem.product] * _FED.get(each.block_tokens, 0.65)
        work.append(2 * computed * each.block_tokens / rate * wave)
    starting = device.launch + device.latency + (1.0e-6 if each.split > 1 else 0)
    return sympy.Max(*work, evaluate=False) + starting + _statistics(problem, each)


def _slots_around(problem: Problem, each: Configuration) -> float:
    """Instructions for one weight beside those of its form."""
    if each.form == "lookup":
        product, norms = 0.0, 2 / each.block_rows
    elif each.block_tokens == 1:
        product, norms = _VECTOR_SLOTS, 2.0
    else:
        product, norms = _PRODUCT_SLOTS, each.block_tokens / each.block_rows
    return product + (_NORM_SLOTS * norms if problem.prologue.kind != "none" else 0.0)


def _stretch(programs: sympy.Expr, device: Device) -> sympy.Expr:
    """How much longer work takes because the last wave of programs does not fill the device."""
    waves = sympy.ceiling(programs / device.multiprocessors)
    return waves * device.multiprocessors / programs


def _statistics(problem: Problem, each: Configuration) -> float:
    """What reading the tokens once more takes, before the loop."""
    passes = {"none": 0, "rms_norm": 1, "layer_norm": 2}[problem.prologue.kind]
    passes += bool(problem.prologue.quantized) and not problem.prologue.codes
    bytes_read = passes * problem.columns * each.block_tokens * BYTES[problem.dtype]
    return passes * 1.0e-6 + bytes_read / 50e9


@lru_cache(maxsize=4096)
def _compiled(expression: sympy.Expr) -> sympy.Lambda:
    return sympy.lambdify(TOKENS, expression, modules=[{"ceiling": math.ceil, "Max": max}, "math"])


def at(expression: sympy.Expr, tokens: int) -> float:
    """The seconds of a number of tokens."""
    return float(_compiled(expression)(tokens))


def dense_seconds(problem: Problem, device: Device, *, cached: bool) -> sympy.Expr:
    """The time of decoding the weight into memory and of torch's own product, with what surrounds it.

    Args:
        problem: what is computed.
        device: where.
        cached: whether the dense weight is there already.
    """
    weight = problem.weights[0]
    weights = len(problem.weights) * weight.rows * weight.columns
    size = BYTES[problem.dtype]
    product: Product = problem.dtype  # type: ignore[assignment]
    read = weights * size / (device.bandwidth * 0.8)
    compute = 2 * weights * sympy.ceiling(TOKENS / 64) * 64 / (device.flops[product] * 0.85)
    decode = (
        0
        if cached
        else weights * (weight.cost(product).bits / 8 + size) / (device.bandwidth * _REACHED) + device.launch
    )
    around = TOKENS * weight.rows * size * 4 / device.bandwidth
    kernels = len(problem.weights) + bool(problem.epilogue.lines) + (problem.prologue.kind != "none")
    return sympy.Max(read, compute, evaluate=False) + decode + around + kernels * (device.launch + device.latency)
