"""Programs with encoded weights and quantized activations, built by hand: what the passes would make of them."""

import operator
from typing import Any

import torch
from torch import Tensor, fx

from sparc.analysis.sites import find_sites
from sparc.encoding.base import Encoding
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.operators import encode_weight, round_weight, spec_name
from sparc.program import Entry, Program

PER_TENSOR = IntGrid(8, "tensor", symmetric=False)
PER_TENSOR_SYMMETRIC = IntGrid(8, "tensor")
PER_TOKEN = IntGrid(8, "channel")
decode, quantize = torch.ops.sparc.decode.default, torch.ops.sparc.quantize.default


def encode_weights(program: Program, spec: Encoding, only: str = "") -> Program:
    """A copy in which every site's weight (or those whose operator is `only`) is rounded and decoded from its parts."""
    program = program.clone()
    for site in find_sites(program)[0]:
        if only and site.operator != only:
            continue
        weight = program.weights[site.weight]
        matrix = site.view.to_matrix(weight)
        grid = spec.fit(matrix)
        grid = type(grid)(spec, grid.tensors, str(site.view))
        parts = encode_weight(round_weight(weight, grid), grid)
        names: dict[str, str] = {}
        for use in site.uses:
            entry = program.entries[use.entry]
            source = use.node.args[use.argument]
            assert isinstance(source, fx.Node)
            if not names:
                names = {
                    part: str(program.add_weight(f"{site.weight}_{part}", value, source).target)
                    for part, value in parts.items()
                }
            nodes = [program.weight_node(entry, names[part]) for part in spec.part_names]
            dense = entry.call(
                decode, nodes, spec_name(spec), str(site.view), list(weight.shape), weight.dtype, before=use.node
            )
            use.node.replace_input_with(source, dense)
    program.sweep()
    return program


def quantize_input(program: Program, kind: str, group: int = 32, params: tuple[float, int] = (0.05, 100)) -> Program:
    """A copy in which the input of every product and convolution is quantized."""
    program = program.clone()
    done: dict[fx.Node, fx.Node] = {}
    for site in find_sites(program)[0]:
        for use in site.uses:
            x, entry = use.input, program.entries[use.entry]
            if x is None:
                continue
            if x not in done:
                done[x] = quantized(program, entry, x, use.node, kind, group, params)
            use.node.replace_input_with(x, done[x])
    return program


def quantized(
    program: Program, entry: Entry, x: fx.Node, before: fx.Node, kind: str, group: int, params: tuple[float, int]
) -> fx.Node:
    """`decode(quantize(x))` of a kind, before a node."""
    if kind == "static":
        nodes = [
            program.add_weight("x_scale", torch.tensor(params[0]), x),
            program.add_weight("x_zero", torch.tensor(params[1], dtype=torch.uint8), x),
        ]
        return _pair(entry, x, PER_TENSOR, nodes, before)
    if kind in ("split", "stack"):
        coarse = _pair(entry, x, PER_TENSOR if kind == "split" else PER_TENSOR_SYMMETRIC, [], before)
        step = entry.call(torch.ops.aten.div.Tensor, coarse.args[0][1], 254.0, before=before)  # type: ignore[index]
        rest = entry.call(torch.ops.aten.sub.Tensor, x, coarse, before=before)
        fine = _pair(entry, rest, PER_TENSOR_SYMMETRIC, [step], before)
        return entry.call(torch.ops.aten.add.Tensor, coarse, fine, before=before)
    if kind == "split block":
        coarse = _pair(entry, x, IntGrid(8, group), [], before)
        rest = entry.call(torch.ops.aten.sub.Tensor, x, coarse, before=before)
        fine = _pair(entry, rest, IntGrid(8, group), [], before)
        return entry.call(torch.ops.aten.add.Tensor, coarse, fine, before=before)
    spec = {
        "tensor": PER_TENSOR,
        "tensor symmetric": PER_TENSOR_SYMMETRIC,
        "token": PER_TOKEN,
        "block": IntGrid(8, group),
        "minimum": IntGrid(8, "channel", symmetric=False, zero="minimum"),
    }[kind]
    return _pair(entry, x, spec, [], before)


def _pair(entry: Entry, x: fx.Node, spec: IntGrid, params: list[fx.Node], before: fx.Node) -> fx.Node:
    made = entry.call(quantize, x, params, spec_name(spec), before=before)
    count = 1 if params else len(spec.part_names)
    parts: list[Any] = [entry.call(operator.getitem, made, index, before=before) for index in range(count)] + params
    return entry.call(decode, parts, spec_name(spec), "matrix", None, torch.float32, before=before)


def inputs_of(program: Program, *tensors: Tensor) -> list[Tensor]:
    return list(tensors)
