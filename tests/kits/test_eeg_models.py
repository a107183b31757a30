"""InterpretableCNN and its explanations against the authors' network, and its norms."""

import numpy as np
import pytest
import timm
import torch
from torch.testing import assert_close

from smallfry.errors import SmallfryWarning, UsageError
from smallfry.kits.eeg.explanation import Explanation, explain, pointing_game
from smallfry.kits.eeg.models import InterpretableCNN
from smallfry.kits.eeg.statistics import freeze_statistics
from smallfry.models.sources import source_of

INDEX = torch.arange(4 * 30 * 384, dtype=torch.float64)
INPUTS = (
    torch.cos(0.05 * INDEX).view(4, 30, 384),
    (
        torch.sin(0.37 * INDEX)
        + torch.sin(0.011 * 2**0.5 * INDEX)
        + 0.3 * torch.cos(1.7 * INDEX)
    ).view(4, 30, 384),
)  # fmt: skip
LOGITS = (
    [-0.674597457, -0.71204751, -0.67339598, -0.713296365],
    [-0.686983651, -0.699348935, -0.672343629, -0.714392731],
)
# input, state: greatest, least, place of the greatest, sum of absolute values, means of rows
HEAT = {
    (0, 0): (6.120823938, -0.317480423, (8, 302), 6456.916848, {0: 1.606643354, 8: 2.857323809}),
    (0, 1): (4.659132892, -0.292012501, (10, 128), 6007.865196, {2: -0.026546591, 14: 1.831714779}),
    (1, 0): (6.037166803, -0.30724318, (0, 289), 6063.751401, {0: 1.647940693, 25: 1.368628711}),
    (1, 1): (5.811414991, -0.311702526, (29, 155), 6168.592999, {4: 0.821761206, 29: 1.482948383}),
}


@pytest.fixture
def network():
    return filled("batch").eval()


def filled(norm):
    """Return the network with the parameters that the authors' was filled with."""
    model = timm.create_model("interpretable_cnn", norm=norm).double()
    with torch.no_grad():
        for k, (name, parameter) in enumerate(model.named_parameters()):
            s = torch.sin(0.37 * torch.arange(parameter.numel(), dtype=torch.float64) + 0.11 * k)
            if parameter.ndim >= 2:
                s = s / (parameter.numel() / parameter.shape[0]) ** 0.5
            else:
                s = 1 + 0.1 * s if name.endswith("weight") else 0.1 * s
            parameter.copy_(s.view_as(parameter))
    return model


@pytest.mark.filterwarnings("ignore:with norm batch")
@pytest.mark.parametrize("number", [0, 1])
def test_the_networks_values_are_the_authors(network, number):
    with torch.no_grad():
        found = network(INPUTS[number]).log_softmax(dim=1)
    wanted = torch.tensor(LOGITS[number], dtype=torch.float64)
    assert_close(found.flatten()[:4], wanted, atol=1e-9, rtol=0)
    assert_close(network(INPUTS[number][:, None]).log_softmax(dim=1), found)


def test_its_statistics_are_the_authors(network):
    values = network.features(INPUTS[1]).temporal.relu()
    mean = [0.26810583, 0.359743255, 0.31217316, 0.333249937]
    var = [0.124642642, 0.185667182, 0.139120801, 0.172168883]
    found = torch.stack([values.mean((0, 2))[:4], values.var((0, 2), unbiased=False)[:4]])
    assert_close(found, torch.tensor([mean, var], dtype=torch.float64), atol=1e-9, rtol=0)
    frozen = filled("population")
    assert freeze_statistics(frozen, INPUTS[1].split([3, 1])) == 4
    assert_close(frozen.norm.running_mean[:4], found[0])
    assert_close(frozen.norm.running_var[:4], found[1])


@pytest.mark.parametrize(("number", "state"), [*HEAT])
def test_heat_maps_are_the_authors(network, number, state):
    heat, points = explain(network, INPUTS[number], torch.full((4,), state))[1]
    top, least, place, total, rows = HEAT[number, state]
    assert heat.shape == (30, 384)
    assert np.unravel_index(heat.argmax(), heat.shape) == place
    assert [heat.max(), heat.min()] == pytest.approx([top, least], abs=1e-9)
    assert np.abs(heat).sum() == pytest.approx(total, abs=1e-6)
    assert {row: heat[row].mean() for row in rows} == pytest.approx(rows, abs=1e-9)
    assert heat.mean() == pytest.approx(0, abs=1e-12)
    assert len({*map(tuple, points.tolist())}) == len(points) <= 99


@pytest.mark.filterwarnings("ignore:with norm batch")
def test_points_are_those_of_a_loop(network):
    window, state = INPUTS[1][:1], 1
    ((_, points),) = explain(network, window, torch.tensor([state]))
    z, a = (each[0].detach().numpy() for each in network.features(window))
    head = network.fc.weight.detach().numpy()[state]
    v, p = network.temporal.weight[:, 0, 0].detach(), network.spatial.weight[:, 0, :, 0].detach()
    evidence = head[:, None] * a
    threshold = np.sort(evidence.ravel())[-100]
    wanted = []
    for f, t in sorted(np.argwhere(evidence > threshold).tolist(), key=lambda i: -evidence[*i]):
        if a[f, t] * z[f, t] < 0:
            continue
        shares = [
            float(p[f // 2, row] * (window[0, row, t : t + 64] * v[f]).sum()) for row in range(30)
        ]
        point = (int(np.argmax(np.array(shares) * np.sign(z[f, t]))), t + 32)
        wanted += [point] if point not in wanted else []
    assert [*map(tuple, points.tolist())] == wanted


def test_parameters_and_source():
    model = timm.create_model("interpretable_cnn")
    assert sum(p.numel() for p in model.parameters()) == 2706
    assert source_of("interpretable_cnn").licence == "CC0-1.0"


def test_the_answer_to_a_single_window_is_a_constant_with_the_batchs_own_statistics(network):
    with pytest.warns(SmallfryWarning, match="to a single one it is a constant"), torch.no_grad():
        found = torch.cat([network(window[None]) for window in INPUTS[1]])
    with torch.no_grad():
        constant = network.fc(network.norm.bias)
    assert_close(found, constant.expand(4, 2))
    alone = torch.tensor([-0.677305906, -0.709243446], dtype=torch.float64)
    assert_close(found[1].log_softmax(0), alone, atol=1e-9, rtol=0)


@pytest.mark.parametrize("norm", ["population", "running", "subject"])
def test_answers_do_not_depend_on_other_windows_with_frozen_statistics(norm):
    model = filled(norm).eval()
    windows = INPUTS[1]
    if norm != "running":
        freeze_statistics(model, [windows])
    with torch.no_grad():
        together = model(windows)
        alone = torch.cat([model(window[None]) for window in windows])
    assert_close(together, alone, atol=1e-6, rtol=0)
    assert together.std(dim=0).min() > 1e-3
    if norm != "running":  # of the batch that they are of, they are the batch's own
        batch = filled("batch").train()
        assert_close(together, batch(windows).detach(), atol=1e-5, rtol=0)


def test_statistics_of_the_batch_are_not_frozen():
    with pytest.raises(UsageError, match="no statistics to be frozen"):
        freeze_statistics(filled("batch"), [INPUTS[0]])
    with pytest.raises(UsageError, match="there are no windows"):
        freeze_statistics(filled("population"), [])


def test_braindecodes_names_give_the_sizes():
    names = [{"ch_name": f"E{i}"} for i in range(8)]
    model = InterpretableCNN(
        chs_info=names, n_outputs=3, sfreq=100, input_window_seconds=2.0, norm="running"
    )
    assert model(torch.zeros(2, 8, 200)).shape == (2, 3)
    model = InterpretableCNN(n_chans=4, n_times=128, n_outputs=2)
    assert model(torch.zeros(2, 4, 128)).shape == (2, 2)
    with pytest.raises(UsageError, match="8 electrodes by one setting, and 4 by another"):
        InterpretableCNN(n_chans=8, chs_info=names[:4])
    with pytest.raises(UsageError, match="384 samples by one setting, and 200 by another"):
        InterpretableCNN(n_times=384, sfreq=100, input_window_seconds=2)


def test_the_classifier_is_replaced_and_removed():
    model = timm.create_model("interpretable_cnn", img_size=(5, 80)).eval()
    windows = torch.rand(2, 1, 5, 80)
    with torch.no_grad():
        features = model.forward_features(windows)
        assert features.shape[-1] == model.num_features == 32
        assert_close(model.forward_head(features, pre_logits=True), features)
        assert_close(model.get_classifier()(features), model(windows))
        model.reset_classifier(7)
        assert model(windows).shape[-1] == model.num_classes == 7
        model.reset_classifier(0)
        assert_close(model(windows), features)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"norm": "layer"}, "norm is population, batch, running or subject, not 'layer'"),
        ({"img_size": (30, 63)}, "64 samples at least, those of a temporal filter, not 63"),
        ({"in_chans": 3}, "electrodes as rows of one channel, not 3 channels"),
    ],
)
def test_wrong_sizes_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        InterpretableCNN(**settings)


@pytest.mark.parametrize("shape", [(2, 1, 28, 384), (2, 30, 512), (2, 3, 30, 384)])
def test_windows_of_another_recording_are_refused(shape):
    with pytest.raises(UsageError, match=r"30 electrodes and 384 samples, not .* resample"):
        InterpretableCNN()(torch.zeros(shape))


def test_the_pointing_game_counts_first_points():
    masks = np.zeros((3, 2, 10), np.bool_)
    masks[0, 1, 4:6] = masks[1, 0, :5] = True
    heat = np.zeros((2, 10))
    hit = Explanation(heat, np.array([[1, 5], [0, 0]]))
    miss, nothing = Explanation(heat, np.array([[1, 5]])), Explanation(heat, np.empty((0, 2), int))
    found = pointing_game([hit, miss, hit], masks)
    assert (found.windows, found.hits, found.rate) == (2, 1, 0.5)
    assert found.share == pytest.approx((2 + 5) / 40)
    assert pointing_game([nothing, nothing, nothing], masks).hits == 0
    assert pointing_game([hit] * 3, np.zeros_like(masks)).rate == 0


def test_evidence_of_few_values_and_of_none():
    model = InterpretableCNN(img_size=(2, 64), filters=1, norm="running").eval()
    ((heat, points),) = explain(model, torch.rand(1, 2, 64), torch.tensor([0]))
    assert len(points) <= 2
    assert np.isfinite(heat).all()
    with torch.no_grad():
        model.fc.weight.zero_()
    ((heat, points),) = explain(model, torch.rand(1, 2, 64), torch.tensor([0]))
    assert len(points) == 0
    assert (heat == 0).all()
