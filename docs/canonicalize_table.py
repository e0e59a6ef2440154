"""Write the table of docs/canonicalize.md: which form was found how often in which architecture's own spelling.

Run it from the project's folder: `python -m docs.canonicalize_table`.
"""

from collections import Counter
from pathlib import Path

import transformers

from sparc.analysis.forms import find_gated, find_quick_gelu, find_rotary
from sparc.capture import capture
from sparc.pass_base import PassContext
from sparc.passes.canonicalize import Canonicalize
from sparc.program import Program
from tests.architectures import ARCHITECTURES

PAGE = Path(__file__).parent / "canonicalize.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
NAMES = (
    "bert", "llama", "gpt2", "t5", "whisper", "vit", "qwen3", "mistral", "gemma", "phi", "mixtral", "convnext", "gptj",
    "gpt_neox", "cohere", "modernbert", "bloom", "clip", "swinv2", "deberta-v2",
)  # fmt: skip
RULES = {
    "linear": ("raise_matmul_transposed", "raise_matmul", "raise_addmm", "absorb_bias"),
    "rms_norm": ("raise_rms_norm",),
    "gelu, silu": ("raise_gelu", "raise_gelu_tanh", "raise_silu"),
    "attention": ("raise_attention",),
    "grouped heads": ("raise_grouped_heads",),
    "mask proved": ("raise_causal_mask",),
    "padding mask": ("raise_indexing",),
}


def examine(name: str, attention: str) -> tuple[dict[str, int], Program, list[str]]:
    """How often each form was raised or recognised in one architecture, the canonical program, and the remarks."""
    built = ARCHITECTURES[name].build(attention)
    program = capture(built.model, dict(built.inputs), dynamic=built.dynamic)
    context = PassContext()
    Canonicalize().run(program, context)
    rules = Counter(rewrite.rule for rewrite in context.rewrites)
    found = {form: sum(rules[rule] for rule in group) for form, group in RULES.items()}
    found["rotary"] = len(find_rotary(program.graph, program.weights))
    found["gated unit"] = len(find_gated(program.graph))
    found["quick GELU"] = len(find_quick_gelu(program.graph))
    return found, program, sorted({skip.why for skip in context.skips})


def table() -> str:
    """The table in Markdown."""
    forms = [*RULES, "rotary", "gated unit", "quick GELU"]
    lines = [f"| architecture | attention | {' | '.join(forms)} | left alone |", "|" + "---|" * (len(forms) + 3)]
    for name in NAMES:
        for attention in ("eager", "sdpa"):
            try:
                found, _, remarks = examine(name, attention)
            except ValueError:  # the architecture has no such implementation
                continue
            cells = " | ".join(str(found[form] or "") for form in forms)
            lines.append(f"| {name} | {attention} | {cells} | {'; '.join(remarks)} |")
    return "\n".join(lines)


def main() -> None:
    """Replace what stands between the markers."""
    transformers.logging.set_verbosity_error()
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
