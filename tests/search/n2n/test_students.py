"""Students as transforms of a teacher, beside the masked teacher."""

import copy

import pytest
import torch

from smallfry.errors import UsageError
from smallfry.search.n2n.layer import REMOVED
from smallfry.search.n2n.students import Students
from smallfry.transforms import ModelSpec, build
from smallfry.transforms.find import find_groups
from smallfry.transforms.groups import mask

TEACHERS = {
    "vitrm_micro_patch4_8": (2, 1, 8, 8),
    "loopnet_70k": (2, 3, 32, 32),
    "resnet8_mlperf_tiny": (2, 3, 32, 32),
}


@pytest.fixture(scope="module", params=TEACHERS)
def students(request):
    if not request.param.startswith("vitrm"):
        pytest.importorskip("torch_pruning", reason="channels of convolutions need it")
    torch.manual_seed(0)
    spec = ModelSpec(request.param)
    model = build(spec)
    for module in model.modules():  # so that an erased branch is not one of zeros
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return Students(model, spec, torch.randn(TEACHERS[request.param]))


def whole(students):
    return {layer.name: 1.0 for layer in students.layers}


def test_the_whole_student_is_the_teacher(students):
    student = students.build(whole(students))
    assert student.spec == students.spec
    expected = students.model(students.example)
    assert torch.equal(student.model(students.example), expected)


def test_each_single_change_is_rebuilt_from_its_spec_to_the_bit(students):
    before = students.costs(whole(students))
    for layer in students.layers:
        share = min(layer.shares)
        try:
            student = students.build({**whole(students), layer.name: share})
        except UsageError:
            assert share == REMOVED  # the only path through the network
            continue
        spec = ModelSpec.from_dict(student.spec.to_dict())
        again = build(spec, student.model.state_dict())
        outputs = student.model(students.example)
        assert torch.equal(again(students.example), outputs)
        assert not torch.allclose(outputs, students.model(students.example))
        after = students.costs({**whole(students), layer.name: share})
        assert after["parameters"] <= before["parameters"]
        assert after["macs"] <= before["macs"]


def test_removal_and_shrinkage_together_are_rebuilt_to_the_bit(students):
    chosen = whole(students)
    removable = [layer.name for layer in students.layers if layer.is_removable]
    chosen[removable[0]] = REMOVED
    for layer in students.layers:
        if chosen[layer.name] and 0.5 in layer.shares:
            chosen[layer.name] = 0.5
    student = students.build(chosen)
    assert [each.kind for each in student.spec.transforms] == ["resize", "erase"]
    again = build(student.spec, student.model.state_dict())
    assert torch.equal(again(students.example), student.model(students.example))


def test_a_narrow_layer_keeps_the_strongest_channels():
    torch.manual_seed(0)
    spec = ModelSpec("vitrm_micro_patch4_8")
    model = build(spec)
    example = torch.randn(2, 1, 8, 8)
    students = Students(model, spec, example)
    group = next(g for g in find_groups(model, example) if g.name == "blocks.1.mlp.fc1")
    values = model.get_submodule("blocks.1.mlp.fc1").weight.detach()[group.zeroed[0].entries[:, 0]]
    weak = values.double().square().sum(1)
    for each in group.zeroed[1:]:  # biases
        bias = dict(model.named_parameters())[each.tensor].detach().double()
        weak += bias[each.entries[:, 0]].square()
    gone = weak.argsort()[: group.channels // 2]
    masked = copy.deepcopy(model)
    mask(masked, group, gone)
    student = students.build({**whole(students), "blocks.1.mlp": 0.5})
    torch.testing.assert_close(student.model(example), masked(example))


def test_layers_have_relative_descriptors_in_the_order_of_the_model(students):
    order = [name for name, _ in students.model.named_modules()]
    places = [order.index(layer.name.removesuffix(":width")) for layer in students.layers]
    assert places == sorted(places)
    for layer in students.layers:
        assert 0 < layer.inputs <= 1
        assert 0 < layer.outputs <= 1


def test_unknown_layers_and_disconnected_students_are_refused(students):
    with pytest.raises(UsageError, match="a share for each layer: "):
        students.build({"head": 0.5})
    if students.spec.architecture == "resnet8_mlperf_tiny":
        with pytest.raises(UsageError, match="not connected"):
            students.build({layer.name: min(layer.shares) for layer in students.layers})


def test_a_teacher_without_students_is_refused():
    spec = ModelSpec("linear_probe_of_nothing")
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    with pytest.raises(UsageError, match="has no students"):
        Students(model, spec, torch.zeros(2, 1, 2, 2))
