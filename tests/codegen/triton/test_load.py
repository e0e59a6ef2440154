"""Loading a kernel's source: Triton finds it again, the same function comes back, and broken sources are told."""

import inspect

import pytest

from sparc.codegen.triton.kernel import Argument, Kernel
from sparc.codegen.triton.load import load_function
from sparc.diag import LoweringError

SOURCE = """import triton
import triton.language as tl


@triton.jit
def twice(value):
    return value * 2.0


@triton.jit
def double(x, y):
    tl.store(y, twice(tl.load(x)))
"""
ARGUMENTS = (Argument("x", "*fp16"), Argument("y", "*fp16"))


def test_the_entry_is_found_with_its_source() -> None:
    function = load_function(Kernel("double", SOURCE, ARGUMENTS))
    assert function.arg_names == ["x", "y"]
    assert inspect.getsource(function.fn) == SOURCE[SOURCE.rindex("@triton.jit") :]


def test_the_same_kernel_is_loaded_once() -> None:
    function = load_function(Kernel("double", SOURCE, ARGUMENTS))
    assert load_function(Kernel("double", str(SOURCE), ARGUMENTS)) is function
    assert load_function(Kernel("twice", SOURCE, ARGUMENTS)) is not function


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("def double(:\n", "SyntaxError: invalid syntax"),
        ("import nothing_of_this_name\n", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("raise ValueError('first line\\nsecond line')\n", "ValueError: first line"),
        ("single = 1\n", "does not define it as a Triton function"),
        ("def double(x, y):\n    pass\n", "does not define it as a Triton function"),
    ],
)
def test_a_broken_source_is_told(source: str, why: str) -> None:
    with pytest.raises(LoweringError) as caught:
        load_function(Kernel("double", source, ARGUMENTS))
    assert caught.value.code == "SPARC409"
    assert "`double`" in caught.value.diagnostic.what
    assert why in caught.value.diagnostic.why
    assert "second line" not in caught.value.diagnostic.why
