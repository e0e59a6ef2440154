"""GGUF files that are cut short or lie: refused with a code, quickly, and before anything is allocated."""

import contextlib
import resource
import struct
import time
import tracemalloc

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st

from sparc.checkpoint.gguf import read_container
from sparc.checkpoint.gguf_llama import read_gguf
from sparc.diag import CaptureError, SparcError
from tests.checkpoint.gguf_files import tiny, write

HUGE = 2**63
UINT32, STRING, ARRAY, UINT64 = 4, 8, 9, 10


def string(text, length=None):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data) if length is None else length) + data


def entry(key, kind=UINT32, value=None):
    return string(key) + struct.pack("<I", kind) + (struct.pack("<I", 32) if value is None else value)


def tensor(name="a", shape=(32, 4), kind=2, offset=0, dimensions=None):
    count = len(shape) if dimensions is None else dimensions
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


def build(entries=(), tensors=(), data=b"", counts=None, version=3, magic=b"GGUF", alignment=32):
    head = magic + struct.pack("<IQQ", version, *(counts or (len(tensors), len(entries))))
    head += b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


VALID = build([entry("a.b")], [tensor(), tensor("b", (64,), 0, 96)], bytes(96 + 256))
Q4_0_BYTES = 18 * 4


def read(tmp_path, data):
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return read_container(path)


def test_what_is_read(tmp_path):
    found = read(tmp_path, VALID)
    assert found.metadata == {"a.b": 32}
    assert {name: (info.shape, info.block.name, info.size) for name, info in found.tensors.items()} == {
        "a": ((4, 32), "Q4_0", Q4_0_BYTES),
        "b": ((64,), "float32", 256),
    }
    assert found.rows("a").shape == (4, 18)
    assert found.rows("b").shape == (1, 256)
    assert not found.rows("a").flags.writeable


LIES = {
    "no magic": (build(magic=b"GGML"), "SPARC118"),
    "version 1": (build(version=1), "SPARC118"),
    "another byte order": (build(version=3 << 24), "SPARC118"),
    "huge count of tensors": (build(counts=(HUGE, 0)), "SPARC117"),
    "huge count of metadata": (build(counts=(0, HUGE)), "SPARC117"),
    "count of tensors too great": (build(counts=(3, 0)), "SPARC116"),
    "count of metadata too great": (build(counts=(0, 9)), "SPARC116"),
    "key of 2^63 bytes": (build([string("a", HUGE) + bytes(64)]), "SPARC117"),
    "key beyond the end": (build([string("a", 1 << 20) + bytes(64)]), "SPARC116"),
    "key that is no text": (build([entry(b"\xff\xfe")]), "SPARC117"),
    "key twice": (build([entry("a"), entry("a")]), "SPARC117"),
    "unknown type of metadata": (build([entry("a", 13)]), "SPARC117"),
    "string of 2^63 bytes": (build([entry("a", STRING, string("x", HUGE))]), "SPARC117"),
    "array of arrays": (build([entry("a", ARRAY, struct.pack("<IQ", ARRAY, 1) + bytes(64))]), "SPARC117"),
    "array of an unknown type": (build([entry("a", ARRAY, struct.pack("<IQ", 77, 1) + bytes(64))]), "SPARC117"),
    "array of 2^63 numbers": (build([entry("a", ARRAY, struct.pack("<IQ", UINT32, HUGE) + bytes(64))]), "SPARC116"),
    "array that overflows": (build([entry("a", ARRAY, struct.pack("<IQ", UINT64, 2**61) + bytes(64))]), "SPARC116"),
    "array of 2^63 strings": (build([entry("a", ARRAY, struct.pack("<IQ", STRING, HUGE) + bytes(64))]), "SPARC117"),
    "array of many strings": (build([entry("a", ARRAY, struct.pack("<IQ", STRING, 1 << 22) + bytes(64))]), "SPARC116"),
    "tensor twice": (build([], [tensor(), tensor(offset=96)], bytes(200)), "SPARC117"),
    "no dimensions": (build([], [tensor(shape=())], bytes(200)), "SPARC117"),
    "2^32 - 1 dimensions": (build([], [tensor(dimensions=2**32 - 1)], bytes(200)), "SPARC117"),
    "an empty tensor": (build([], [tensor(shape=(32, 0))], bytes(200)), "SPARC117"),
    "a product that overflows to 0": (build([], [tensor(shape=(2**32, 2**32))], bytes(200)), "SPARC116"),
    "a product that overflows to little": (build([], [tensor(shape=(2**63, 2, 32))], bytes(200)), "SPARC116"),
    "rows of half a block": (build([], [tensor(shape=(48, 4))], bytes(200)), "SPARC117"),
    "an unknown type": (build([], [tensor(kind=4)], bytes(200)), "SPARC118"),
    "a type beyond the table": (build([], [tensor(kind=2**32 - 1)], bytes(200)), "SPARC118"),
    "offset beyond the end": (build([], [tensor(offset=1 << 20)], bytes(200)), "SPARC116"),
    "offset of 2^64 - 32": (build([], [tensor(offset=2**64 - 32)], bytes(200)), "SPARC116"),
    "offset that is not aligned": (build([], [tensor(offset=8)], bytes(200)), "SPARC117"),
    "tensors over one another": (build([], [tensor(), tensor("b", offset=32)], bytes(200)), "SPARC117"),
    "alignment 0": (build([entry("general.alignment", value=bytes(4))], [tensor()], bytes(200)), "SPARC117"),
    "alignment 7": (build([entry("general.alignment", value=struct.pack("<I", 7))]), "SPARC117"),
    "alignment 2^31": (build([entry("general.alignment", value=struct.pack("<I", 1 << 31))]), "SPARC117"),
    "alignment that is text": (build([entry("general.alignment", STRING, string("32"))]), "SPARC117"),
    "nothing": (b"", "SPARC116"),
}


@pytest.mark.parametrize("case", LIES)
def test_lies_are_refused(case, tmp_path):
    data, code = LIES[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(CaptureError) as caught:
        read_container(path)
    spent, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert caught.value.code == code
    assert peak < 1 << 20
    assert spent < 1


def test_every_length_but_the_whole_is_too_short(tmp_path):
    for length in range(len(VALID)):
        with pytest.raises(CaptureError) as caught:
            read(tmp_path, VALID[:length])
        assert caught.value.code == "SPARC116", length


# whole models ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write(path, tiny(), tokens=lambda writer: writer.add_token_list([f"t{index}" for index in range(64)]))
    return path


def test_the_container_of_the_gguf_package(model_file):
    found, expected = read_container(model_file), GGUFReader(model_file)
    assert set(found.tensors) == {each.name for each in expected.tensors}
    for each in expected.tensors:
        assert np.array_equal(found.rows(each.name).ravel(), np.asarray(each.data).view(np.uint8).ravel())
    for name, field in expected.fields.items():
        if not name.startswith("GGUF."):
            value = found.metadata[name]
            assert list(value) == field.contents() if field.types[0] == ARRAY else value == field.contents()


def test_models_cut_short_are_refused(model_file, tmp_path):
    data = model_file.read_bytes()
    path = tmp_path / "model.gguf"
    for length in [*range(0, 2000, 37), *range(2000, len(data), len(data) // 40)]:
        path.write_bytes(data[:length])
        with pytest.raises(CaptureError) as caught:
            read_gguf(path)
        assert caught.value.code == "SPARC116"


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 255)), min_size=1, max_size=8), st.booleans())
def test_flipped_bytes_are_refused_or_read(model_file, tmp_path_factory, flips, in_header):
    data = bytearray(model_file.read_bytes())
    for place, value in flips:
        data[place % (2500 if in_header else len(data))] = value
    path = tmp_path_factory.getbasetemp() / "flipped.gguf"
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(SparcError):
        read_gguf(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10  # KiB
