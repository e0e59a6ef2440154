"""The targets, installed as `sparc.codegen`."""

if __name__ != "sparc.codegen":
    raise ImportError("import this package as `sparc.codegen`")

from sparc.registry import Extension


def extension() -> Extension:
    """sparc's own targets, as the extension they are."""
    from sparc.codegen.onnx.target import OnnxTarget
    from sparc.codegen.reference import ReferenceTarget
    from sparc.codegen.triton.chips import CAPABILITIES
    from sparc.codegen.triton.target import TritonTarget

    flavours = (OnnxTarget("cpu"), OnnxTarget("portable"), OnnxTarget("cuda"))
    chips = (TritonTarget(), *(TritonTarget(capability) for capability in CAPABILITIES))
    return Extension("sparc-targets", targets=(*flavours, *chips, ReferenceTarget()))
