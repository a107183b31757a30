"""Every model names its paper, and timm's networks of the zoo are those of the tables."""

import re
import sys
import types

import pytest
import timm
from zoo_golden import GOLDEN, measured

import smallfry.models
from smallfry.errors import UsageError
from smallfry.models import sources
from smallfry.models.sources import TIMM, register_sizes, source_of

OWN = [
    name
    for name in timm.list_models()
    if timm.model_entrypoint(name).__module__.startswith("smallfry.")
]
ZOO = [n for n in GOLDEN["timm"] if n.startswith(("tinynet", "fbnetv3", "efficientnet"))]


def test_every_model_has_a_paper() -> None:
    assert len(OWN) > 50
    for name in OWN:
        source = source_of(name)
        assert source is not None, name
        assert re.search("arXiv|CVPR|ICRA|Nature|TNNLS", source.paper)
        assert bool(source.code) == bool(source.licence)
    assert source_of("tinynet_a") == TIMM["tinynet_*"]
    assert source_of("resnet18") is None


def test_registered_functions_are_in_their_modules() -> None:
    entry = timm.model_entrypoint("dhvt_tiny_cifar_patch4")
    assert entry is smallfry.models.dhvt.dhvt_tiny_cifar_patch4
    assert entry.__doc__ == "Build ``dhvt_tiny_cifar_patch4``."


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n[0] in "fe" else []) for n in ZOO]
)
def test_timms_networks_are_those_of_the_tables(name: str) -> None:
    entry = GOLDEN["timm"][name]
    found = measured(name, entry["input"])
    assert (found.parameters, found.macs) == (entry["n_params"], entry["macs"])
    if "macs_test" in entry:
        assert measured(name, entry["test_input"]).macs == entry["macs_test"]
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.interpolation == entry["interp"]
    assert cfg.crop_pct == entry["crop_pct"]


def test_all_models_of_smallfry_are_registered_by_their_sizes() -> None:
    """A size is a function of its module, with the name and configuration that timm has."""
    for name in OWN:
        entry = timm.model_entrypoint(name)
        module = sys.modules[entry.__module__]
        assert getattr(module, name) is entry
        assert entry.__doc__ == f"Build ``{name}``."
        assert name in module.default_cfgs


def test_sizes_are_functions_of_their_module_that_build_what_it_creates(monkeypatch) -> None:
    made: list[tuple[object, ...]] = []
    module = types.ModuleType("sizes_of_a_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sources, "register_model", lambda entry: entry)  # timm keeps no table
    register_sizes(module.__name__, ["one", "two"], lambda *given: made.append(given))
    module.one(True, width=2)
    module.two()
    assert made == [("one", True, {"width": 2}), ("two", False, {})]
    assert (module.one.__name__, module.one.__module__) == ("one", "sizes_of_a_test")


@pytest.mark.parametrize("name", ["cct_2_3x2_32", "plain_mlp"])
def test_models_without_maps_of_features_say_so(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} has no maps of features that timm could take"):
        timm.create_model(name, features_only=True)
