"""The targets, installed as `sparc.codegen`."""

if __name__ != "sparc.codegen":
    raise ImportError("import this package as `sparc.codegen`")

from sparc.registry import Extension


def extension() -> Extension:
    """sparc's own targets, as the extension they are."""
    from sparc.codegen.onnx.target import OnnxTarget
    from sparc.codegen.reference import ReferenceTarget

    flavours = (OnnxTarget("cpu"), OnnxTarget("portable"), OnnxTarget("cuda"))
    return Extension("sparc-targets", targets=(*flavours, ReferenceTarget()))
