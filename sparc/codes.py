"""The catalogue of diagnostic codes: one entry each, stable for ever; `docs/diagnostics.md` is generated from it.

1xx capture, 2xx passes and recipes, 3xx verification, 4xx lowering, 5xx artifacts.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Code:
    """A stable diagnostic code: its id, a one-line title, what it means, and what to do about it."""

    id: str
    title: str
    meaning: str = ""
    hint: str = ""

    def __str__(self) -> str:
        return self.id


# 1xx: capture -------------------------------------------------------------------------------------------------------
CAPTURE_FAILED = Code(
    "SPARC101",
    "the model could not be captured",
    "torch.export could not turn the model into one graph. The line named is the last one of the model that was "
    "running: "
    "typical causes are Python control flow on tensor values, calls into libraries that are not torch, and "
    "data-dependent "
    "shapes.",
    "rewrite the named line with torch operators that do not read tensor values in Python",
)
INPUTS_MISSING = Code(
    "SPARC102",
    "example inputs are missing or do not fit the model's forward()",
    "compile() needs one example of every input that forward() requires, as a tuple (positional) or a mapping (by "
    "name).",
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
    "dimension to "
    "the example's size.",
    "remove the dimension from dynamic=, or change the model's line that fixes it",
)
UNSUPPORTED_STATE = Code(
    "SPARC105",
    "the model changes its own state",
    "The captured graph writes to a buffer or an input. sparc programs are pure: state must be an explicit input "
    "and output.",
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
    "PATH_OR_IMPORT is a function pkg.mod:fn that returns compile's arguments, a Hugging Face folder, or a .pt2 "
    "file with "
    "--trust.",
    "check the path or the import name",
)
UNSUPPORTED_OPERATOR = Code(
    "SPARC111",
    "the captured graph contains an operator that programs cannot hold",
    "Control flow operators (cond, while_loop, scan) and operators on devices other than the CPU's are not "
    "supported yet.",
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

# 2xx: passes and recipes --------------------------------------------------------------------------------------------
UNKNOWN_NAME = Code(
    "SPARC201",
    "an unknown pass, encoding, recipe or target",
    "The name is not registered by sparc or by an installed extension.",
    "see `sparc passes` for what is registered",
)
BAD_RECIPE = Code(
    "SPARC202",
    "a recipe cannot be read",
    "A recipe is TOML (or Python objects) with a list of steps; each names a registered pass and its options.",
    "see docs/recipes.md",
)
ILLEGAL_ORDER = Code(
    "SPARC203",
    "the recipe's steps are in an illegal order",
    "Steps run in the order canonicalise, fold, coalesce, structural cuts, rotate, equalise, low rank, masks, "
    "round, quantize "
    "activations, correct, encode, cast: a later kind would undo or invalidate what an earlier one decided.",
    "reorder the steps",
)
SELECTOR_MATCHES_NOTHING = Code(
    "SPARC204",
    "a selector matches nothing",
    "where= is a glob over the module paths of weights, or @type for an operator type. It matched no site of this "
    "model.",
    "compare it with the names in `sparc inspect`",
)
NOT_MATCHED = Code(
    "SPARC205",
    "a site was skipped by a pass",
    "The pass's pattern or condition did not hold here; the reason is given.",
)
GRID_DROPPED = Code(
    "SPARC206",
    "a weight's grid was dropped",
    "The weight was written by a pass that does not keep its rounding grid, so it must be rounded again before it "
    "can be encoded.",
    "put the pass before round in the recipe",
)
PASS_FAILED = Code(
    "SPARC207",
    "a pass raised an error",
    "The pass is at fault, not the model. The program before the pass is unharmed.",
    "report it to the author of the pass with the text of the diagnostic",
)
DATA_NEEDED = Code(
    "SPARC208",
    "a pass needs calibration data",
    "The pass measures activations, and compile() was called without data=.",
    "pass data=, an iterable of example inputs",
)
BAD_OPTION = Code(
    "SPARC209",
    "an option of a pass or an encoding is wrong",
    "The value is out of range or of the wrong type.",
    "see the options in `sparc passes`",
)
DUPLICATE_EXTENSION = Code(
    "SPARC210",
    "two extensions register the same name",
    "Names of passes, encodings, recipes and targets are unique.",
    "uninstall one of the extensions, or rename",
)
SYNTHETIC_DATA = Code(
    "SPARC211",
    "checks ran on synthetic inputs",
    "No data= was given, so measurements use seeded random inputs of the example's shapes. They bound nothing "
    "about real data.",
    "pass data= for figures that mean something",
)
EXTENSION_BROKEN = Code(
    "SPARC212",
    "an installed extension could not be loaded",
    "Its entry point in the group sparc.extensions raised an error, or what it returned is no valid Extension. "
    "Everything else works; "
    "what the extension registers is missing.",
    "upgrade or uninstall the distribution named, or report it to its author",
)
BAD_SELECTOR = Code(
    "SPARC213",
    "a selector is malformed",
    "where= is one pattern or several: globs over the names of modules and weights, @type for an operator type, ! "
    "to exclude.",
    "see the selectors in docs/recipes.md",
)
UNITS_REMOVED = Code(
    "SPARC214",
    "superfluous units were removed",
    "Units of a layer that equal others, are constant or are never read were removed; what reads the layer was "
    "changed so that it computes the same.",
)
BLOCKS_REMOVED = Code(
    "SPARC215",
    "a repeated block was removed",
    "A repetition of a repeated block was bypassed, or merged into the one before it; the model computes something "
    "else and is smaller. The remark gives the number it was chosen by.",
    "measure what it costs (metric=), or train on",
)
NOT_COALESCIBLE = Code(
    "SPARC220",
    "a program has no coarser level, or two programs are not of one family",
    "Coalescing merges the features and layers of repeated transformer blocks: every feature space inside them must be "
    "read and written by operators that are known to commute with merging, and have a number of units (whole heads, or "
    "features) that the width divides.",
    "canonicalize the program first, capture the model with its head (outputs keep their features), choose another "
    "width, or merge layers only (width=1)",
)

# 3xx: verification --------------------------------------------------------------------------------------------------
CONTRACT_BROKEN = Code(
    "SPARC301",
    "a rewrite broke its contract",
    "An Exact or Bounded pass changed what the program computes. The match named is the guilty one.",
    "report it to the author of the pass; compile without the pass meanwhile",
)
RESTORED = Code(
    "SPARC302",
    "a site fell below its floor and was restored",
    "An Approximate pass changed the site's output by more than its floor allows, so the original weight was put back.",
    "raise the bits, lower the floor, or accept the site in higher precision",
)
METRIC_FAILED = Code(
    "SPARC303",
    "the end-to-end metric failed",
    "The user's metric on held-out data is below what was asked for.",
    "use a milder recipe, or exclude the worst sites listed in the report",
)
TYPES_CHANGED = Code(
    "SPARC304",
    "a pass changed a shape or dtype it must keep",
    "Every value that survives a pass keeps its shape and dtype.",
    "report it to the author of the pass",
)
NOT_FINITE = Code(
    "SPARC305",
    "the program produced NaN or Inf",
    "An intermediate value overflowed on the inputs of the check.",
    "check the inputs; if eager is finite, report it to the author of the pass",
)

# 4xx: lowering ------------------------------------------------------------------------------------------------------
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
    "The target has no operator for this encoding. The weight is decoded at load or in the graph; storage is "
    "reported as it is.",
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
    "There is no GPU of the target's kind here. The interpreter computes what the kernels compute, thousands of times "
    "slower; times in the report are the cost model's estimates.",
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

# 5xx: artifacts -----------------------------------------------------------------------------------------------------
ARTIFACT_MISSING_FILE = Code(
    "SPARC501", "a file of the artifact is missing", "The folder is incomplete.", "copy it again"
)
ARTIFACT_ALTERED = Code(
    "SPARC502",
    "a file of the artifact was altered or truncated",
    "Its hash or size is not what the manifest says.",
    "copy it again, or compile again",
)
ARTIFACT_MALFORMED = Code(
    "SPARC503",
    "the artifact cannot be read",
    "A file is not in the expected format, or exceeds the limits on size and depth.",
    "compile again with this version of sparc",
)
PATH_ESCAPES = Code(
    "SPARC504",
    "a path inside the artifact leaves its folder",
    "Files are only read from the artifact's own folder; links are refused.",
    "do not load this artifact",
)
WRITE_FAILED = Code(
    "SPARC505",
    "the artifact could not be written",
    "The disk is full or not writable. Nothing was left behind.",
    "free some space and save again",
)
CALL_MISMATCH = Code(
    "SPARC506",
    "the artifact was called with inputs that do not fit",
    "Inputs must have the names, dtypes and ranks of the example inputs; frozen values must be equal.",
    "call it as the model was called in example_inputs",
)
VERSION_UNKNOWN = Code(
    "SPARC507",
    "the artifact was written by another format version",
    "This version of sparc does not know the format.",
    "use the sparc version named in the manifest",
)
UNWRITABLE = Code(
    "SPARC508",
    "a program holds something that cannot be stored",
    "Programs are stored as data: registered functional operators, plain arguments, dense tensors. Nothing is pickled.",
    "replace the operator or argument named, or register the operator with torch.library",
)
NOT_EXPORTABLE = Code(
    "SPARC509",
    "the target does not export ONNX",
    "Only artifacts of the onnx targets hold an ONNX model.",
    'compile with target="onnx"',
)
OUTPUTS_DIFFER = Code(
    "SPARC510",
    "two models differ by more than the tolerance",
    "`sparc compare --tolerance` found an output that needs a larger one.",
    "look at the layers with --layers: the worst come first",
)
CACHE_FULL = Code(
    "SPARC511",
    "the sequence does not fit into the cache",
    "Prompt and new tokens together are longer than the model's positions, or than the cache was made for.",
    "shorten the prompt, or ask for fewer new tokens",
)
BAD_PROMPT = Code(
    "SPARC512",
    "the prompt cannot be continued",
    "A prompt is int64 tokens [batch, seq] with at least one visible token in every row.",
    "check the tokens and the attention mask",
)
NO_GENERATION = Code(
    "SPARC513",
    "the artifact does not generate",
    "It was compiled without a cache, or what generating needs (a tokenizer, for a prompt as text) is missing.",
    'compile it with task="text-generation"',
)


def catalogue() -> dict[str, Code]:
    """Every code by its id, in order."""
    codes = [value for value in globals().values() if isinstance(value, Code)]
    return {code.id: code for code in sorted(codes, key=lambda code: code.id)}
