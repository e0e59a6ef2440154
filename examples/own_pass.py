"""A pass of one's own: merge two linears in a row, checked by the compiler."""

import torch
from torch import nn

import sparc
from sparc import Bounded, Match, Skip, rewrite


@rewrite(lambda op, x, a, b: op.linear(op.linear(x, a), b), contract=Bounded(rtol=1e-4))
def fold_low_rank(m: Match) -> torch.fx.Node | Skip:
    """linear(linear(x, A), B) => linear(x, B @ A), when the merged matrix is not larger."""
    a, b = m.weight("a"), m.weight("b")
    if a is None or b is None:
        return m.skip("A or B is computed, not a weight")
    if b.shape[0] * a.shape[1] > a.numel() + b.numel():
        return m.skip("the merged matrix is larger")
    return m.op.linear(m.x, m.constant(b @ a, like="b"))


def main() -> None:
    """Compile a stack of linears with the pass and print its ledger row."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 48, bias=False), nn.Linear(48, 32, bias=False), nn.ReLU(), nn.Linear(32, 8)
    ).eval()
    artifact = sparc.compile(model, (torch.randn(4, 64),), recipe=[fold_low_rank], measure=False)
    print(artifact.program)
    for row in artifact.ledger.passes:
        print(row)


if __name__ == "__main__":
    main()
