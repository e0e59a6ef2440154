"""Compress a small model of your own, call it, save it, load it, export it."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import sparc


class Classifier(nn.Module):
    """Two hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))

    def forward(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return class logits for features [batch, 128]."""
        return {"logits": self.layers(features)}


def main() -> None:
    """Compile, compare, save, load, export."""
    torch.manual_seed(0)
    model = Classifier().eval()
    features = torch.randn(8, 128)
    artifact = sparc.compile(model, {"features": features}, recipe="w8", dynamic={"features": {0: "batch"}})
    print(artifact.report)
    with tempfile.TemporaryDirectory() as folder:
        artifact.save(Path(folder) / "classifier")
        loaded = sparc.load(Path(folder) / "classifier")
        loaded.export_onnx(Path(folder) / "classifier.onnx")
        other = torch.randn(3, 128)
        with torch.no_grad():
            difference = (loaded(features=other)["logits"] - model(other)["logits"]).abs().max()
        print(f"largest difference from the model on a new batch size: {float(difference):.4f}")


if __name__ == "__main__":
    main()
