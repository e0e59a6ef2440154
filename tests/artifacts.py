"""A small artifact, and what the tests of artifacts share."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparc import codes
from sparc.artifact import Artifact, load_artifact
from sparc.capture import capture
from sparc.codegen.reference import ReferenceEmission, ReferenceTarget
from sparc.diag import Diagnostics, SparcError
from sparc.encoding.parse import BUILTIN
from sparc.ledger import Ledger, PassRow, Ratio, SiteRow, SkipRow
from sparc.program import Program
from sparc.target import Target


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.fc = nn.Linear(8, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        hidden = self.fc(self.embed(ids)) * mask.unsqueeze(-1)
        return {"hidden": hidden, "pooled": hidden.mean(1)}


IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
MASK = torch.ones(2, 5, dtype=torch.int64)


@cache
def captured() -> Program:
    torch.manual_seed(0)
    shape = {0: "batch", 1: "seq"}
    return capture(Encoder(), {"ids": IDS, "mask": MASK}, dynamic={"ids": shape, "mask": shape})


def make_program() -> Program:
    return captured().clone()


def make_ledger() -> Ledger:
    ledger = Ledger()
    skip = SkipRow("embed.weight", "its module is excluded")
    measured = {"snr_db": float("inf")}
    ledger.passes.append(PassRow("round(bits=8)", "*", "approximate", 1, 2, [skip], measured, 500, 200, seconds=1.5))
    source = "model.py:3 in forward"
    ledger.sites.append(SiteRow("fc.weight", "fc", source, "linear", "IntGrid(bits=8)", "", 41.5, 128, 48, 48, "Gemm"))
    ledger.summary.errors = {"hidden": {"relative error": 0.01}}
    ledger.summary.latencies = [Ratio("eager torch", 0.5, 0.4, 0.6, 30)]
    return ledger


def make_artifact(emission: Any = None) -> Artifact:
    program = make_program()
    diagnostics = Diagnostics()
    diagnostics.remark(codes.NOT_MATCHED, "embed.weight was left alone", why="its module is excluded")
    return Artifact(program, make_ledger(), diagnostics, emission or ReferenceEmission(program), "name = 'w8'\n")


def target_of(name: str) -> Target:
    assert name == "reference"
    return ReferenceTarget()


def load(folder: Path) -> Artifact:
    return load_artifact(folder, BUILTIN, target_of)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def code_of(action: Callable[[], Any]) -> str:
    with pytest.raises(SparcError) as caught:
        action()
    return caught.value.code
