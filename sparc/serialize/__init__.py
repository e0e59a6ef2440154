"""Programs as JSON and safetensors: `program_to_dict`, `program_from_dict`, and the writer and reader of tensors."""

from sparc.serialize.program import program_from_dict, program_to_dict
from sparc.serialize.tensors import TensorFile, TensorReader

__all__ = ["TensorFile", "TensorReader", "program_from_dict", "program_to_dict"]
