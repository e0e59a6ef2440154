"""Every element encoding from a recipe to an artifact: each target computes the program, and says what it stores."""

from pathlib import Path

import pytest
import torch
from torch import nn

import sparc
from sparc.encoding.base import Encoding
from sparc.encoding.binary_code import BinaryCode
from sparc.encoding.codebook import Codebook
from sparc.encoding.float8 import Float8
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.microscaling import MXFP4, NVFP4
from sparc.encoding.nm import NM
from sparc.passes.encode import Encode
from sparc.passes.round import Round

DENSE = [
    Float8(),
    Float8(32, "float16"),
    MXFP4(),
    NVFP4(),
    Codebook(),
    Codebook("kmeans", 3),
    BinaryCode(2, 32),
    NM(of=NVFP4()),
]
X = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))


def compiled(encoding: Encoding, target: str) -> sparc.Artifact:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 32)).eval()
    return sparc.compile(model, (X,), recipe=[Round(encoding, fit="search"), Encode()], target=target, measure=False)


@pytest.mark.parametrize("target", ["onnx", "reference"])
@pytest.mark.parametrize("encoding", [*DENSE, IntGrid(3, 32), IntGrid(3, 10, symmetric=False)], ids=str)
def test_targets_compute_the_program(encoding: Encoding, target: str, tmp_path: Path) -> None:
    made = compiled(encoding, target)
    (want,) = made.program.run_flat([X])
    torch.testing.assert_close(made(X), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(sparc.load(made.save(tmp_path / "a"))(X), made(X))
    for row, shape in zip(made.ledger.sites, ((64, 128), (32, 64)), strict=True):
        assert row.encoding == str(encoding)
        assert row.snr_db is not None
        assert row.snr_db > 5
        dense = row.dense_bytes if target == "onnx" and encoding in DENSE else 0
        assert row.file_bytes == encoding.bytes(shape) + dense


@pytest.mark.parametrize("encoding", DENSE, ids=str)
def test_onnx_says_that_it_stores_a_dense_weight(encoding: Encoding) -> None:
    made = compiled(encoding, "onnx")
    for row in made.ledger.sites:
        assert row.note == f"ONNX has no operator for {encoding}: it is stored dense"
        assert row.resident_bytes == row.dense_bytes
    assert [each.code.id for each in made.diagnostics].count("SPARC403") == 2


def test_three_bit_integers_stay_three_bits_in_the_file() -> None:
    row = compiled(IntGrid(3, 32), "onnx").ledger.sites[0]
    assert row.note == "ONNX Runtime has no fast operator for it and expands it when it loads the file"
    assert row.file_bytes == 64 * 128 * 3 // 8 + 64 * 4 * 4
