"""The products of a program that kernels are generated for, with what goes into each kernel."""

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from sparc.analysis.values import same_shape, shape_of, tensor_type
from sparc.codegen.encoded import match_activation, match_encoded
from sparc.codegen.triton.access import BATCHED, find_access, is_shared
from sparc.codegen.triton.epilogue import find_epilogue
from sparc.codegen.triton.lowerings import find_lowering
from sparc.codegen.triton.norms import find_norm
from sparc.codegen.triton.problem import Access, Problem, Prologue
from sparc.codegen.triton.region import Tail, find_tail, only_read_by
from sparc.codegen.triton.site_weight import SiteWeight
from sparc.codegen.triton.static import Coded, match_coded
from sparc.codegen.triton.tiles import LoweringType, WeightLowering
from sparc.encoding.blocks import Blocks
from sparc.encoding.dense import Dense
from sparc.encoding.float8 import Float8
from sparc.encoding.operators import find_spec, is_decode, is_quantize
from sparc.encoding.view import WeightView
from sparc.program import Entry, Program, is_weight

aten = torch.ops.aten

_VIEWS: Mapping[Any, str] = {  # how a product reads its weight
    aten.linear.default: "matrix",
    aten.conv2d.default: "conv",
    **dict.fromkeys(BATCHED, "transposed"),
}
_MOST_COLUMNS = 1 << 16  # whose sum of products of 8 bits, less a zero point's, fits into 32 bits


@dataclass(frozen=True)
class Site:
    """One or more products, and the nodes around them that one kernel takes.

    Args:
        weights: one for each anchor; one stacked weight when the anchors are parallel.
        anchors: the products' nodes.
        inner: the nodes that the kernel replaces.
        x: the activation that it reads.
        operands: what the prologue and the epilogue read, in the kernel's order; weights that are stacked stand in
            tuples.
        result: the node whose value it computes; the last anchor when they are parallel.
        problem: what is generated.
        parallel: whether every anchor's value is a slice of the result.
        normalised: the node whose value the prologue's normalisation computes, if there is one.
        note: why the codes of a quantized activation are decoded before the product, if they are.
    """

    weights: tuple[SiteWeight, ...]
    anchors: tuple[fx.Node, ...]
    inner: tuple[fx.Node, ...]
    x: fx.Node
    operands: tuple[fx.Node | tuple[fx.Node, ...], ...]
    result: fx.Node
    problem: Problem
    parallel: bool = False
    normalised: fx.Node | None = None
    note: str = ""

    @property
    def place(self) -> fx.Node:
        """The node before which its kernel is called."""
        return self.anchors[0] if self.parallel else self.result

    @property
    def names(self) -> tuple[str, ...]:
        """The original weights' names."""
        return tuple(name for weight in self.weights for name in weight.names)


@dataclass(frozen=True)
class Missed:
    """A product that no kernel is generated for, and why."""

    node: fx.Node
    weight: str
    why: str


def find_products(
    program: Program, entry: Entry, extensions: Mapping[str, LoweringType], products: Collection[str] = ("int8",)
) -> tuple[list[Site], list[Missed]]:
    """The sites of an entry in the graph's order, and the encoded products that are none.

    Args:
        program: the program.
        entry: one of its entries.
        extensions: lowerings that extensions register.
        products: the types of 8 bits that the chip's tensor cores multiply.
    """
    finder = _Finder(program, list(entry.graph.nodes), extensions, products)
    by_input: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in finder.order:
        if finder.is_product(node):
            by_input.setdefault((node.args[0], node.target), []).append(node)
    sites: list[Site] = []
    missed: list[Missed] = []
    for anchors in by_input.values():
        for found in finder.sites(anchors):
            (sites if isinstance(found, Site) else missed).append(found)  # type: ignore[arg-type]
    position = {node: index for index, node in enumerate(finder.order)}
    return sorted(sites, key=lambda site: position[site.anchors[0]]), missed


@dataclass(frozen=True)
class _Before:
    """A prologue, the activation it reads, the nodes it replaces, its operands, the node it normalises to, and why it
    does not read codes.
    """

    prologue: Prologue
    x: fx.Node
    inner: tuple[fx.Node, ...] = ()
    given: tuple[fx.Node, ...] = ()
    normalised: fx.Node | None = None
    note: str = ""


class _Finder:
    def __init__(
        self,
        program: Program,
        order: list[fx.Node],
        extensions: Mapping[str, LoweringType],
        products: Collection[str],
    ) -> None:
        self.program, self.order, self.extensions, self.products = program, order, extensions, products
        self.claimed: set[fx.Node] = set()  # pointwise nodes that a kernel takes already

    def is_product(self, node: fx.Node) -> bool:
        """A linear layer, a convolution, or a product with a batch of matrices, with a stored weight."""
        if node.op != "call_function" or node.target not in _VIEWS:
            return False
        weight = node.args[1]
        if node.target in BATCHED and (not isinstance(weight, fx.Node) or weight.meta["val"].ndim != 3):
            return False
        return is_weight(weight) or match_encoded(self.program, weight) is not None

    def sites(self, anchors: list[fx.Node]) -> Iterator[Site | Missed]:
        """What becomes of the products that read one activation."""
        weights: dict[fx.Node, SiteWeight] = {}
        for anchor in anchors:
            found = self._weight(anchor)
            if isinstance(found, Missed):
                yield found
            else:
                weights[anchor] = found
        left = list(weights)
        plain: list[Site] = []
        while left:
            anchor = left.pop(0)
            partner = next((each for each in left if self._gated(anchor, each, weights)), None)
            if partner is not None:
                left.remove(partner)
            chosen = (anchor,) if partner is None else (anchor, partner)
            site = self._site(chosen, [weights[each] for each in chosen], anchors)
            if isinstance(site, Site) and site.result is anchor:
                plain.append(site)
            else:
                yield site
        yield from _stacked(plain, self.extensions)

    def _gated(self, anchor: fx.Node, other: fx.Node, weights: Mapping[fx.Node, SiteWeight]) -> bool:
        """Whether two products can be one kernel: they read the same elements, and become one value."""
        alike = _alike(weights[anchor], weights[other]) and find_access(anchor) == find_access(other)
        return alike and self._tail((anchor, other)) is not None

    def _tail(self, anchors: Sequence[fx.Node]) -> Tail | None:
        return find_tail(anchors, self.order, self.claimed)

    def _weight(self, anchor: fx.Node) -> SiteWeight | Missed:
        source = anchor.args[1]
        assert isinstance(source, fx.Node)
        encoded = match_encoded(self.program, source)
        view = WeightView(_VIEWS[anchor.target])
        if encoded is None:
            tensor = self.program.weights[str(source.target)]
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in ("float16", "bfloat16", "float32"):
                return Missed(anchor, str(source.target), f"its weight is {dtype}")
            matrix = view.to_matrix(tensor)
            parts = {"codes": matrix}
            return SiteWeight((str(source.target),), Dense(dtype), tuple(matrix.shape), parts, source, view)  # type: ignore[arg-type]
        shape = tuple(map(int, encoded.matrix_shape))
        if encoded.view != view or len(shape) != (3 if anchor.target in BATCHED else 2):
            return Missed(anchor, encoded.site, f"its weight is read as {encoded.view}")
        return SiteWeight((encoded.site,), encoded.spec, shape, encoded.tensors(self.program), source, view)

    def _site(
        self, anchors: tuple[fx.Node, ...], weights: list[SiteWeight], readers: Sequence[fx.Node]
    ) -> Site | Missed:
        anchor, name = anchors[0], weights[0].names[0]
        kind = tensor_type(anchor.args[0])
        dtype = str(kind.dtype).removeprefix("torch.") if kind is not None else ""
        if dtype not in ("float16", "bfloat16", "float32"):
            return Missed(anchor, name, f"its activation is {dtype}")
        access = find_access(anchor)
        if isinstance(access, str):
            return Missed(anchor, name, access)
        lowerings = [
            find_lowering(each.encoding, each.matrix_shape, each.matrix_parts, self.extensions) for each in weights
        ]
        for lowering in lowerings:
            reason = lowering if isinstance(lowering, str) else lowering.accepts(dtype)  # type: ignore[arg-type]
            if reason:
                return Missed(anchor, name, reason)
        tail = self._tail(anchors)
        assert tail is not None
        self.claimed.update(tail.nodes)
        made: list[WeightLowering] = lowerings  # type: ignore[assignment]
        before = self._prologue(anchor, made[0], access, readers)
        if access.kind == "batched":
            before, access = _one_for_all(before, access)
        epilogue, operands = find_epilogue(anchors, tail)
        problem = Problem(tuple(made), dtype, before.prologue, epilogue, access)
        inner = (*before.inner, *anchors, *tail.nodes)
        given = (*before.given, *operands)
        more = {"normalised": before.normalised, "note": before.note}
        return Site(tuple(weights), anchors, inner, before.x, given, tail.result, problem, **more)  # type: ignore[arg-type]

    def _prologue(self, anchor: fx.Node, weight: WeightLowering, access: Access, readers: Sequence[fx.Node]) -> _Before:
        """What the kernel does to the activation while it reads it."""
        x = anchor.args[0]
        assert isinstance(x, fx.Node)
        coded = match_coded(x) if access.kind != "batched" else None
        if coded is not None:
            return self._coded(x, coded, weight)
        if access.kind not in ("rows", "batched") or not only_read_by(x, readers):
            return _Before(Prologue(), x)
        quantized, source = self._quantized(x, weight)
        inner = (x,) if quantized else ()
        if quantized and any(not _leads_to(each, x) for each in source.users):
            return _Before(Prologue(quantized=quantized), source, inner)
        norm = find_norm(source)
        if norm is None or not (quantized or only_read_by(source, readers)):
            return _Before(Prologue(quantized=quantized), source, inner)
        given = tuple(each for each in (norm.gain, norm.bias) if each is not None)
        types = {str(tensor_type(each).dtype).removeprefix("torch.") for each in given}  # type: ignore[union-attr]
        if len(types) > 1:
            return _Before(Prologue(quantized=quantized), source, inner)
        dtype = next(iter(types), "float32")
        gain, bias = norm.gain is not None, norm.bias is not None
        prologue = Prologue(norm.kind, norm.epsilon, gain, bias, dtype, quantized)
        return _Before(prologue, norm.source, (*norm.nodes, *inner), given, source)

    def _coded(self, x: fx.Node, coded: Coded, weight: WeightLowering) -> _Before:
        """The prologue of an activation whose codes are in memory."""
        why = weight.accepts("int8") if "int8" in self.products else "the chip multiplies no integers"
        if weight.columns > _MOST_COLUMNS:
            why = f"sums of {weight.columns} products may not fit into 32 bits"
        if why:
            return _Before(Prologue(), x, note=why)
        dtype = str(coded.scale.meta["val"].dtype).removeprefix("torch.")
        prologue = Prologue(dtype=dtype, quantized="int8", codes=coded.dtype)
        return _Before(prologue, coded.codes, (x,), coded.parameters)

    def _quantized(self, x: fx.Node, weight: WeightLowering) -> tuple[str, fx.Node]:
        """The 8-bit type that an activation is quantized to token by token, and its source; empty for none."""
        activation = match_activation(x)
        if activation.kind == "token" and weight.accepts("int8") is None and "int8" in self.products:
            return "int8", activation.source
        source = _float8_source(x)
        if source is not None and weight.accepts("float8e4nv") is None and "float8e4nv" in self.products:
            return "float8e4nv", source
        return "", x


def _one_for_all(before: _Before, access: Access) -> tuple[_Before, Access]:
    """An activation that is repeated for every matrix is read once."""
    x = before.x
    source = x.args[0] if x.target is aten.expand.default else None
    if not isinstance(source, fx.Node) or not is_shared(shape_of(source), access.batch):
        return before, access
    if not same_shape(shape_of(source)[-2:], shape_of(x)[-2:]):
        return before, access
    return replace(before, x=source, inner=(x, *before.inner)), replace(access, shared=True)


def _float8_source(x: fx.Node) -> fx.Node | None:
    """What `decode(quantize(source))` quantizes, in 8-bit floats with a scale for each token."""
    if not is_decode(x) or not isinstance(find_spec(str(x.args[1])), Float8):
        return None
    spec = find_spec(str(x.args[1]))
    first = x.args[0][0]  # type: ignore[index]
    quantize = first.args[0] if isinstance(first, fx.Node) and first.target is operator.getitem else None
    if not is_quantize(quantize) or quantize.args[1] or spec != Float8(group="channel"):  # type: ignore[union-attr]
        return None
    return quantize.args[0]  # type: ignore[union-attr, return-value]


def _leads_to(node: fx.Node, target: Any) -> bool:
    """Whether a value is used for nothing but another."""
    return node is target or (bool(node.users) and all(_leads_to(user, target) for user in node.users))


# parallel products --------------------------------------------------------------------------------------------------
def _alike(a: SiteWeight, b: SiteWeight) -> bool:
    """Whether two weights can share a kernel's code."""
    # Torch's dense products are as good; and every mask of blocks has a loop of its own.
    own = isinstance(a.encoding, (Dense, Blocks))
    return a.shape == b.shape and str(a.encoding) == str(b.encoding) and not own


def _stacked(sites: list[Site], extensions: Mapping[str, LoweringType]) -> Iterator[Site]:
    """Products of one activation whose weights can be stacked become one."""
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        weight = site.weights[0]
        types = tuple((name, tensor.dtype, tensor.shape[1:]) for name, tensor in weight.parts.items())
        problem = site.problem
        key = (str(weight.encoding), types, problem.prologue, problem.access, problem.epilogue)
        groups.setdefault(key, []).append(site)
    for group in groups.values():
        if len(group) > 1 and all(_stackable(site) for site in group):
            yield _stack(group, extensions)
        else:
            yield from group


def _stackable(site: Site) -> bool:
    weight, own = site.weights[0], site.operands[len(site.problem.prologue.arguments) :]
    rows = all(tensor.ndim == 2 and tensor.shape[0] == weight.shape[0] > 1 for tensor in weight.parts.values())
    plain = site.problem.access.kind == "rows" and not isinstance(weight.encoding, Dense)
    return rows and plain and all(is_weight(each) for each in own)


def _stack(group: list[Site], extensions: Mapping[str, LoweringType]) -> Site:
    first = group[0]
    weights = [site.weights[0] for site in group]
    parts = {name: torch.cat([weight.parts[name] for weight in weights]) for name in weights[0].parts}
    shape = (sum(weight.shape[0] for weight in weights), weights[0].shape[1])
    names = tuple(name for weight in weights for name in weight.names)
    merged = replace(weights[0], names=names, shape=shape, parts=parts)
    lowering = find_lowering(merged.encoding, shape, parts, extensions)
    assert isinstance(lowering, WeightLowering)
    shared = len(first.problem.prologue.arguments)
    own = zip(*(site.operands[shared:] for site in group), strict=True)
    return replace(
        first,
        weights=(merged,),
        anchors=tuple(site.anchors[0] for site in group),
        inner=tuple(dict.fromkeys(node for site in group for node in site.inner)),
        operands=(*first.operands[:shared], *own),
        problem=replace(first.problem, weights=(lowering,)),
        parallel=True,
    )


def tokens_of(site: Site) -> Any:
    """How many tokens the site's activation has, as a number or a symbolic integer."""
    kind = tensor_type(site.x)
    assert kind is not None
    return site.problem.access.tokens(kind.shape)


def buffers(site: Site) -> list[Tensor]:
    """The weights' tensors as the kernel reads them, in the kernel's order."""
    found: list[Tensor] = []
    for weight, lowering in zip(site.weights, site.problem.weights, strict=True):
        laid: Mapping[str, Tensor] = lowering.layout(weight.matrix_parts)
        found += [laid[buffer.name] for buffer in lowering.buffers]
        if site.problem.buffers(lowering) != lowering.buffers:
            found.append(lowering.row_sums())
    return found
