"""A soft prompt becomes constant keys and values; where the prompt is not independent of what follows, it stays."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparc.capture import capture
from sparc.diag import SparcError
from sparc.driver import Driver
from sparc.ledger import PassRow
from sparc.pass_base import PassContext, Samples
from sparc.passes.canonicalize import Canonicalize
from sparc.passes.fold import FoldPrompt
from sparc.passes.fold.prompt_attention import BIDIRECTIONAL, PromptedSequence
from sparc.passes.fold.sequence import Sequence, Split
from sparc.program import Program
from sparc.testing import assert_pass
from tests.passes.prompted import PLACES, Decoder, Masked, Plain, Tuned, language_model

linear = torch.ops.aten.linear.default
IDS = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def fold(
    model: nn.Module, inputs: dict[str, Tensor] | None = None, step: FoldPrompt | None = None, *, static: bool = False
) -> tuple[Program, Program, PassRow]:
    """The program before and after, and the ledger's row; the driver checks the pass."""
    inputs = {"ids": IDS} if inputs is None else inputs
    dynamic = None if static else {name: {0: "batch", 1: "length"} for name in inputs}
    captured = capture(model.eval(), inputs, dynamic=dynamic)
    driver = Driver(captured, Samples({"forward": [list(inputs.values())]}), verify="full")
    driver.run(Canonicalize())
    before = driver.program
    row = driver.run(step or FoldPrompt(limit=1.0))
    driver.program.graph.lint()
    return before, driver.program, row


def reasons(row: PassRow) -> list[str]:
    """Why candidates were left alone."""
    return [skip.why for skip in row.skips]


def rows_of_the_prompt(program: Program) -> list[str]:
    """The linear layers whose input has the prompt's places."""
    found = []
    for node in program.graph.nodes:
        if node.target is linear:
            size = str(node.args[0].meta["val"].shape[1])
            found += [node.name] if size.isdigit() or "+" in size else []
    return found


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama, plain": lambda: Plain(language_model("llama"), 32),
    "llama, one key for all heads": lambda: Plain(language_model("llama", 1), 32),
    "llama, peft": lambda: Tuned(language_model("llama")),
    "gpt2, plain": lambda: Plain(language_model("gpt2"), 32),
    "gpt2, peft": lambda: Tuned(language_model("gpt2")),
}
QUICK = ("llama, one key for all heads", "gpt2, peft")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_language_models(name: str) -> None:
    torch.manual_seed(0)
    before, after, row = fold(MODELS[name]().double(), {"input_ids": IDS})
    assert row.matches == 1
    assert not row.skips
    assert row.measured["end to end, float64"] < 1e-12
    assert rows_of_the_prompt(before)
    assert not rows_of_the_prompt(after)
    stored = {weight: tuple(after.weights[weight].shape) for weight in after.weights if weight not in before.weights}
    heads = 1 if "one key" in name else 4
    assert sum(shape == (1, heads, PLACES, 8) for shape in stored.values()) == 4
    assert len(stored) == (5 if "peft" in name else 4)  # PEFT returns the logits at the prompt
    gone = [before.weights[weight] for weight in before.weights if weight not in after.weights]
    assert (PLACES, 32) in [tuple(tensor.shape) for tensor in gone]
    ids = torch.randint(0, 96, (3, 7))
    for _ in range(4):
        old, new = (program.run(input_ids=ids, wide=True) for program in (before, after))
        torch.testing.assert_close(new, old, rtol=1e-9, atol=1e-9)
        assert torch.equal(new[:, -1].argmax(-1), old[:, -1].argmax(-1))
        ids = torch.cat([ids, new[:, -1:].argmax(-1)], 1)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_padding_mask_of_peft() -> None:
    torch.manual_seed(0)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    before, after, row = fold(Tuned(language_model("llama")).double(), inputs)
    assert row.matches == 1
    assert not row.skips
    assert not rows_of_the_prompt(after)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 4:] = 0
    ids = torch.randint(0, 96, (3, 7))
    old, new = (program.run(input_ids=ids, attention_mask=mask, wide=True) for program in (before, after))
    torch.testing.assert_close(new, old, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["mistral", "glm"])
def test_windows_and_rotated_pairs(name: str) -> None:
    """A window beside the causal mask; rotary positions by pairs."""
    torch.manual_seed(0)
    before, after, row = fold(Plain(language_model(name), 32).double(), {"input_ids": IDS})
    assert row.matches == 1
    assert not row.skips
    assert not rows_of_the_prompt(after)
    ids = torch.randint(0, 20, (3, 17))
    old, new = (program.run(input_ids=ids, wide=True) for program in (before, after))
    torch.testing.assert_close(new, old, rtol=1e-9, atol=1e-9)


class Ends(Decoder):
    """Two layers, and what is made of the last hidden states."""

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__(2)
        self.function = end

    def end(self, x: Tensor) -> Tensor:
        return self.function(x)


ENDS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "behind the prompt": (lambda x: x[:, PLACES:], True),
    "further behind": (lambda x: x[:, PLACES + 1 :], True),
    "the last place": (lambda x: x[:, -1], True),
    "the last places": (lambda x: x[:, -2:], True),
    "a place of the text": (lambda x: x[:, PLACES], True),
    "everything": (lambda x: x * 2.0, False),
    "from within the prompt": (lambda x: x[:, 1:], False),
    "more places than the text has": (lambda x: x[:, -4:], False),
    "the size": (lambda x: x[:, PLACES:] * x.shape[1], True),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_reads_the_sequence(name: str) -> None:
    function, alone = ENDS[name]
    before, after, row = fold(Ends(function))
    assert row.matches == 1
    assert not rows_of_the_prompt(after)
    assert row.measured["end to end, float64"] < 1e-9
    assert len(after.weights) - len(before.weights) == 4 - 1 + (not alone)  # keys and values for the prompt
    other = torch.randint(0, 20, (3, 6))
    torch.testing.assert_close(after.run(ids=other), before.run(ids=other))


def test_fixed_sizes_and_a_second_run() -> None:
    before, after, row = fold(Decoder(2), static=True)
    assert row.matches == 1
    torch.testing.assert_close(after.run(ids=IDS), before.run(ids=IDS))
    driver = Driver(after, Samples({"forward": [[IDS]]}))
    again = driver.run(FoldPrompt(limit=1.0))
    assert again.matches == 0
    assert not again.skips


def test_the_kit() -> None:
    assert_pass(FoldPrompt(limit=1.0), Decoder(2), {"ids": IDS}, dynamic={"ids": {0: "batch", 1: "length"}})


def test_half_precision_is_rounded_once() -> None:
    torch.manual_seed(0)
    model = Decoder(2).to(torch.bfloat16)
    _, after, row = fold(model)
    assert row.measured["end to end, float64"] < 1e-9
    key = after.weights["prompt_key"]
    assert key.dtype == torch.bfloat16
    wide = model.double().project[0](model.prompt).chunk(3, -1)[1]
    assert torch.equal(key[0].transpose(0, 1).reshape(PLACES, -1), wide.to(torch.bfloat16))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_positions_of_fixed_sizes(name: str) -> None:
    torch.manual_seed(0)
    before, after, row = fold(Plain(language_model(name), 32), {"input_ids": IDS}, static=True)
    assert row.matches == 1
    torch.testing.assert_close(after.run(input_ids=IDS), before.run(input_ids=IDS), rtol=1e-4, atol=1e-5)
    sizes = [node.args[0].meta["val"].shape[1] for node in after.graph.nodes if node.target is linear]
    assert set(sizes) == {5}


class Deep(Decoder):
    """Every layer has a prompt of its own (visual prompt tuning, deep): it takes the other's place, or stands first."""

    def __init__(self, *, replaces: bool) -> None:
        super().__init__(2)
        self.replaces, self.other = replaces, nn.Parameter(torch.randn(PLACES, 8))

    def between(self, x: Tensor) -> Tensor:
        return torch.cat([self.other.expand(x.shape[0], -1, -1), x[:, PLACES:] if self.replaces else x], 1)


def test_a_prompt_for_each_layer() -> None:
    before, after, row = fold(Deep(replaces=True))
    assert row.matches == 1
    assert not rows_of_the_prompt(after)
    other = torch.randint(0, 20, (3, 6))
    torch.testing.assert_close(after.run(ids=other), before.run(ids=other))


def test_a_prompt_before_the_prompt() -> None:
    before, after, row = fold(Deep(replaces=False))
    assert row.matches == 2
    other = torch.randint(0, 20, (3, 6))
    torch.testing.assert_close(after.run(ids=other), before.run(ids=other))


class Between(Decoder):
    """Something between two layers that works along the sequence."""

    def between(self, x: Tensor) -> Tensor:
        return torch.cumsum(x, 1)


def test_behind_an_unknown_operator_the_sequence_is_whole_again() -> None:
    before, after, row = fold(Between(2))
    assert row.matches == 1
    assert len(rows_of_the_prompt(after)) == 2 < len(rows_of_the_prompt(before))
    other = torch.randint(0, 20, (3, 6))
    torch.testing.assert_close(after.run(ids=other), before.run(ids=other))


@pytest.mark.parametrize("form", ["causal", "additive"])
def test_masks_that_are_understood(form: str) -> None:
    _, after, row = fold(Masked(form), {"ids": IDS, "mask": MASK.float()})
    assert row.matches == 1
    assert not rows_of_the_prompt(after)


# what is left alone --------------------------------------------------------------------------------------------------
class Positioned(Decoder):
    """Positions of the whole sequence are given."""

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:  # type: ignore[override]
        return self.end(self.attend(self.start(ids) + self.table(positions), 0))


class Summed(Decoder):
    """An operator along the sequence comes first."""

    def start(self, ids: Tensor) -> Tensor:
        return torch.cumsum(super().start(ids), 1)


class Dependent(Decoder):
    """The prompt is made from the input."""

    def start(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return torch.cat([self.prompt + x.mean(1, keepdim=True), x], 1)


class Crossed(Decoder):
    """Keys and values are given: they do not begin with the prompt."""

    def forward(self, ids: Tensor, given: Tensor) -> Tensor:  # type: ignore[override]
        x = self.start(ids)[:, None]
        return self.end((x + nn.functional.scaled_dot_product_attention(x, given, given, is_causal=True))[:, 0])


def _left_alone(model: nn.Module, inputs: dict[str, Tensor] | None, step: FoldPrompt | None = None) -> list[str]:
    before, after, row = fold(model, inputs, step)
    assert row.matches == 0
    assert after.text() == before.text()
    return reasons(row)


def test_a_bidirectional_encoder_is_left_alone() -> None:
    assert _left_alone(Decoder(causal=False), None) == [BIDIRECTIONAL]
    assert _left_alone(Masked("padding"), {"ids": IDS, "mask": MASK.float()}) == [BIDIRECTIONAL]


def test_an_unknown_mask_is_left_alone() -> None:
    assert _left_alone(Masked("unknown"), {"ids": IDS, "mask": MASK.float()}) == [
        "what add hides from the prompt is not known"
    ]


def test_keys_from_elsewhere_are_left_alone() -> None:
    given = torch.randn(2, 1, 5, 8)
    model = Crossed()
    captured = capture(model.eval(), {"ids": IDS, "given": given})
    row = Driver(captured, Samples({"forward": [[IDS, given]]})).run(FoldPrompt(limit=1.0))
    assert row.matches == 0
    assert reasons(row) == ["its keys and values do not begin with the prompt, or depend on the inputs there"]


def test_operators_along_the_sequence_are_left_alone() -> None:
    assert _left_alone(Summed(), None) == ["no attention is reached before cumsum"]
    positions = torch.arange(5 + PLACES).expand(2, -1)
    dynamic = {"ids": {0: "batch"}, "positions": {0: "batch"}}
    captured = capture(Positioned().eval(), {"ids": IDS, "positions": positions}, dynamic=dynamic)
    row = Driver(captured, Samples({"forward": [[IDS, positions]]})).run(FoldPrompt(limit=1.0))
    assert row.matches == 0
    assert reasons(row) == ["no attention is reached before add"]


def test_a_computed_prompt_is_none() -> None:
    assert _left_alone(Dependent(), None) == []


def test_the_limit() -> None:
    (why,) = _left_alone(Decoder(), None, FoldPrompt(limit=0.01))
    assert why == "its keys and values would take 192 bytes, more than 0.01 of the program's"


# wrong twins ---------------------------------------------------------------------------------------------------------
def _swapped(self: Sequence, node: Any, before: Any, name: str = "prompt") -> Any:
    return WHOLE(self, before.args[2] if name == "prompt_key" else node, before, name)


def _unshifted(self: Sequence, node: Any) -> Split | None:
    found = ARANGE(self, node)
    if found is None:
        return None
    rest = self.call(node, torch.ops.aten.sub.Tensor, found.rest, self.count)
    return Split(0, found.front, rest, False)


def _too_late(self: Sequence, node: Any, arguments: Any, q: Split) -> Any:
    mask = MASKED(self, node, arguments, q)
    return self.call(node, torch.ops.aten.tril.default, mask, self.count - 1)


WHOLE, ARANGE, MASKED = Sequence.whole, Sequence._arange, PromptedSequence._rest_mask


@pytest.fixture(scope="module")
def prompted() -> Program:
    """A language model with a prompt in front, in canonical form."""
    torch.manual_seed(0)
    model = Plain(language_model("gpt2"), 32).eval()
    program = capture(model, {"input_ids": IDS}, dynamic={"input_ids": {0: "batch", 1: "length"}})
    Canonicalize().run(program, PassContext())
    return program


@pytest.mark.parametrize(("method", "twin"), [("whole", _swapped), ("_arange", _unshifted), ("_rest_mask", _too_late)])
def test_wrong_twins_do_not_get_through(
    method: str, twin: Any, prompted: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PromptedSequence, method, twin)
    with pytest.raises(SparcError, match="SPARC301"):
        Driver(prompted.clone(), Samples({"forward": [[IDS]]}), verify="full").run(FoldPrompt(limit=1.0))
