"""Kernels in Triton's interpreter: slow, but it runs everywhere, and shows what a kernel computes without a GPU."""

import builtins
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction, TensorHandle, _patch_lang, interpreter_builder
from triton.runtime.jit import JITFunction

from sparc.codegen.triton.kernel import Kernel
from sparc.codegen.triton.load import load_function
from sparc.encoding.float8 import e4m3_codes


def interpret(kernel: Kernel, grid: tuple[int, ...], arguments: Sequence[Tensor | int]) -> None:
    """Run a kernel on tensors of the CPU, program by program.

    Args:
        kernel: the kernel.
        grid: how many programs, along one to three axes.
        arguments: as the kernel lists them.
    """
    function = load_function(kernel)
    with _interpreting(function.fn):
        InterpretedFunction(function.fn)[grid](*arguments)


@contextmanager
def _interpreting(function: Callable[..., Any]) -> Iterator[None]:
    """What the interpreter lacks when Triton was not imported for it: calls among functions, `range` over tensors of
    one
    element, arithmetic in bfloat16, which numpy does not have, and conversions that round to the nearest number.
    """
    builder = type(interpreter_builder)
    saved = JITFunction.__call__, builder.binary_op, builder.create_dot, builder.cast_impl, builder.create_fp_to_fp
    JITFunction.__call__ = _call
    builder.binary_op = _widened(saved[1])
    builder.create_dot = _widened_dot(saved[2])
    builder.cast_impl = _rounding(saved[3])
    builder.create_fp_to_fp = _rounding(saved[4])
    builder.get_bf16 = lambda self, value: TensorHandle(_narrow(np.array([value], np.float32)), tl.bfloat16)
    function.__globals__["range"] = _range
    scope = _patch_lang(tl.standard.cdiv.fn)  # the module whose functions kernels call
    try:
        yield
    finally:
        scope.restore()
        JITFunction.__call__, builder.binary_op, builder.create_dot, builder.cast_impl, builder.create_fp_to_fp = saved
        del builder.get_bf16
        function.__globals__.pop("range", None)


def _call(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
    """A function that a kernel calls."""
    return InterpretedFunction(self.fn).rewrite()(*args, **kwargs)


def _range(*bounds: Any) -> builtins.range:
    return builtins.range(*(_integer(bound) for bound in bounds))


def _integer(bound: Any) -> int:
    return int(bound.handle.data.item()) if hasattr(bound, "handle") else int(getattr(bound, "value", bound))


def _is_bfloat16(handle: TensorHandle) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _wide(handle: TensorHandle) -> TensorHandle:
    data = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return TensorHandle(data, tl.float32)


def _narrow(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    rounded = torch.from_numpy(np.ascontiguousarray(data, np.float32)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)


def _widened(plain: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def binary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Callable[..., Any]) -> TensorHandle:
        if not _is_bfloat16(lhs):
            return plain(self, lhs, rhs, op)
        found = op(_wide(lhs).data, _wide(rhs).data)
        if found.dtype == np.bool_:
            return TensorHandle(found, tl.int1)
        return TensorHandle(_narrow(found), tl.bfloat16)

    return binary_op


def _widened_dot(plain: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return plain(self, _wide(a) if _is_bfloat16(a) else a, _wide(b) if _is_bfloat16(b) else b, *rest)

    return create_dot


def _rounding(plain: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """To the nearest number, half to even, where the interpreter cuts off bits or forgets to carry."""

    def convert(self: Any, source: TensorHandle, to: tl.dtype, *rest: Any) -> TensorHandle:
        if source.dtype.scalar != tl.float32 or to.scalar not in (tl.bfloat16, tl.float8e4nv):
            return plain(self, source, to, *rest)
        if to.scalar == tl.bfloat16:
            return TensorHandle(_narrow(source.data), tl.bfloat16)
        return TensorHandle(e4m3_codes(torch.from_numpy(np.ascontiguousarray(source.data))).numpy(), tl.float8e4nv)

    return convert
