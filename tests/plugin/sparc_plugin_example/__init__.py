"""An extension of sparc as a third party writes it: it uses nothing but sparc's public modules."""

from typing import Any

from sparc.recipe import Recipe, Step
from sparc.registry import Extension
from sparc_plugin_example.onnx_lowering import looked_up
from sparc_plugin_example.powers_of_two import PowersOfTwo
from sparc_plugin_example.repeated_relu import drop_repeated_relu


def triton_weight(*given: Any) -> Any:
    """The lowering for the target `cuda`; imported when it is asked for, since it needs Triton."""
    from sparc_plugin_example.triton_lowering import PowersOfTwoWeight

    return PowersOfTwoWeight(*given)


def extension() -> Extension:
    """What the entry point in `sparc.extensions` names."""
    return Extension(
        name="example",
        passes=(drop_repeated_relu,),
        encodings=(PowersOfTwo,),
        lowerings={("onnx", "PowersOfTwo"): looked_up, ("cuda", "PowersOfTwo"): triton_weight},
        recipes={"example": Recipe((Step(drop_repeated_relu),), name="example")},
    )
