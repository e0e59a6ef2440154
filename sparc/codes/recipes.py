"""Passes and recipes: SPARC2xx."""

from sparc.codes.code import Code

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
    "Steps run in the order canonicalise, fold, coalesce, structural cuts, rotate, equalise, low rank, masks, round, "
    "quantize activations, correct, encode, cast: a later kind would undo or invalidate what an earlier one decided.",
    "reorder the steps",
)
SELECTOR_MATCHES_NOTHING = Code(
    "SPARC204",
    "a selector matches nothing",
    "where= is a glob over the module paths of weights, or @type for an operator type. It matched no site.",
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
    "No data= was given, so measurements use seeded random inputs: they bound nothing about real data.",
    "pass data= for figures that mean something",
)
EXTENSION_BROKEN = Code(
    "SPARC212",
    "an installed extension could not be loaded",
    "Its entry point in the group sparc.extensions raised an error, or what it returned is no valid Extension. "
    "Everything else works; what the extension registers is missing.",
    "upgrade or uninstall the distribution named, or report it to its author",
)
BAD_SELECTOR = Code(
    "SPARC213",
    "a selector is malformed",
    "where= is one pattern or several: globs over the names of modules and weights, @type for an operator type, ! to "
    "exclude.",
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
UNITS_PRUNED = Code(
    "SPARC216",
    "units were pruned",
    "The least important units of a group (neurons, channels, heads, experts) were removed from every weight that they "
    "are coupled in; the model computes something else and is smaller.",
    "measure what it costs (metric=), keep more, refit the readers (compensate=True), or train on",
)
OWN_TEXT = Code(
    "SPARC217",
    "statistics were taken on text that the model wrote itself",
    "A pass needs calibration data and no data= was given: a causal language model then writes 512 tokens. They tell "
    "which columns and layers matter; weights fitted to so few (gptq, compensate, sparsegpt) may end up worse than "
    "rounded to nearest.",
    "pass data= with text like what the model will read",
)
RANKS_APART = Code(
    "SPARC218",
    "the processes that calibrate together cannot exchange tensors",
    "Statistics are on the CPU, and the default process group has no backend for the CPU: NCCL alone has none.",
    'init_process_group("cpu:gloo,cuda:nccl")',
)
NOT_COALESCIBLE = Code(
    "SPARC220",
    "a program has no coarser level, or two programs are not of one family",
    "Coalescing merges the features and layers of repeated transformer blocks: every feature space inside them must "
    "be read and written by operators that are known to commute with merging, and have a number of units (whole "
    "heads, or features) that the width divides.",
    "canonicalize the program first, capture the model with its head (outputs keep their features), choose another "
    "width, or merge layers only (width=1)",
)
