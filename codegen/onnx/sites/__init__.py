"""Encoded weights and quantized activations: which lowerings each flavour tries, in order."""

from torch import fx

from sparc.codegen.onnx.emit import Emitter, Result
from sparc.codegen.onnx.sites.activation import decode, quantize
from sparc.codegen.onnx.sites.embedding import embedding
from sparc.codegen.onnx.sites.expand import decode_weight, dequantized_product
from sparc.codegen.onnx.sites.grouped import multiply_runs, multiply_stored_runs
from sparc.codegen.onnx.sites.integer import integer_product
from sparc.codegen.onnx.sites.nbits import nbits_product
from sparc.codegen.onnx.sites.product import ProductLowering, match_product
from sparc.codegen.onnx.sites.static import convolution, static_product
from sparc.grouped import is_grouped_linear

PRODUCTS: dict[str, tuple[ProductLowering, ...]] = {
    "portable": (integer_product, static_product, dequantized_product),
    "cpu": (integer_product, static_product, nbits_product),
    "cuda": (static_product, nbits_product, dequantized_product),
}
_GROUPED = ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")


def product(e: Emitter, node: fx.Node) -> Result:
    """A product with an encoded weight, by the first lowering of the flavour that carries it."""
    site = match_product(e, node)
    if site is None:
        return None
    for lowering in PRODUCTS[e.target.flavour]:
        result = lowering(e, site)
        if result is not None:
            return result
    return None


def grouped(e: Emitter, node: fx.Node) -> Result:
    """Runs of rows times a matrix each; one that is encoded by the first lowering of the flavour that carries it."""
    if is_grouped_linear(node):
        return multiply_runs(e, node, PRODUCTS[e.target.flavour])
    return multiply_stored_runs(e, node) if str(node.target) in _GROUPED else None


def decoded(e: Emitter, node: fx.Node) -> Result:
    """A decode that no operator took in: a dense weight, or an activation."""
    if str(node.target) != "sparc.decode.default":
        return None
    dense = decode_weight(e, node)
    return dense if dense is not None else decode(e, node, *node.args)  # type: ignore[arg-type]


def quantized(e: Emitter, node: fx.Node) -> Result:
    """A quantize whose parts are read one by one."""
    if str(node.target) != "sparc.quantize.default":
        return None
    return quantize(e, node, *node.args)  # type: ignore[arg-type]


RULES = (product, grouped, convolution, embedding, decoded, quantized)
