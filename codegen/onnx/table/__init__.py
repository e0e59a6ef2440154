"""Our own translations of ATen operators, by theme; anything else goes through torch.onnx's registry."""

from sparc.codegen.onnx.emit import Translation
from sparc.codegen.onnx.table import (
    activation,
    arithmetic,
    attention,
    complex,
    conv,
    create,
    index,
    linear,
    norm,
    reduction,
    shape,
)

TABLE: dict[str, Translation] = {
    **arithmetic.TABLE,
    **activation.TABLE,
    **shape.TABLE,
    **create.TABLE,
    **reduction.TABLE,
    **norm.TABLE,
    **linear.TABLE,
    **conv.TABLE,
    **index.TABLE,
    **attention.TABLE,
    **{f"complex {name}": translation for name, translation in complex.COMPLEX.items()},
}
