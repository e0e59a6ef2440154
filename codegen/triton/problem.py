"""What a kernel is generated from: the product, what comes before and after it, and the configuration of the tiles."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sparc.codegen.triton.kernel import Argument
from sparc.codegen.triton.tiles import Buffer, DecodeCost, Product, WeightLowering

TRITON = {
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "int8": "i8",
    "uint8": "u8",
    "int32": "i32",
    "int64": "i64",
    "bool": "u1",
    "float8_e4m3fn": "fp8e4nv",
}


@dataclass(frozen=True)
class Access:
    """Where the elements of activations lie.

    Args:
        kind: `rows`: `[tokens, features]`, features contiguous. `channels`: `[batch, features, positions]`, positions
            contiguous, token `t` being position `t % positions` of batch `t // positions`. `window`: the image `[batch,
            channels, height, width]` of a convolution, whose column `c` is an element of the window (`Window`).
            `batched`: `[batch, tokens, features]`, each for a matrix of its own; the output likewise.
        positions: of `channels` and `window`: positions of one output image.
        window: the convolution's geometry.
        batch: of `batched`: matrices, whose rows the weight has below one another.
        shared: of `batched`: whether all matrices read one activation, `[tokens, features]`.
    """

    kind: Literal["rows", "channels", "window", "batched"] = "rows"
    positions: int = 1
    window: "Window | None" = None
    batch: int = 1
    shared: bool = False

    def tokens(self, shape: Sequence[Any]) -> Any:
        """How many tokens an activation of this shape, which may be symbolic, has for each matrix."""
        if self.kind == "rows":
            return math.prod(shape[:-1])
        return shape[-2] if self.kind == "batched" else shape[0] * self.positions


@dataclass(frozen=True)
class Window:
    """A convolution's geometry, sizes in elements.

    Args:
        channels: input channels of one group.
        image: height and width of the input.
        output: height and width of the output.
        kernel: height and width of the window.
        stride: its steps.
        padding: zeros on each side.
        dilation: distance of the window's elements.
    """

    channels: int
    image: tuple[int, int]
    output: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Prologue:
    """What is done to the activation while it is read.

    Args:
        kind: nothing; a normalisation over the features (`rms_norm`, `layer_norm`); `quantize`: to 8 bits, a scale per
            token.
        epsilon: of the normalisation.
        gain: whether there is a gain `[features]`.
        bias: whether there is a bias `[features]`.
        dtype: of gain and bias, or of the scale of codes.
        quantized: `int8` or `float8e4nv`, also after a normalisation; empty for none.
        codes: `int8` or `uint8` where the activation is read as codes of one scale, whose product is `int8`; those of
            `uint8` have a zero point.
    """

    kind: Literal["none", "rms_norm", "layer_norm"] = "none"
    epsilon: float = 0.0
    gain: bool = False
    bias: bool = False
    dtype: str = "float16"
    quantized: str = ""
    codes: str = ""

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """The gain and the bias, or scale and zero point."""
        present = (("gain", self.gain), ("shift", self.bias), ("x_scale", bool(self.codes)))
        found = [Argument(name, f"*{TRITON[self.dtype]}", aligned=True) for name, wanted in present if wanted]
        zero = [Argument("x_zero", f"*{TRITON[self.codes]}", aligned=True)] if self.codes == "uint8" else []
        return (*found, *zero)


@dataclass(frozen=True)
class EpilogueInput:
    """A tensor that an epilogue reads.

    Args:
        name: the argument's name.
        dtype: as torch names it.
        kind: `feature` `[rows]`; `token` `[tokens]`; `full`, laid out like the output; `scalar`, one element. Where
            there is a batch, `[batch, rows]` and `[batch, tokens]`.
        suffix: of the anchor whose rows it belongs to.
    """

    name: str
    dtype: str
    kind: Literal["feature", "token", "full", "scalar"]


@dataclass(frozen=True)
class Epilogue:
    """What is done to the product before it is stored: pointwise, in float32.

    Args:
        inputs: the tensors it reads.
        lines: code that defines `result` from `product` (and `product_1`, of a second anchor) and the inputs' names.
        result: an expression for the result.
        dtype: the output's, as torch names it.
    """

    inputs: tuple[EpilogueInput, ...] = ()
    lines: tuple[str, ...] = ()
    result: str = "product"
    dtype: str = "float16"


@dataclass(frozen=True)
class Problem:
    """A product with its surroundings: `y = epilogue(prologue(x) @ decode(w)ᵀ)`.

    Args:
        weights: one lowering for each anchor; they have the same shape and encoding.
        dtype: the activation's, as torch names it; what they decode to, of codes.
        prologue: what is done to the activation.
        epilogue: what is done to the product.
        access: where the activation's elements lie.
    """

    weights: tuple[WeightLowering, ...]
    dtype: str
    prologue: Prologue = field(default_factory=Prologue)
    epilogue: Epilogue = field(default_factory=Epilogue)
    access: Access = field(default_factory=Access)

    @property
    def rows(self) -> int:
        """Features of the output."""
        return self.weights[0].rows // self.access.batch

    def tiles_of_rows(self, block_rows: int) -> int:
        """Tiles that the rows of all matrices take; none has rows of two matrices."""
        return self.access.batch * -(-self.rows // block_rows)

    @property
    def columns(self) -> int:
        """Features of the activation."""
        return self.weights[0].columns

    @property
    def equation(self) -> str:
        """What is computed, in a line."""
        x = {"none": "x", "rms_norm": "rms_norm(x)", "layer_norm": "layer_norm(x)"}[self.prologue.kind]
        x = f"{self.prologue.quantized}({x})" if self.prologue.quantized and not self.prologue.codes else x
        x = f"decode({x})" if self.prologue.codes else x
        ends = [f"_{index}" if index else "" for index in range(len(self.weights))]
        steps = [f"product{end} = {x} @ decode(codes{end}).T" for end in ends]
        steps += [line.replace("_value", "") for line in self.epilogue.lines]
        return "; ".join([*steps, f"y = {self.epilogue.result.replace('_value', '')}"])

    @property
    def key(self) -> tuple[object, ...]:
        """What the generated code depends on: problems with equal keys are served by equal kernels."""
        weights = tuple((each.key(), each.rows, each.columns, each.cost(self.product)) for each in self.weights)
        return (weights, self.dtype, self.prologue, self.epilogue, self.access)

    def cost(self, configuration: "Configuration") -> DecodeCost:
        """What a weight takes in a configuration's form."""
        weight = self.weights[0]
        if configuration.form == "product":
            return weight.cost(self.product)
        found = weight.lookup_cost(self.product, configuration.block_rows)
        assert found is not None
        return found

    @property
    def read(self) -> str:
        """The type in which the activation lies in memory, as torch names it."""
        return self.prologue.codes or self.dtype

    def buffers(self, weight: WeightLowering) -> tuple[Buffer, ...]:
        """What the kernel reads for a weight; its rows' sums, too, where a zero point multiplies them."""
        if self.prologue.codes != "uint8":
            return weight.buffers
        return (*weight.buffers, Buffer("row_sums", "i32" if weight.integer_sums else "fp32"))

    @property
    def product(self) -> Product:
        """The type in which tiles are multiplied."""
        return self.prologue.quantized or self.dtype  # type: ignore[return-value]


@dataclass(frozen=True)
class Configuration:
    """Tile sizes, and how a kernel is launched.

    Args:
        block_tokens: tokens of a tile; 1 for the form without tensor cores.
        block_rows: rows of a tile.
        block_columns: columns of a step.
        split: programs that share the columns of one tile.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        deterministic: whether split sums are added in a fixed order, through a workspace of one tile for each program;
            otherwise they are added as they come, with atomics.
        form: `product`, of decoded tiles; `lookup`, of one token, by sums that are looked up
            (`sparc.codegen.triton.lookup`), where the weight offers it.
    """

    block_tokens: int = 16
    block_rows: int = 64
    block_columns: int = 256
    split: int = 1
    num_warps: int = 4
    num_stages: int = 3
    deterministic: bool = True
    form: Literal["product", "lookup"] = "product"
