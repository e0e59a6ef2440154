"""Sites as operators of torch's, in the namespace `sparc_triton`, and the ways to launch a kernel."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, triton_op, wrap_triton

from sparc.codegen.triton.interpret import interpret
from sparc.codegen.triton.kernel import Kernel
from sparc.codegen.triton.launch import Scratch
from sparc.codegen.triton.load import load_function
from sparc.codegen.triton.operator import SiteOperator, SiteTensors
from sparc.encoding.base import ElementEncoding
from sparc.encoding.operators import find_spec

_NAMESPACE = "sparc_triton"


def launch(kernel: Kernel, grid: tuple[int, ...], arguments: Sequence[Tensor | int]) -> None:
    """Launch a kernel where its tensors are: on the GPU, or in the interpreter for tensors of the CPU."""
    first = arguments[0]
    assert isinstance(first, Tensor)
    if first.device.type == "cpu":
        interpret(kernel, grid, arguments)
        return
    options: dict[str, Any] = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    wrap_triton(load_function(kernel))[grid](*arguments, **options)


def define(operator: SiteOperator) -> Any:
    """The torch operator of a site; equal sites share one.

    It is called as `op(x, buffers, operands, scratch)`: the activation, the weights' buffers, what the prologue and the
    epilogue read, and the workspace and counters, which hold the same before and after.
    """
    name = f"site_{operator.digest}"
    known = getattr(torch.ops, _NAMESPACE)
    if hasattr(known, name):
        return getattr(known, name).default

    kept = operator.without_tensors()  # torch keeps an operator as long as the process lives

    def site(x: Tensor, buffers: list[Tensor], operands: list[Tensor], scratch: list[Tensor]) -> Tensor:
        return kept.run(x, SiteTensors(buffers, operands), Scratch(*scratch), launch)

    triton_op(f"{_NAMESPACE}::{name}", site, mutates_args={"scratch"})
    return getattr(known, name).default


@custom_op(f"{_NAMESPACE}::gather_rows", mutates_args=())
def gather_rows(parts: list[Tensor], index: Tensor, spec: str, columns: int, dtype: torch.dtype) -> Tensor:
    """`embedding(decode(parts), index)`, of which only the rows that are asked for are decoded.

    Args:
        parts: of an encoding each row of which is stored by itself.
        index: rows, of any shape.
        spec: the encoding.
        columns: of a row.
        dtype: of the result, `[*index, columns]`.
    """
    encoding = find_spec(spec)
    rows = index.flatten()
    chosen = [part if part.shape[0] == 1 else part.index_select(0, rows) for part in parts]
    named = dict(zip(encoding.part_names, chosen, strict=True))
    return encoding.decode(named, (rows.numel(), columns), dtype).reshape(*index.shape, columns)


@gather_rows.register_fake
def _gather_rows_type(parts: list[Tensor], index: Tensor, spec: str, columns: int, dtype: torch.dtype) -> Tensor:
    return parts[0].new_empty((*index.shape, columns), dtype=dtype)


def gathers(spec: str, parts: Sequence[Tensor], rows: int) -> bool:
    """Whether rows of an encoded matrix can be decoded by themselves."""
    by_rows = all(part.ndim == 2 and part.shape[0] in (rows, 1) for part in parts)
    return by_rows and isinstance(find_spec(spec), ElementEncoding)
