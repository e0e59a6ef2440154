"""How the activation is read: where its elements lie, and what the prologue does to them on the way.

Code here defines `value`, in the product's type: `[width]` for a single token, else `[width, block_tokens]`, for the
columns `column` and the tokens `token`.
"""

from sparc.codegen.triton.problem import Access, Problem, Prologue, Window
from sparc.codegen.triton.static import MIDDLE, ROUNDER

_CHUNK = 1024  # features that a statistic reads at once, for a single token
_CHUNK_OF_TILE = 4096  # elements that it reads at once, for a tile of tokens


def load(problem: Problem, single: bool, padded: bool) -> list[str]:
    """Code that reads the columns `column` and applies the prologue.

    Args:
        problem: what is computed.
        single: whether there is one token.
        padded: whether columns beyond the last one are asked for, which must read as zero.
    """
    column, token = ("column", "token") if single else ("column[:, None]", "token[None, :]")
    address, mask = _address(problem.access, problem.columns, column, token)
    masks = [mask] if mask else []
    if padded:
        masks.append(f"({column} < {problem.columns})")
    other = _beyond(problem, column, padded) if problem.prologue.codes else "0.0"
    guard = f", mask={' & '.join(masks)}, other={other}" if masks else ""
    policy = ', eviction_policy="evict_last"' if problem.access.kind in ("rows", "batched") else ""
    lines = [f"value = tl.load(x + {address}{guard}{policy})"]
    if problem.prologue.codes == "uint8":
        lines.append(f"value = (value ^ {MIDDLE}).to(tl.int8, bitcast=True)")
    return lines if problem.prologue.codes else lines + _transform(problem, single, padded)


def _beyond(problem: Problem, column: str, padded: bool) -> str:
    """The code that stands where there is no element: zero's own beside an image, and int8's 0 beyond the last column,
    where weights are not zero.
    """
    if problem.prologue.codes == "int8":
        return "0"
    if problem.access.kind != "window":
        return str(MIDDLE)
    return f"tl.where({column} < {problem.columns}, x_zero_code, {MIDDLE})" if padded else "x_zero_code"


def _address(access: Access, columns: int, column: str, token: str) -> tuple[str, str]:
    """Where an element lies, and when it exists; always, where that is empty."""
    if access.kind in ("rows", "batched"):
        return f"{token} * {columns} + {column}", ""
    batch, position = f"({token} // {access.positions})", f"({token} % {access.positions})"
    if access.kind == "channels":
        return f"{batch} * {columns * access.positions} + {column} * {access.positions} + {position}", ""
    assert access.window is not None
    return _window(access.window, batch, position, column)


def _window(window: Window, batch: str, position: str, column: str) -> tuple[str, str]:
    height, width = window.image
    area = window.kernel[0] * window.kernel[1]
    channel = f"({column} // {area})"
    y = (
        f"({position} // {window.output[1]} * {window.stride[0]} - {window.padding[0]}"
        f" + {column} % {area} // {window.kernel[1]} * {window.dilation[0]})"
    )
    x = (
        f"({position} % {window.output[1]} * {window.stride[1]} - {window.padding[1]}"
        f" + {column} % {window.kernel[1]} * {window.dilation[1]})"
    )
    address = f"(({batch} * {window.channels} + {channel}) * {height} + {y}) * {width} + {x}"
    return address, f"({y} >= 0) & ({y} < {height}) & ({x} >= 0) & ({x} < {width})"


# prologues -----------------------------------------------------------------------------------------------------------
def _transform(problem: Problem, single: bool, padded: bool) -> list[str]:
    """Normalise, quantize."""
    prologue = problem.prologue
    guard = f", mask=column < {problem.columns}, other=0.0" if padded else ""
    lines = _normalise(problem, single, "value", "column", guard, "[:, None]" if not single else "", "[None, :]")
    if padded and prologue.kind == "layer_norm" and not prologue.gain:
        column = "column" if single else "column[:, None]"  # the mean was taken off what is not there, too
        lines.append(f"value = tl.where({column} < {problem.columns}, value, 0.0).to(tl.{problem.dtype})")
    if prologue.quantized == "int8":
        scale = "token_scale" if single else "token_scale[None, :]"
        return [
            *lines,
            f"value = value.to(tl.float32) / {scale} + {ROUNDER} - {ROUNDER}",
            "value = tl.minimum(tl.maximum(value, -127.0), 127.0).to(tl.int8)",
        ]
    if prologue.quantized:
        scale = "token_scale" if single else "token_scale[None, :]"
        return [*lines, f"value = (value.to(tl.float32) / {scale}).to(tl.{prologue.quantized})"]
    return lines


def _normalise(
    problem: Problem, single: bool, name: str, column: str, guard: str, of_column: str, of_token: str
) -> list[str]:
    """`name = norm(name)` in the activation's type, for the features `column`."""
    prologue = problem.prologue
    if prologue.kind == "none":
        return []
    token = "" if single else of_token
    centred = f"({name}.to(tl.float32) - mean{token})" if prologue.kind == "layer_norm" else f"{name}.to(tl.float32)"
    text = f"{centred} * inverse{token}"
    if prologue.gain:
        text = f"{text} * tl.load(gain + {column}{guard}).to(tl.float32){of_column}"
    if prologue.bias:
        text = f"{text} + tl.load(shift + {column}{guard}).to(tl.float32){of_column}"
    return [f"{name} = ({text}).to(tl.{problem.dtype})"]


def statistics(problem: Problem, single: bool) -> list[str]:
    """What the prologue must know of each token before its first column is used: `mean`, `inverse`, `token_scale`.

    Every program reads its tokens once more for it; they come from the cache, since all programs read the same.
    """
    prologue = problem.prologue
    lines: list[str] = []
    if prologue.codes:
        return lines + _static_parameters(prologue)
    if prologue.kind == "layer_norm":
        lines += _passes(problem, single, "mean", "features.to(tl.float32)", f"{{}} / {problem.columns}")
    if prologue.kind != "none":
        centred = "features.to(tl.float32)" + (
            f" - mean{'' if single else '[:, None]'}" if prologue.kind == "layer_norm" else ""
        )
        square = f"{{}} / {problem.columns} + {prologue.epsilon!r}"
        lines += _passes(problem, single, "inverse", centred, f"1.0 / tl.sqrt({square})", squared=True)
    if prologue.quantized:
        greatest = {"int8": "127.0", "float8e4nv": "448.0"}[prologue.quantized]
        lines += _passes(problem, single, "token_scale", "features.to(tl.float32)", f"{{}} / {greatest}", maximum=True)
        lines.append("token_scale = tl.where(token_scale > 0, token_scale, 1.0)")
    return lines


def _static_parameters(prologue: Prologue) -> list[str]:
    """`x_scale_value`; of unsigned codes, `x_zero_code` and `x_offset`, the number that it is multiplied as."""
    lines = ["x_scale_value = tl.load(x_scale).to(tl.float32)"]
    if prologue.codes == "uint8":
        lines += ["x_zero_code = tl.load(x_zero)", f"x_offset = x_zero_code.to(tl.int32) - {MIDDLE}"]
    return lines


def _passes(
    problem: Problem,
    single: bool,
    name: str,
    element: str,
    result: str,
    *,
    squared: bool = False,
    maximum: bool = False,
) -> list[str]:
    """A loop over the features that reduces them to one number for each token."""
    block = _CHUNK if single else _CHUNK_OF_TILE // 16
    chunk = min(block, 1 << (problem.columns - 1).bit_length())
    shape = f"{chunk}," if single else f"token.shape[0], {chunk}"
    first = f"token * {problem.columns} + " if problem.access.kind == "batched" else ""
    address = f"{first}feature" if single else f"token[:, None] * {problem.columns} + feature[None, :]"
    exists = "" if problem.columns % chunk == 0 else f"feature < {problem.columns}"
    spread = "" if single else "[None, :]"
    guard = f", mask=({exists}){spread}, other=0.0" if exists else ""
    own_guard = f", mask={exists}, other=0.0" if exists else ""
    normalised = _normalise(problem, single, "features", "feature", own_guard, spread, "[:, None]") if maximum else []
    step = (
        f"{name}_sum = tl.maximum({name}_sum, tl.abs(term))" if maximum else f"{name}_sum += term{' * term' * squared}"
    )
    masked = f"term = tl.where(({exists}){spread}, {element}, 0.0)" if exists else f"term = {element}"
    reduced = f"tl.{'max' if maximum else 'sum'}({name}_sum, {0 if single else 1})"
    return [
        f"{name}_sum = tl.zeros(({shape}), tl.float32)",
        f"for chunk in range({-(-problem.columns // chunk)}):",
        f"    feature = chunk * {chunk} + tl.arange(0, {chunk})",
        f"    features = tl.load(x + {address}{guard})",
        *(f"    {line}" for line in normalised),
        f"    {masked}",
        f"    {step}",
        f"{name} = {result.format(reduced)}",
    ]
