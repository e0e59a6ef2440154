"""Programs that have no coarser level: every reason."""

import pytest
import torch

import sparc
from sparc.capture import capture, capture_entries
from sparc.diag import PassError
from sparc.encoding.int_grid import IntGrid
from sparc.pass_base import PassContext
from sparc.passes.encode import Encode
from sparc.passes.round import Round
from tests.passes.level_models import IDS, Decoder, Layer, decoder


class Sorted(Layer):
    def forward(self, x):
        return super().forward(x.sort(-1).values)


class Constant(Layer):
    def __init__(self, shift):
        super().__init__()
        self.register_buffer("shift", torch.tensor([shift] * 6))

    def forward(self, x):
        return super().forward(x[:, self.shift])


class NoHead(Decoder):
    def forward(self, ids):
        return self.layers[1](self.layers[0](self.tokens(ids)))


class Penalty(Decoder):
    def forward(self, ids):
        return super().forward(ids) + self.layers[1].up.weight.sum()


def program_of(model):
    torch.manual_seed(0)
    return capture(model.eval(), (IDS,))


REFUSALS = {
    "one layer": (lambda: decoder(1), {}, "no block is repeated"),
    "heads": (decoder, {"width": 3}, "they make 2 units"),
    "half a head": (decoder, {"width": 4}, "they make 2 units"),
    "sorted": (lambda: program_of(Decoder(Sorted(), Sorted())), {}, "sort reads or writes it"),
    "no head": (lambda: program_of(NoHead(Layer(), Layer())), {}, "it is an output of the program"),
    "states": (lambda: decoder(states=True), {"width": 1}, "read outside its layer"),
    "constants": (lambda: program_of(Decoder(Constant(1), Constant(2))), {"width": 1}, "differs between layers"),
    "read elsewhere": (lambda: program_of(Penalty(Layer(), Layer())), {"width": 1}, "also read outside its layer"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_programs_without_a_level(case):
    make, options, why = REFUSALS[case]
    with pytest.raises(PassError, match=why) as error:
        sparc.coalesce(make(), **options)
    assert error.value.code == "SPARC220"


def test_layers_shared_across_groups_are_refused():
    torch.manual_seed(0)
    a, b = Layer(), Layer()
    with pytest.raises(PassError, match="not neighbours"):
        sparc.coalesce(capture(Decoder(a, b, b, a).eval(), (IDS,)), width=1)


def test_encoded_weights_are_refused():
    program = decoder()
    for step in (Round(IntGrid(bits=8)), Encode()):
        step.run(program, PassContext())
    with pytest.raises(PassError, match="SPARC220"):
        sparc.coalesce(program)


def test_several_entries_are_refused():
    model = Decoder(Layer(), Layer()).eval()
    program = capture_entries(model, {name: {"example_inputs": (IDS,)} for name in "ab"})
    with pytest.raises(PassError, match="2 entries"):
        sparc.coalesce(program)


@pytest.mark.parametrize("options", [{"width": 0}, {"depth": 0}])
def test_nothing_cannot_be_merged(options):
    with pytest.raises(PassError, match="SPARC209"):
        sparc.coalesce(decoder(2), **options)
