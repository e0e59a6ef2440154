"""Artifacts and generation: SPARC5xx."""

from sparc.codes.code import Code

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
