"""What is done to every row of an embedding by itself is done to its table once."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from sparc.analysis.elements import element, index_symbols
from sparc.analysis.logic import Unknown
from sparc.analysis.values import is_deterministic, same_shape, same_type, tensor_type
from sparc.contract import Bounded
from sparc.encoding.operators import is_decode
from sparc.execute import execute
from sparc.pass_base import Stage
from sparc.passes.fold.norm import kept_elsewhere
from sparc.pattern import Found
from sparc.program import Program, is_weight
from sparc.region import region
from sparc.rewrite import Match, Skip, rewrite

aten = torch.ops.aten

_MOST = 64  # nodes between the indices and the value
_NORMS = (aten.layer_norm.default, aten.rms_norm.default)


@dataclass
class _Rows:
    """A value whose every row is a function of one index.

    Args:
        index: the indices; None while no embedding was met.
        nodes: the calls between the indices and the value.
        tables: the embeddings among them.
        constant: embeddings whose index is the same everywhere, with that index.
        repeated: weights that hold one row many times, with that row.
        why: why the value is none after all; empty when it is one.
        seen: everything that was looked at.
    """

    index: fx.Node | None = None
    nodes: list[fx.Node] = field(default_factory=list)
    tables: list[fx.Node] = field(default_factory=list)
    constant: dict[fx.Node, int] = field(default_factory=dict)
    repeated: dict[str, Tensor] = field(default_factory=dict)
    why: str = ""
    seen: set[fx.Node] = field(default_factory=set)


def _read(program: Program, node: fx.Node, rows: _Rows) -> bool:
    """Follow a value to its embeddings; False when a row depends on more than its index."""
    if node in rows.nodes or node in rows.constant:
        return True
    rows.seen.add(node)
    if len(rows.seen) > _MOST:
        return False
    if node.target is aten.embedding.default:
        return _embedding(program, node, rows)
    if not _row_by_row(node):
        return False
    for used in node.all_input_nodes:
        if is_weight(used):
            if not _is_same_for_rows(program, node, used, rows):
                return False
        elif not _read(program, used, rows):
            return False
    rows.nodes.append(node)
    return True


def _embedding(program: Program, node: fx.Node, rows: _Rows) -> bool:
    table, index = node.args[0], node.args[1]
    assert isinstance(index, fx.Node)
    if not is_weight(table):
        rows.why = rows.why or ("the table is encoded already" if is_decode(table) else "")
        return False
    number = _uniform(program, index)
    if number is not None:
        rows.constant[node] = number
        return True
    if rows.index is not None and rows.index is not index:
        return False
    rows.index = index
    rows.nodes.append(node)
    rows.tables.append(node)
    return True


def _uniform(program: Program, index: fx.Node) -> int | None:
    """The number that stands everywhere in a tensor of indices; None when it is not known, or not the same."""
    kind = tensor_type(index)
    if kind is None:
        return None
    try:
        value = element(program, index, index_symbols(kind.ndim))
    except (Unknown, TypeError):
        return None
    return int(value) if isinstance(value, sympy.Integer) and value >= 0 else None


def _row_by_row(node: fx.Node) -> bool:
    """Whether an operator maps every row of its inputs by itself."""
    if not isinstance(node.target, OpOverload) or not is_deterministic(node):
        return False
    kind = tensor_type(node)
    if kind is None or not kind.is_floating_point():
        return False
    if node.target is aten.linear.default:
        return node.args[1].meta["val"].ndim == 2  # type: ignore[union-attr]
    if node.target in _NORMS:
        return len(node.args[1]) == 1  # type: ignore[arg-type]
    return torch.Tag.pointwise in node.target.tags


def _is_same_for_rows(program: Program, node: fx.Node, weight: fx.Node, rows: _Rows) -> bool:
    """Whether a weight that an operator reads says nothing of single rows."""
    if node.target is aten.linear.default or node.target in _NORMS:
        return node.args[0] is not weight
    tensor = program.weights[str(weight.target)]
    if all(size == 1 for size in tensor.shape[:-1]):
        return True
    flat = tensor.reshape(-1, tensor.shape[-1])
    if not bool((flat == flat[:1]).all()):
        return False
    rows.repeated[str(weight.target)] = flat[0]
    return True


def _find(program: Program, node: fx.Node) -> Found | Skip | None:
    """The last value of a run of operators on rows, unless its tables stay for another entry."""
    found = _find_here(program, node)
    if not isinstance(found, Found):
        return found

    def again(user: fx.Node) -> Iterator[object]:
        for _ in range(_MOST):
            yield _find_here(program, user)
            if len(user.users) != 1:
                return
            user = next(iter(user.users))

    return kept_elsewhere(program, found, again) or found


def _find_here(program: Program, node: fx.Node) -> Found | Skip | None:
    """The last value of a run of operators on rows."""
    if not _row_by_row(node):
        return None
    rows = _Rows()
    if not _read(program, node, rows) or rows.index is None:
        return Skip(rows.why) if rows.why else None
    if len(node.users) == 1 and _goes_on(program, next(iter(node.users))):
        return None
    inner = set(rows.nodes)
    whole = [each for each in rows.constant if not same_type(each.meta["val"], node.meta["val"])]
    if whole or any(user not in inner for each in rows.nodes if each is not node for user in each.users):
        return None
    if not _one_row_each(node, rows):
        return None
    why = _larger(program, node, rows, inner)
    if why:
        return Skip(why)
    values = {"index": rows.index, "table": rows.tables[0].args[0], "rows": rows}
    return Found(values, (*rows.constant, *rows.nodes), (node,))


def _goes_on(program: Program, user: fx.Node) -> bool:
    """Whether the next operator can join."""
    rows = _Rows()
    if not _row_by_row(user) or not _read(program, user, rows):
        return False
    inner = set(rows.nodes)
    alone = all(each is user or all(other in inner for other in each.users) for each in rows.nodes)
    return alone and _one_row_each(user, rows) and not _larger(program, user, rows, inner)


def _one_row_each(node: fx.Node, rows: _Rows) -> bool:
    """Whether a value is what one table gives for the indices: one row for each, of the table's dtype."""
    kind, index = node.meta["val"], rows.index.meta["val"]  # type: ignore[union-attr]
    return same_shape(kind.shape[:-1], index.shape) and kind.dtype == rows.tables[0].meta["val"].dtype


def _larger(program: Program, node: fx.Node, rows: _Rows, inner: set[fx.Node]) -> str:
    """Why the table made of the rows is no gain; empty when it is one."""
    count = program.weights[str(rows.tables[0].args[0].target)].shape[0]  # type: ignore[union-attr]
    made = count * int(node.meta["val"].shape[-1])
    weights = {used for each in rows.nodes for used in each.all_input_nodes if is_weight(used)}
    gone = [each for each in weights if all(user in inner for user in each.users)]
    freed = sum(program.weights[str(each.target)].numel() for each in gone)
    if made <= freed:
        return ""
    shared = any(rows.tables[0].args[0] is each for each in gone)
    return "the new table would be larger" if shared else "the table is used elsewhere as well"


@rewrite(find=_find, contract=Bounded(1e-4), stage=Stage.FOLD, single_use=False)
def fold_table(m: Match) -> "fx.Node | Skip":
    """f(embedding(E, ids)) => embedding(f(E), ids), for operators f on rows (factors, sums with other embeddings of the
    same ids or of one index, norms, linear layers), when the new table is not larger.
    """
    rows: _Rows = m.rows
    (root,) = m.roots
    count = m.program.weights[str(m.table.target)].shape[0]
    weights = {**m.program.weights, **rows.repeated}
    boundary = [rows.index, *rows.constant]
    function = region([root], set(rows.nodes), boundary)  # type: ignore[arg-type]
    ids = torch.arange(count).reshape([1] * (m.index.meta["val"].ndim - 1) + [count])
    given: list[Any] = [ids, *(weights[str(each.args[0].target)][at] for each, at in rows.constant.items())]  # type: ignore[union-attr]
    table: Tensor = execute(function, weights, given, wide=True)[0]
    merged = [each.args[0] for each in (*rows.tables, *rows.constant)]
    stored = m.constant(table.reshape(count, -1), like="table", of=merged)  # type: ignore[arg-type]
    return m.call(aten.embedding.default, stored, m.index)
