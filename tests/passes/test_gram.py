"""Gram matrices of what sites multiply: against plain products of patches, rows and runs, in float64."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparc.analysis.sites import find_sites
from sparc.calibration import Calibration
from sparc.capture import capture
from sparc.observers import Gram, gram
from sparc.pass_base import PassContext
from sparc.passes.second_order import gram_watches, reconstruction_error, site_gram
from sparc.program import Program
from tests.mixtures import Mixture
from tests.mixtures import inputs as routed


def grams(program: Program, batches: list[list[Tensor]]) -> dict[str, Tensor | None]:
    context = PassContext()
    watches = list(gram_watches(program, context))
    context.statistics = Calibration(program, {"forward": batches}).gather_all(watches)
    return {site.weight: site_gram(program, site, context) for site in find_sites(program)[0]}


def test_wide_ones_are_whole_and_symmetric() -> None:
    torch.manual_seed(0)
    observer, batches = Gram(), [torch.randn(3, 40, 700), torch.randn(2, 9, 700)]
    for index, batch in enumerate(batches):
        observer.update(batch, index)
    rows = torch.cat([batch.flatten(0, 1) for batch in batches]).double()
    torch.testing.assert_close(observer.result(), rows.T @ rows / len(rows), rtol=1e-5, atol=1e-5)
    assert torch.equal(observer.result(), observer.result().T)


CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 6, 3),
    "strided, padded, dilated": nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(2, 1)),
    "grouped": nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": nn.Conv2d(4, 4, 3, groups=4),
    "same": nn.Conv2d(4, 6, (3, 4), padding="same"),
    "valid": nn.Conv2d(4, 6, 1, padding="valid"),
    "of one axis": nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_error_of_a_convolutions_outputs_is_what_its_gram_matrix_says(name: str) -> None:
    torch.manual_seed(1)
    layer = CONVOLUTIONS[name]
    shape = (2, 4, 9, 8) if isinstance(layer, nn.Conv2d) else (2, 4, 12)
    batches = [[torch.randn(shape)] for _ in range(3)]
    program = capture(nn.Sequential(layer), (batches[0][0],))
    gram = grams(program, batches)["0.weight"]
    assert gram is not None
    change = torch.randn(layer.weight.shape)
    bare = type(layer)(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
        layer.groups, bias=False,
    ).double()  # fmt: skip
    with torch.no_grad():
        bare.weight.copy_(change)
        outputs = torch.cat([bare(batch[0].double()) for batch in batches])
    expected = outputs.square().movedim(1, 0).flatten(1).mean(1)
    found = reconstruction_error(change.reshape(gram.shape[0], -1, gram.shape[-1]), gram).flatten()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


class Shared(nn.Module):
    """One weight for two values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum of both products."""
        return functional.relu(self.linear(x)) + self.linear(y)


def test_uses_of_a_shared_weight_count_alike() -> None:
    torch.manual_seed(2)
    batches = [[torch.randn(4, 5), 3 * torch.randn(4, 5)] for _ in range(3)]
    found = grams(capture(Shared(), tuple(batches[0])), batches)["linear.weight"]
    x, y = (torch.cat([batch[place] for batch in batches]).double() for place in range(2))
    assert found is not None
    torch.testing.assert_close(found[0], (x.T @ x + y.T @ y) / 24, rtol=1e-5, atol=1e-6)


def test_what_meets_no_rows_has_none() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(8, 2))
    batches = [[torch.randint(0, 7, (3, 2))] for _ in range(2)]
    found = grams(capture(model, (batches[0][0],)), batches)
    assert found["0.weight"] is None
    assert found["2.weight"] is not None


def test_inputs_whose_squares_are_no_numbers_have_none() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 4))
    batches = [[1e25 * torch.randn(3, 4)] for _ in range(2)]
    assert grams(capture(model, (batches[0][0],)), batches) == {"0.weight": None}


def test_runs_count_infinities_and_nan_as_zeros() -> None:
    x, experts = routed("33 tokens")
    x[0], x[1] = torch.nan, torch.inf
    found = grams(capture(Mixture(), (x, experts)), [[x, experts]])["up"]
    assert found is not None
    seen = torch.where(x.isfinite(), x, 0.0).double()
    for expert, mean in enumerate(found):
        rows = seen[experts == expert]
        torch.testing.assert_close(mean, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("most", [1000, 100, 37])
def test_patches_are_spaced_evenly_over_the_whole_batch(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "_PATCHES", most)
    torch.manual_seed(4)
    image = torch.randn(5, 4, 9, 8)
    geometry = gram.Geometry((3, 2), (2, 1), ((1, 1), (0, 0)), (1, 1), 2)
    every = functional.unfold(image, (3, 2), padding=(1, 0), stride=(2, 1)).movedim(1, 0).flatten(1).T
    step = -(-len(every) // most)
    expected = every[::step].unflatten(-1, (2, -1)).transpose(0, 1)
    assert torch.equal(gram.PatchGram(geometry).rows_of(image), expected)


def test_every_batch_counts_for_each_runs_own_rows() -> None:
    """More batches than are kept whole; the last expert gets no row, and has what all rows have together."""
    torch.manual_seed(4)
    batches = [[torch.randn(9, 32) * (1 + index), torch.randint(0, 3, (9,))] for index in range(7)]
    found = grams(capture(Mixture(), tuple(batches[0])), batches)["up"]
    assert found is not None
    rows, experts = (torch.cat([batch[place] for batch in batches]) for place in range(2))
    for expert in range(4):
        own = (rows[experts == expert] if expert < 3 else rows).double()
        torch.testing.assert_close(found[expert], own.T @ own / len(own), rtol=1e-5, atol=1e-5)
