"""Capture, checkpoints and torch.compile: SPARC1xx."""

from sparc.codes.code import Code

CAPTURE_FAILED = Code(
    "SPARC101",
    "the model could not be captured",
    "torch.export could not turn the model into one graph. The line named is the last one of the model that was "
    "running: typical causes are Python control flow on tensor values, calls into libraries that are not torch, and "
    "data-dependent shapes.",
    "rewrite the named line with torch operators that do not read tensor values in Python",
)
INPUTS_MISSING = Code(
    "SPARC102",
    "example inputs are missing or do not fit the model's forward()",
    "compile() needs one example of every input that forward() requires, as a tuple or a mapping by name.",
    "pass example_inputs with the names that forward() declares",
)
MODEL_CALL_FAILED = Code(
    "SPARC103",
    "the model failed on its own example inputs",
    "Before capturing, sparc runs the model once in eager mode. It raised an error, so no tool could capture it.",
    "check that model(**example_inputs) works in eager mode",
)
DYNAMIC_DIMENSION = Code(
    "SPARC104",
    "a dynamic dimension does not exist or cannot vary",
    "dynamic= names an input or a dimension that does not exist, or the model computes something that fixes the "
    "dimension to the example's size.",
    "remove the dimension from dynamic=, or change the model's line that fixes it",
)
UNSUPPORTED_STATE = Code(
    "SPARC105",
    "the model changes its own state",
    "The captured graph writes to a buffer or an input. Programs are pure: state must be an explicit input and output.",
    "make the state an input and an output of forward(), or call model.eval()",
)
BAD_WEIGHT = Code(
    "SPARC106",
    "a weight contains NaN or Inf",
    "A weight that is not finite would poison every scale and every check.",
    "repair or retrain the weight",
)
RANGE_NARROWED = Code(
    "SPARC107",
    "a dynamic dimension has a narrower range than asked for",
    "The model itself limits the dimension (a table of positions, for example).",
    "keep inputs within the stated range",
)
EXAMPLE_TILED = Code(
    "SPARC108",
    "an example of size 1 was repeated to capture a dynamic dimension",
    "torch.export treats size 1 as fixed, so the example was repeated along the dimension for tracing only.",
    "none needed; give an example of size 2 or more to silence this",
)
OUTPUT_STRUCTURE = Code(
    "SPARC109",
    "the model's outputs cannot be described",
    "Outputs must be tensors, numbers, or nested tuples, lists, mappings and registered dataclasses of them.",
    "return tensors in standard containers",
)
LOAD_FAILED = Code(
    "SPARC110",
    "the model named on the command line could not be loaded",
    "PATH_OR_IMPORT is a function pkg.mod:fn that returns compile's arguments, a Hugging Face folder, a .gguf "
    "file, or a .pt2 file with --trust.",
    "check the path or the import name",
)
UNSUPPORTED_OPERATOR = Code(
    "SPARC111",
    "the captured graph contains an operator that programs cannot hold",
    "Control flow operators (cond, while_loop, scan) and operators on devices other than the CPU's are not supported.",
    "replace the named line with ordinary tensor operators",
)
NO_CACHE = Code(
    "SPARC112",
    "the model cannot generate with a cache",
    "The task text-generation needs a causal language model, or an encoder-decoder that reads tokens, of transformers, "
    "whose forward() takes past_key_values and fills a DynamicCache of keys and values [batch, heads, length, size].",
    "compile it without task=, or wrap it in a module that takes and returns such a cache",
)
UNKNOWN_TASK = Code(
    "SPARC113", "an unknown task", "The task is none that sparc knows.", 'the only task is "text-generation"'
)
NEEDS_GRADIENTS = Code(
    "SPARC114",
    "a fragment of torch.compile needs gradients",
    "Compressed weights carry no gradients, so what has to compute them runs in eager torch.",
    "call the model under torch.no_grad() or torch.inference_mode(), or call model.requires_grad_(False)",
)
WEIGHTS_CHANGED = Code(
    "SPARC115",
    "the weights of a fragment of torch.compile change too often",
    "A weight that is written to or replaced is compressed anew; after too many times the fragment runs eagerly.",
    "compile the model when it is trained; torch.compiler.reset() starts anew",
)
CHECKPOINT_CUT = Code(
    "SPARC116",
    "a checkpoint's file is cut short",
    "The file ends before what its header announces.",
    "copy or download it again",
)
CHECKPOINT_MALFORMED = Code(
    "SPARC117",
    "a checkpoint contradicts itself",
    "A count, a length, an offset or a shape is impossible, or does not fit the others.",
    "write the checkpoint again with the tool it comes from",
)
UNKNOWN_FORMAT = Code(
    "SPARC118",
    "a checkpoint's quantization or architecture is not known",
    "docs/checkpoints.md lists what is read.",
    "convert the checkpoint to a format of that list",
)
CHECKPOINT_MISMATCH = Code(
    "SPARC119",
    "a checkpoint's weights are not those of its config's architecture",
    "Weights are missing, left over, or of other shapes than those of the model that the config describes.",
    "check that the config and the weights belong together",
)
CHECKPOINT_PART_LEFT = Code(
    "SPARC120",
    "a part of a checkpoint is not carried over",
    "The weights are as they were stored; what is named is not part of the program.",
    "compare with the tool that the checkpoint comes from, or add the recipe's own step for it",
)
DATA_CUT = Code(
    "SPARC121",
    "data= holds more items than calibration reads",
    "An iterable may be endless, so reading stops at a number of items. The rest is neither used nor looked at.",
    "give the items that matter first, or larger batches",
)
