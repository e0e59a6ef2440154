"""Attention that is no single operator (capped scores, sinks): what the axes of its products are."""

from collections.abc import Container, Iterator

from torch import fx

from sparc.analysis.axes import Channels, leaves
from sparc.analysis.coupling import Contraction, Coupling, name_of
from sparc.program import is_weight

_PRODUCTS = ("matmul", "bmm", "baddbmm")
_SOFTMAX = ("softmax", "_softmax")


def hint_products(state: Coupling) -> None:
    """Hint what the axes of batched products are, for attention what `scaled_dot_product_attention` would have hinted.

    Args:
        state: the analysis, when all axes are unified: queries of a head are told from heads by what makes the keys.
    """
    made = {each.node: each for each in state.contractions}
    batched = {node: each for node, each in made.items() if name_of(node) in _PRODUCTS}
    attention: set[fx.Node] = set()
    for node, product in batched.items():
        if any(map(is_weight, product.operands)):
            continue
        for softmax in _reached(node, _SOFTMAX, made):
            behind = list(_reached(softmax, _PRODUCTS, made))
            attention.update([node, *behind])
            state.hints.append((product.axis, "head_dim"))
            state.hints += [(state.of(each)[-1], "head_dim") for each in behind]
    for node, product in batched.items():
        if node in attention:
            _hint_heads(state, product, made)
        else:
            state.hints += [(axis, "head") for axis in state.of(node)[:-2]]


def _reached(start: fx.Node, names: tuple[str, ...], stops: Container[fx.Node]) -> Iterator[fx.Node]:
    """The nearest operators of some names behind a node, with no sum of products between."""
    seen, waiting = {start}, [start]
    while waiting:
        for user in waiting.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if name_of(user) in names:
                yield user
            elif user not in stops:
                waiting.append(user)


def _hint_heads(state: Coupling, product: Contraction, stops: Container[fx.Node]) -> None:
    """A head is made for both operands; where one of them is repeated, the other has several queries for it."""
    sources = [_sources(state, operand, stops) for operand in product.operands]
    for axis in state.of(product.node)[-3:-2]:
        for leaf in leaves(axis):
            shared = all(leaf in source for source in sources)
            state.hints.append((leaf, "head" if shared else "queries of a head"))


def _sources(state: Coupling, operand: fx.Node, stops: Container[fx.Node]) -> set[Channels]:
    """The channels of the weights, inputs and sums of products that a value is made of."""
    found: set[Channels] = set()
    seen, waiting = {operand}, [operand]
    while waiting:
        node = waiting.pop()
        if node in stops or not node.all_input_nodes:
            found.update(leaf for axis in state.of(node) for leaf in leaves(axis))
            continue
        new = [used for used in node.all_input_nodes if used not in seen]
        seen.update(new)
        waiting += new
    return found
