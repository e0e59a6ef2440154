"""A recipe of one's own: 4 bits in general, 8 bits for the output layer, and the recipe as TOML."""

import torch

import sparc
from examples.compress_a_model import Classifier
from sparc import Recipe, Step
from sparc.encoding.int_grid import IntGrid
from sparc.passes.encode import Encode
from sparc.passes.round import Round


def main() -> None:
    """Compile with a mixed recipe and print what each site became."""
    torch.manual_seed(0)
    recipe = Recipe(
        steps=(
            Step(Round(IntGrid(bits=4, group=32, symmetric=False), fit="search")),
            Step(Round(IntGrid(bits=8)), where="layers.4"),
            Step(Encode()),
        ),
    )
    print(recipe.to_toml())
    artifact = sparc.compile(Classifier().eval(), {"features": torch.randn(8, 128)}, recipe=recipe)
    for row in artifact.ledger.sites:
        print(f"{row.weight:18} {row.encoding:44} {row.snr_db:5.1f} dB  {row.file_bytes:7} of {row.dense_bytes} bytes")


if __name__ == "__main__":
    main()
