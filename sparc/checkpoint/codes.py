"""The diagnostic codes of compressed checkpoints, SPARC112 to SPARC116; part of the catalogue in `sparc.codes`."""

from sparc.code import Code

CHECKPOINT_CUT = Code(
    "SPARC112",
    "a checkpoint's file is cut short",
    "The file ends before what its header announces.",
    "copy or download it again",
)
CHECKPOINT_MALFORMED = Code(
    "SPARC113",
    "a checkpoint contradicts itself",
    "A count, a length, an offset or a shape is impossible, or does not fit the others.",
    "write the checkpoint again with the tool it comes from",
)
UNKNOWN_FORMAT = Code(
    "SPARC114",
    "a checkpoint's quantization or architecture is not known",
    "docs/checkpoints.md lists what is read.",
    "convert the checkpoint to a format of that list",
)
CHECKPOINT_MISMATCH = Code(
    "SPARC115",
    "a checkpoint's weights are not those of its config's architecture",
    "Weights are missing, left over, or of other shapes than those of the model that the config describes.",
    "check that the config and the weights belong together",
)
CHECKPOINT_PART_LEFT = Code(
    "SPARC116",
    "a part of a checkpoint is not carried over",
    "The weights are as they were stored; what is named is not part of the program.",
    "compare with the tool that the checkpoint comes from, or add the recipe's own step for it",
)
