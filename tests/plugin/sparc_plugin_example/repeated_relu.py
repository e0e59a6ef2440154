"""A pass: a relu of a relu is one relu."""

from torch import fx

from sparc.contract import Exact
from sparc.rewrite import Match, Skip, rewrite


@rewrite(lambda op, x: op.relu(op.relu(x)), contract=Exact())
def drop_repeated_relu(m: Match) -> fx.Node | Skip:
    """relu(relu(x)) => relu(x)."""
    return m.op.relu(m.x)
