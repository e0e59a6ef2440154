"""What an entry's inputs must be: a check before a runtime sees them, and example inputs made from the types alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sparc import codes
from sparc.cache import MASK, TOKENS, Cache
from sparc.diag import ArtifactError
from sparc.program import Entry
from sparc.signature import Signature
from sparc.text import dim_text

_EMBEDDINGS = (torch.ops.aten.embedding.default,)
_PASSED_ON = ("to", "_to_copy", "view", "reshape", "unsqueeze", "squeeze", "contiguous", "clone", "alias", "expand")


class InputCheck:
    """Compares a call's tensors with an entry's placeholders: dtype, rank, fixed sizes, equal symbols, ranges."""

    def __init__(self, entry: Entry) -> None:
        """Args: the entry."""
        self._cache = entry.cache
        growing = {(slot.input, slot.axis) for slot in entry.cache.slots} if entry.cache is not None else set()
        summed = {(MASK, 1)} if entry.cache is not None else set()  # checked in `_check_lengths`
        self._rows = []
        for name, node in zip(entry.signature.input_names, entry.placeholders, strict=True):
            dimensions = tuple(
                None if (name, axis) in summed else _dimension(size, entry, least=0 if (name, axis) in growing else 1)
                for axis, size in enumerate(node.meta["val"].shape)
            )
            self._rows.append((name, node.meta["val"].dtype, dimensions))

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        """Check one call.

        Raises:
            ArtifactError: SPARC506.
        """
        sizes: dict[str, tuple[int, str]] = {}
        for (name, dtype, dimensions), tensor in zip(self._rows, tensors, strict=True):
            if tensor.dtype != dtype:
                raise _mismatch(
                    f"input {name!r} is {_short(tensor.dtype)}, not {_short(dtype)}", f"pass {name}.to({dtype})"
                )
            if tensor.ndim != len(dimensions):
                raise _mismatch(f"input {name!r} has rank {tensor.ndim}, not {len(dimensions)}")
            for axis, (size, expected) in enumerate(zip(tensor.shape, dimensions, strict=True)):
                if isinstance(expected, int):
                    if size != expected:
                        raise _mismatch(
                            f"input {name!r} has size {size} in dimension {axis}, not {expected}",
                            "declare the dimension in dynamic= when compiling",
                        )
                elif expected is not None:
                    _check_symbol(f"dimension {axis} of input {name!r}", size, expected, sizes)
        if self._cache is not None:
            _check_lengths(self._cache, {row[0]: tensor for row, tensor in zip(self._rows, tensors, strict=True)})


def _check_lengths(cache: Cache, given: Mapping[str, Tensor]) -> None:
    """The mask is as long as the cache and the tokens together, and that is not longer than the model can see."""
    slot = cache.slots[0]
    total = given[slot.input].shape[slot.axis] + given[TOKENS].shape[1]
    if MASK in given and given[MASK].shape[1] != total:
        what = f"input {MASK!r} has {given[MASK].shape[1]} places, not {total}"
        raise _mismatch(what, "it covers what is in the cache, and the tokens")
    if total > cache.length:
        raise ArtifactError(
            codes.CACHE_FULL, f"{total} places do not fit into {cache.length}", why="the model knows no more positions"
        )


def _check_symbol(
    where: str, size: int, expected: "tuple[str, int, int | None]", sizes: dict[str, tuple[int, str]]
) -> None:
    symbol, low, high = expected
    known, first = sizes.setdefault(symbol, (size, where))
    if known != size:
        raise _mismatch(f"{symbol} is {known} in {first}, but {size} in {where}", "equal names are equal sizes")
    if size < low or (high is not None and size > high):
        span = f"at least {low}" if high is None else f"from {low} to {high}"
        raise _mismatch(f"{where} is {size}, but {symbol} is {span}")


def _dimension(size: Any, entry: Entry, *, least: int) -> "int | tuple[str, int, int | None] | None":
    """A fixed size, or the symbol's name and range; None for a compound expression."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    if not expression.is_Symbol:
        return None
    span = entry.fake_mode.shape_env.var_to_range.get(expression) if entry.fake_mode.shape_env is not None else None
    low = int(span.lower) if span is not None and span.lower.is_Integer else 1
    high = int(span.upper) if span is not None and span.upper.is_Integer else None
    return dim_text(size, entry), least if low <= 2 else low, high  # 2 is torch.export's own lower bound, for tracing


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _mismatch(what: str, hint: str = "") -> ArtifactError:
    return ArtifactError(codes.CALL_MISMATCH, what, hint=hint)


# examples -------------------------------------------------------------------------------------------------------------
def example_tensors(entry: Entry, seed: int = 0, sizes: "dict[str, int] | None" = None) -> list[Tensor]:
    """Seeded random inputs of the shapes the entry was captured with.

    Floats are standard normal, indices of an embedding cover its rows, masks and flags are all true, other integers are
    0 or 1.

    Args:
        entry: the entry.
        seed: of the random numbers.
        sizes: other sizes for dynamic dimensions, by the user's names.
    """
    generator = torch.Generator().manual_seed(seed)
    return [_example(node, entry, generator, sizes or {}) for node in entry.placeholders]


def named_inputs(signature: Signature, tensors: Sequence[Tensor]) -> dict[str, Any]:
    """The arguments of a call by name, from one tensor per input: the inverse of `Signature.bind`."""
    feed = iter(tensors)
    leaves = [next(feed) if leaf.is_tensor else leaf.frozen for leaf in signature.input_leaves]
    named: dict[str, Any] = {}
    start = 0
    for name, structure in zip(signature.parameters, signature.inputs, strict=True):
        named[name] = structure.unflatten(leaves[start : start + structure.size])
        start += structure.size
    return named


def _example(node: fx.Node, entry: Entry, generator: torch.Generator, sizes: "dict[str, int]") -> Tensor:
    value = node.meta["val"]
    shape = [_example_size(size, entry, sizes) for size in value.shape]
    if value.dtype.is_floating_point or value.dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(value.dtype)
    if value.dtype == torch.bool or "mask" in node.name:
        return torch.ones(shape, dtype=value.dtype)
    high = _rows(node) or 2
    return torch.randint(0, high, shape, generator=generator).to(value.dtype)


def _example_size(size: Any, entry: Entry, sizes: "dict[str, int]") -> int:
    if isinstance(size, int):
        return size
    name = dim_text(size, entry)
    if name in sizes:
        return sizes[name]
    hint = size.node.hint
    return int(hint) if hint is not None else 2


def _rows(node: fx.Node) -> int | None:
    """The rows of the smallest embedding that looks this input up, directly or through casts and views."""
    found: list[int] = []
    for user in node.users:
        if user.target in _EMBEDDINGS and user.args[1] is node:
            found.append(int(user.args[0].meta["val"].shape[0]))  # type: ignore[union-attr]
        elif str(getattr(user.target, "_opname", "")) in _PASSED_ON:
            rows = _rows(user)
            found += [rows] if rows else []
    return min(found) if found else None
