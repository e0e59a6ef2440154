"""Data of encoder-decoders: an item becomes a call of each entry."""

from functools import partial
from typing import Any

import pytest
import torch

from sparc.cache import DECODER, ENCODER
from sparc.diag import CaptureError, Diagnostics
from sparc.generation.encoder_decoder import describe_entries
from sparc.generation.source import entry_calls
from sparc.samples import make_samples
from tests.generation.encoder_decoders import START, VOCABULARY, captured, sources, targets


def test_made_up_inputs_leave_what_an_encoder_made_as_it_is() -> None:
    model, program = captured("t5")
    examples, _, made = describe_entries(model)
    samples = make_samples(program, examples, None, Diagnostics(), partial(entry_calls, start=START))
    names = program.entries[DECODER].signature.input_names
    example, *others = [dict(zip(names, each, strict=True)) for each in (
        samples.example[DECODER], *samples.calibration[DECODER],
    )]  # fmt: skip
    for other in others:
        assert all(torch.equal(other[name], example[name]) for name in (*made.source, *made.inputs))
        assert not torch.equal(other["input_ids"], example["input_ids"])
    assert samples.held_out.keys() == samples.calibration.keys() == {ENCODER, DECODER}


def test_the_decoder_reads_labels_shifted_by_one() -> None:
    _, program = captured("t5")
    labels = torch.tensor([[11, 12, 13], [14, -100, -100]])
    given = sources(2)
    calls = entry_calls(program, {**given, "labels": labels}, start=START)
    assert calls[DECODER]["input_ids"].tolist() == [[START, 11, 12], [START, 14, START]]
    cross = program.run(entry=ENCODER, **given)["cross"]
    torch.testing.assert_close(calls[DECODER]["cross"], cross, rtol=0, atol=0)
    own = entry_calls(program, {**given, "decoder_input_ids": labels[:1].expand(2, -1)}, start=START)
    assert own[DECODER]["input_ids"].tolist() == [[11, 12, 13], [11, 12, 13]]


def test_without_labels_it_reads_what_it_generates() -> None:
    model, program = captured("t5")
    expected = model.generate(**sources(), max_new_tokens=15, do_sample=False)
    assert torch.equal(entry_calls(program, sources(), start=START)[DECODER]["input_ids"], expected)
    alone = sources()["input_ids"]
    whole = {"input_ids": alone, "attention_mask": torch.ones_like(alone)}
    expected = entry_calls(program, whole, start=START)[DECODER]["input_ids"]
    assert torch.equal(entry_calls(program, alone, start=START)[DECODER]["input_ids"], expected)


@pytest.mark.parametrize(
    "item",
    [
        {},
        "text",
        {"input_ids": torch.zeros(2, 3)},
        {"input_ids": torch.full((1, 2), VOCABULARY)},
        {"input_ids": targets(2, 3), "labels": [[1, 2]]},
        {"input_ids": targets(2, 3), "labels": targets(1, 3)},
        {"input_ids": targets(1, 3), "decoder_input_ids": targets(1, 65)},
    ],
)
def test_bad_data(item: Any) -> None:
    model, program = captured("bart")
    with pytest.raises(CaptureError, match="SPARC102"):
        make_samples(program, describe_entries(model)[0], [item], Diagnostics(), partial(entry_calls, start=START))
