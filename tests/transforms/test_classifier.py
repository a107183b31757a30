"""Another number of classes for a model."""

import pytest
import timm
import torch

from smallfry.errors import UsageError
from smallfry.transforms import ModelSpec, build
from smallfry.transforms.classifier import with_classes
from smallfry.transforms.replace import Replace
from smallfry.transforms.resize import Resize

MODELS = {
    "vitrm_micro_patch4_8": ({}, (1, 8, 8)),
    "cct_2_3x2_32": ({}, (3, 32, 32)),
    "resnet18_cifar": ({}, (3, 32, 32)),
    "resnet20_he": ({}, (3, 32, 32)),
    "mobilenetv3_small_050": ({}, (3, 32, 32)),
    "deit_tiny_distilled_patch16_224": ({"img_size": 32, "depth": 1}, (3, 32, 32)),
}


@pytest.mark.parametrize("classes", [2, 30])
@pytest.mark.parametrize("name", MODELS)
def test_all_but_the_classifier_is_kept(name, classes):
    arguments, shape = MODELS[name]
    spec = ModelSpec(name, {"num_classes": 10, **arguments})
    model = build(spec)
    new, changed = with_classes(model, spec, classes)
    assert new(torch.zeros(2, *shape)).shape == (2, classes)
    again = build(changed, new.state_dict())
    assert torch.equal(again(torch.ones(2, *shape)), new(torch.ones(2, *shape)))
    old = model.state_dict()
    other = {
        k for k, v in new.state_dict().items() if v.shape != old[k].shape or not v.equal(old[k])
    }
    assert all(key.startswith(("head", "fc.", "classifier.")) for key in other), other


def test_a_transform_of_the_classifier_alone_is_gone():
    low_rank = Replace("low_rank", {"fc": {"rank": 4}})
    spec = ModelSpec("resnet10t", {"num_classes": 10}, (low_rank,))
    new, changed = with_classes(build(spec), spec, 3)
    assert changed == ModelSpec("resnet10t", {"num_classes": 3})
    assert isinstance(new.fc, torch.nn.Linear)


def test_a_classifier_that_was_cut_stays_as_narrow():
    cut = Resize({"head.weight": [10, 128], "head.bias": [10], "pos_embed": [1, 64, 128]})
    assert cut.without_classifier("head", 4).shapes == {
        **{"head.weight": [4, 128], "head.bias": [4], "pos_embed": [1, 64, 128]}
    }


def test_a_model_that_names_no_classifier_is_refused(monkeypatch):
    kind = type(timm.create_model("resnet10t"))
    monkeypatch.setattr(kind, "get_classifier", lambda self: None)
    spec = ModelSpec("resnet10t", {"num_classes": 10})
    with pytest.raises(UsageError, match=r"fc.* is another one with 3 classes"):
        with_classes(build(spec), spec, 3)
