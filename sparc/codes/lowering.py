"""Lowering: SPARC4xx."""

from sparc.codes.code import Code

NO_TRANSLATION = Code(
    "SPARC401",
    "an operator has no translation to ONNX",
    "Neither sparc's table nor torch.onnx's registry translates the operator.",
    "replace the operator in the model, or register a translation through an Extension",
)
PARITY_FAILED = Code(
    "SPARC402",
    "the exported model disagrees with the program",
    "The file was run in the target's runtime and compared with the program; the difference is above the tolerance.",
    "report it with the name of the worst site",
)
DENSE_FALLBACK = Code(
    "SPARC403",
    "a compressed weight runs as a dense operator",
    "The target has no operator for the encoding: it is decoded at load or in the graph; storage is reported as it is.",
)
CHECKER_FAILED = Code(
    "SPARC404",
    "the exported model is not valid ONNX",
    "onnx.checker or shape inference rejected the model.",
    "report it; this is a fault of sparc",
)
RUNTIME_MISSING = Code(
    "SPARC405",
    "the target's runtime is not installed",
    "Running or checking the artifact needs the runtime.",
    "install onnxruntime",
)
RUNTIME_REJECTED = Code(
    "SPARC406",
    "the runtime refused the exported model",
    "The model is valid ONNX but the runtime has no kernel for a node at the given types.",
    "choose another flavour or opset",
)
UNSUPPORTED_OPSET = Code(
    "SPARC407",
    "the opset cannot express the program",
    "The encoding needs types or operators of a later opset.",
    "raise opset=, or choose another encoding",
)
LOWERING_FAILED = Code(
    "SPARC408",
    "an extension's lowering failed",
    "A lowering that an installed extension registers for an encoding or an operator raised an error, or returned "
    "something that is no ONNX value.",
    "report it to the author of the function named; another target or encoding does without it",
)
KERNEL_FAILED = Code(
    "SPARC409",
    "a generated kernel does not compile",
    "Triton or ptxas refused the source that was generated for a site.",
    "report it with the kernel named; another encoding or target does without it",
)
TARGET_UNAVAILABLE = Code(
    "SPARC410",
    "the target cannot be used here",
    "The target `cuda` needs Triton 3.6 or later, and a GPU of compute capability 8.0 or later where none is named.",
    'install triton, or name the chip to compile for, such as target="cuda:sm_90"',
)
LEFT_TO_TORCH = Code(
    "SPARC411",
    "a compressed weight has no generated kernel",
    "No kernel template takes the product that reads it. The weight is decoded once, kept dense in memory, and the "
    "operator is torch's own.",
)
SHAPE_TOO_LARGE = Code(
    "SPARC412",
    "a tensor is larger than the kernel's indices",
    "Kernels count elements of activations in 32 bits; nothing was launched.",
    "call it with fewer tokens at a time",
)
INTERPRETED = Code(
    "SPARC413",
    "kernels run in Triton's interpreter",
    "There is no GPU of the target's kind here. The interpreter computes what the kernels compute, thousands of "
    "times slower; times in the report are the cost model's estimates.",
    "load the artifact on a machine with the GPU",
)
CHOSEN_ANEW = Code(
    "SPARC414",
    "an artifact's kernels are chosen anew",
    "What the artifact records of a product's kernels is nothing that this version of sparc would choose: it was "
    "written by another version, or altered. The cost model chooses again.",
    "compile again to have the kernels timed",
)
FLOAT_PRODUCT = Code(
    "SPARC415",
    "a quantized activation is multiplied in floats",
    "No generated kernel multiplies its codes in integers. They are decoded first, and the product is one of floats.",
)
PLAIN_CACHE_ATTENTION = Code(
    "SPARC416",
    "attention over a cache runs without the operator that appends to it in place",
    "ONNX Runtime's GroupQueryAttention is used where the graph proves that a query sees the keys up to its own place, "
    "maybe within a window, but for those that attention_mask hides. The standard Attention carries all others; "
    "their cache is copied at every step.",
)
