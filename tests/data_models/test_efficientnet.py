import pytest
import torch

from examples.models import efficientnet, evaluate
from examples.models.images import crops, held_out_images, held_out_names

pytestmark = pytest.mark.models

# Class numbers of ImageNet-1k.
_LABELS = {
    "animal_bison": 347,
    "animal_koala": 105,
    "fish_goldfish": 1,
    "object_baseball": 429,
}


@pytest.fixture(scope="module")
def model():
    return efficientnet.load()


@pytest.mark.parametrize(("kernel", "before", "after"), [(3, 0, 1), (5, 1, 2)])
def test_the_odd_pixel_of_same_padding_goes_right_and_below(kernel, before, after):
    padded = efficientnet.same_padding(kernel, stride=2)(torch.ones(1, 1, 8, 8))[0, 0]
    assert padded.sum(0).tolist() == padded.sum(1).tolist() == [0.0] * before + [8.0] * 8 + [0.0] * after


def test_photographs_are_recognised(model):
    pictures = dict(zip(held_out_names(), held_out_images(), strict=True))
    batch = crops([pictures[name] for name in _LABELS], len(_LABELS), seed=0)
    assert evaluate.image_logits(model, batch).argmax(-1).tolist() == list(_LABELS.values())


def test_a_model_agrees_with_itself_and_not_with_a_broken_one(model):
    batch = crops(held_out_images()[:6], 6, seed=0)
    same = evaluate.compare_images(model, model, batch)
    assert (same.top1_agreement, same.count) == (1, 6)
    assert same.mean_cosine == pytest.approx(1, abs=1e-6)
    broken = evaluate.compare_images(lambda pixel_values: -model(pixel_values), model, batch)
    assert broken.top1_agreement == 0
    assert broken.mean_cosine == pytest.approx(-1, abs=1e-6)


def test_compile_arguments_run():
    arguments = efficientnet.efficientnet()
    assert sum(len(item["pixel_values"]) for item in arguments["data"]) == 104
    inputs = arguments["example_inputs"]
    assert inputs["pixel_values"].shape == (2, 3, 224, 224)
    with torch.no_grad():
        assert arguments["model"](**inputs).shape == (2, 1000)
    assert not arguments["model"].training
