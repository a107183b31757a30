"""Fisher networks as modules, and their fusion with other classifiers."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from smallfry.errors import UsageError
from smallfry.estimators.deep_fisher import DeepFisherNet
from smallfry.estimators.late_fusion import fuse, fusion_weights

SMALL = {
    **{"components": (3, 4), "patch": 3, "patch_features": 6, "window": 2, "projected": 5},
    **{"stacked": 6, "epochs": 2, "random_state": 0},
}


@pytest.fixture(scope="module")
def digits():
    found = load_digits()
    images = np.rint(found.images[:160] * (255 / 16)).astype(np.float32)
    return images.repeat(2, 1).repeat(2, 2)[:, None], found.target[:160]


@pytest.fixture(scope="module", params=[1, 2])
def net(request, digits):
    return DeepFisherNet(layers=request.param, **SMALL).fit(*digits)


def test_a_module_computes_what_the_estimator_does(net, digits):
    module, images = net.to_module(), torch.from_numpy(digits[0][:20])
    scores = module(images)
    np.testing.assert_allclose(scores, net.decision_function(digits[0][:20]), atol=1e-4)
    features = module.forward_features(images)
    np.testing.assert_allclose(features, net.transform(digits[0][:20]), atol=1e-6)
    assert module.num_features == features.shape[1]
    assert torch.equal(module.forward_head(features), scores)
    assert module.forward_head(features, pre_logits=True) is features


def test_a_module_holds_its_parts_and_is_frozen(net, digits):
    module, images = net.to_module(), torch.from_numpy(digits[0][:4])
    assert not any(parameter.requires_grad for parameter in module.parameters())
    other = DeepFisherNet(**SMALL | {"layers": net.layers, "random_state": 7}).fit(*digits)
    fresh = other.to_module()
    assert not torch.allclose(fresh(images), module(images))
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(images), module(images))
    double = module.double()(images.double())
    torch.testing.assert_close(double.float(), fresh(images), atol=1e-4, rtol=1e-4)


def test_a_new_classifier_is_trained(net, digits):
    module, images = net.to_module(), torch.from_numpy(digits[0][:4])
    assert module.get_classifier() is module.head
    module.reset_classifier(3)
    assert module(images).shape == (4, 3)
    assert [n for n, p in module.named_parameters() if p.requires_grad] == [
        "head.weight",
        "head.bias",
    ]
    module.reset_classifier(0)
    assert module(images).shape == (4, module.num_features)


def test_pixels_from_0_to_1_are_scaled_by_its_configuration(net):
    config = net.to_module().pretrained_cfg
    assert config["input_size"] == (1, 16, 16)
    assert (0.5 - config["mean"][0]) / config["std"][0] == pytest.approx(127.5)


def test_two_classes_have_two_scores(digits):
    images, labels = digits
    two = labels < 2
    net = DeepFisherNet(**SMALL).fit(images[two], labels[two])
    scores = net.to_module()(torch.from_numpy(images[two]))
    assert scores.shape == (two.sum(), 2)
    difference = scores[:, 1] - scores[:, 0]
    np.testing.assert_allclose(difference, net.decision_function(images[two]), atol=1e-4)
    assert (scores.argmax(1).numpy() == net.predict(images[two])).all()


def test_tables_have_no_module():
    net = DeepFisherNet(**SMALL).fit(np.random.default_rng(0).normal(size=(20, 4)), [0, 1] * 10)
    with pytest.raises(UsageError, match="this one had a table"):
        net.to_module()


def test_fusion_weights_have_no_gradient_left():
    torch.manual_seed(0)
    labels = torch.randint(5, (400,))
    truth = F.one_hot(labels, 5).double()
    scores = [truth + torch.randn(400, 5).double(), 30 * truth + 60 * torch.randn(400, 5).double()]
    weights = fusion_weights(scores, labels).requires_grad_()
    loss = F.cross_entropy(fuse(scores, weights), labels)
    (gradient,) = torch.autograd.grad(loss, weights)
    scale = torch.stack([each.std() for each in scores])
    assert (gradient / scale).abs().max() < 1e-5
    for alone in (scores[0], scores[1]):
        single = fusion_weights([alone], labels)
        assert loss <= F.cross_entropy(fuse([alone], single), labels) + 1e-9
    assert 10 < weights[0] / weights[1] < 100  # the second one's scores are larger


def test_a_classifier_of_noise_gets_no_weight():
    torch.manual_seed(0)
    labels = torch.randint(3, (3000,))
    good = 2 * F.one_hot(labels, 3).double() + torch.randn(3000, 3)
    weights = fusion_weights([good, torch.randn(3000, 3)], labels)
    assert weights[1].abs() < 0.1 * weights[0]


def test_scores_of_other_images_are_refused():
    with pytest.raises(UsageError, match=r"got \(4, 3\), \(5, 3\)"):
        fusion_weights([torch.zeros(4, 3), torch.zeros(5, 3)], torch.zeros(4, dtype=torch.long))
    with pytest.raises(UsageError, match="for 3 labels"):
        fusion_weights([torch.zeros(4, 3)], torch.zeros(3, dtype=torch.long))
