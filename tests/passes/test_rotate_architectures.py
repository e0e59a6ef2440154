"""Which architectures' residual streams rotate, and why the others do not."""

from dataclasses import dataclass

import pytest
import torch

from sparc.capture import capture
from sparc.driver import Driver
from sparc.ledger import PassRow
from sparc.pass_base import Samples
from sparc.passes.canonicalize import Canonicalize
from sparc.passes.rotate import Rotate
from tests.architectures import ARCHITECTURES

POST_NORM = "it is written by rms_norm, which cannot take a rotation over"
EMBEDDING_NORM = "it is written by layer_norm, which cannot take a rotation over"
EXPERTS = "it is added to what reshape writes"
LEAVES = "it is read by the program's output"


@dataclass(frozen=True)
class Outcome:
    """What rotation makes of an architecture.

    Args:
        heads: how many attentions (of two layers) keep values apart for each head between linear layers.
        tied: whether the head shares its weight with the embedding.
        why: why its residual stream stays.
    """

    heads: int = 2
    tied: bool = False
    why: str = ""


OUTCOMES = {
    "llama": Outcome(),
    "mistral": Outcome(),
    "qwen2": Outcome(),
    "qwen3": Outcome(),
    "phi": Outcome(),
    "phi3": Outcome(),
    "stablelm": Outcome(),
    "smollm3": Outcome(tied=True),
    "glm": Outcome(),
    "granite": Outcome(),
    "starcoder2": Outcome(tied=True),
    "gptj": Outcome(),
    "gpt2": Outcome(tied=True),
    "gpt_neo": Outcome(tied=True),
    "opt": Outcome(tied=True),
    "gemma": Outcome(tied=True),
    "cohere": Outcome(tied=True),
    "mpt": Outcome(tied=True),
    "gpt_neox": Outcome(heads=0),  # queries, keys and values of one head lie side by side
    "falcon": Outcome(heads=0, tied=True),
    "mamba": Outcome(heads=0, tied=True),
    "gemma2": Outcome(heads=0, why=POST_NORM),  # capped scores are no scaled dot-product attention
    "gemma3_text": Outcome(why=POST_NORM),
    "olmo2": Outcome(why=POST_NORM),
    "bloom": Outcome(heads=0, why=EMBEDDING_NORM),
    "bert": Outcome(why=EMBEDDING_NORM),
    "mixtral": Outcome(why=EXPERTS),
    "vit": Outcome(why=LEAVES),
}
QUICK = ("llama", "gpt2", "gemma2")


def rotate(name: str, *steps: Rotate) -> list[PassRow]:
    """The rows of steps, each of which is run on the same canonical program."""
    built = ARCHITECTURES[name].build().enlivened()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in built.model.parameters():
            if parameter.ndim == 1:  # gains of one would rotate whatever became of them
                parameter.add_(0.3 * torch.randn_like(parameter))
    program = capture(built.model, dict(built.inputs), dynamic=built.dynamic)
    samples = Samples({"forward": [program.main.signature.bind((), dict(built.inputs))]})
    canonical = Driver(program, samples)
    canonical.run(Canonicalize(), remarks=False)
    return [Driver(canonical.program, samples, verify="full").run(step) for step in steps]


@pytest.mark.parametrize(
    "name", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in OUTCOMES]
)
def test_outcome(name: str) -> None:
    outcome = OUTCOMES[name]
    default, untied = rotate(name, Rotate(heads=False), Rotate(untie=True))
    reasons = [skip.why for skip in default.skips]
    assert default.matches == (0 if outcome.tied or outcome.why else 1), reasons
    if outcome.tied:
        assert any("is tied; untie=True would store it twice" in why for why in reasons)
    if outcome.why:
        assert any(outcome.why in why for why in reasons)
    assert untied.matches == (0 if outcome.why else 1) + outcome.heads, [skip.why for skip in untied.skips]
    for row in (default, untied):
        if row.matches:
            assert row.measured["end to end, float64"] < 1e-9


def test_count() -> None:
    assert sum(not outcome.why for outcome in OUTCOMES.values()) == 21
