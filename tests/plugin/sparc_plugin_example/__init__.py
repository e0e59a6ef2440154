"""An extension of sparc as a third party writes it: it uses nothing but sparc's public modules."""

from sparc.recipe import Recipe, Step
from sparc.registry import Extension
from sparc_plugin_example.onnx_lowering import looked_up
from sparc_plugin_example.powers_of_two import PowersOfTwo
from sparc_plugin_example.repeated_relu import drop_repeated_relu


def extension() -> Extension:
    """What the entry point in `sparc.extensions` names."""
    return Extension(
        name="example",
        passes=(drop_repeated_relu,),
        encodings=(PowersOfTwo,),
        lowerings={("onnx", "PowersOfTwo"): looked_up},
        recipes={"example": Recipe((Step(drop_repeated_relu),), name="example")},
    )
