"""Where no data is given, a language model is calibrated on what it writes itself."""

import pytest
import torch

import sparc
from sparc import codes
from sparc.capture import capture
from sparc.diag import Diagnostics
from sparc.generation.own_text import own_text
from sparc.samples import make_samples
from tests.generation.decoders import decoder


def test_tokens_are_drawn_from_the_models_distribution() -> None:
    """Teacher-forced, the model finds its own tokens likelier than any others; random tokens it does not."""
    model = decoder("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # type: ignore[operator,union-attr]
    tokens = torch.cat(own_text(model))
    assert tokens.shape == (8, 64)
    assert torch.equal(tokens, torch.cat(own_text(model)))
    with torch.no_grad():
        chances = model(input_ids=tokens).logits[:, :-1].log_softmax(-1)
    found = chances.gather(-1, tokens[:, 1:, None]).mean()
    entropy = (chances.exp() * chances).sum(-1).mean()
    assert abs(float(found - entropy)) < 0.15
    other = chances.gather(-1, tokens.roll(1, 0)[:, 1:, None]).mean()
    assert float(other) < float(found) - 0.5


def test_it_is_calibrated_on_but_not_checked_on() -> None:
    ids, own, given = torch.tensor([1, 2]), torch.tensor([3, 4]), torch.tensor([5, 6])
    program = capture(torch.nn.Embedding(9, 4), (ids,))

    def calibration(data: list[torch.Tensor] | None) -> list[int]:
        said = Diagnostics()
        samples = make_samples(program, {"forward": (ids,)}, data, said, written=lambda: [own])
        assert (codes.OWN_TEXT in [each.code for each in said]) == (data is None)
        assert not any(torch.equal(flat[0], own) for flat in samples.held_out["forward"])
        return [int(flat[0][0]) for flat in samples.calibration["forward"]]

    assert calibration(None) == [3]
    assert calibration([given]) == [5]


@pytest.mark.slow
def test_it_is_written_only_where_statistics_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def written(model: torch.nn.Module) -> list[torch.Tensor]:
        asked.append(model)
        return own_text(model)

    monkeypatch.setattr("sparc.generation.task.own_text", written)
    model = decoder("llama")
    for recipe, count in (("w8", 0), ("w4", 1)):
        sparc.compile(model, task="text-generation", recipe=recipe, target="reference", measure=False)
        assert len(asked) == count
