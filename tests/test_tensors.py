"""Tensors in safetensors files: aligned, deterministic, mapped into memory, and refused when damaged."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sparc.diag import ArtifactError
from sparc.serialize import TensorFile, TensorReader


def seeded(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


# tensors --------------------------------------------------------------------------------------------------------------
TENSORS = {
    "z.float": seeded(4, 16), "a.scalar": torch.tensor(3.0), "empty": torch.zeros(0, 3), "flags": torch.tensor([True,
    False, True]), "half": seeded(3, 3).bfloat16(), "codes": torch.arange(7, dtype=torch.int8), "long": torch.arange(3),
"turned": seeded(4, 16).t(), }  # fmt: skip


def write(path: Path, tensors: dict[str, Tensor]) -> TensorFile:
    file = TensorFile(tensors)
    path.write_bytes(b"".join(file.chunks()))
    return file


def test_tensors_are_safetensors(tmp_path: Path) -> None:
    write(tmp_path / "t.safetensors", TENSORS)
    read = load_file(tmp_path / "t.safetensors")
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], TENSORS[name]) and read[name].dtype == TENSORS[name].dtype for name in TENSORS)


def test_spans_say_where_the_bytes_lie_and_are_aligned(tmp_path: Path) -> None:
    file = write(tmp_path / "t.safetensors", TENSORS)
    content = (tmp_path / "t.safetensors").read_bytes()
    assert file.size == len(content)
    for name, span in file.spans.items():
        expected = TENSORS[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert content[span.offset : span.offset + span.length] == expected
        assert span.offset % TENSORS[name].element_size() == 0
        if span.length % 64 == 0:
            assert span.offset % 64 == 0


def test_the_order_of_tensors_does_not_matter() -> None:
    backwards = dict(reversed(TENSORS.items()))
    assert b"".join(TensorFile(TENSORS).chunks()) == b"".join(TensorFile(backwards).chunks())


def test_tensors_are_read_through_a_map(tmp_path: Path) -> None:
    """Even when the file is replaced while they are in use."""
    path = tmp_path / "t.safetensors"
    write(path, {"w": seeded(64, 64)})
    with TensorReader(path) as reader:
        tensor = reader.get("w")
    path.unlink()
    assert torch.equal(tensor, seeded(64, 64))


def damaged(content: bytes) -> dict[str, bytes]:
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])

    def with_header(change: Callable[[dict[str, Any]], Any]) -> bytes:
        changed = copy.deepcopy(header)
        change(changed)
        text = json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + size :]

    return {
        "empty": b"",
        "short": content[:-1],
        "long": content + b"x",
        "header beyond the file": (2**62).to_bytes(8, "little") + content[8:],
        "no header": bytes(len(content)),
        "offsets beyond the file": with_header(lambda h: h["w"].update(data_offsets=[0, 2**40])),
        "a shape beyond the bytes": with_header(lambda h: h["w"].update(shape=[2**31, 2**31])),
        "a shape that overflows": with_header(lambda h: h["w"].update(shape=[2**63, 2])),
        "an unknown dtype": with_header(lambda h: h["w"].update(dtype="PICKLE")),
        "a negative offset": with_header(lambda h: h["w"].update(data_offsets=[-8, 0])),
    }


@pytest.mark.parametrize("fault", damaged(b"".join(TensorFile({"w": torch.zeros(4, 4)}).chunks())))
def test_a_damaged_file_is_refused(fault: str, tmp_path: Path) -> None:
    write(tmp_path / "t.safetensors", {"w": torch.zeros(4, 4)})
    content = damaged((tmp_path / "t.safetensors").read_bytes())[fault]
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError) as caught, TensorReader(tmp_path / "t.safetensors") as reader:
        reader.get("w")
    assert caught.value.code == "SPARC503"
