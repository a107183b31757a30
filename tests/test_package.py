import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from oldest import lower_bounds

import smallfry_runtime
from smallfry import version
from smallfry._moved import MOVED

ROOT = Path(__file__).parent.parent


def in_a_fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


REGISTERED = "print(timm.is_model('vitrm_small_patch4_32'))"


@pytest.mark.slow
def test_models_are_registered_if_timm_is_imported_first() -> None:
    assert in_a_fresh_python(f"import timm, smallfry; {REGISTERED}").strip() == "True"


@pytest.mark.slow
def test_models_are_registered_if_it_is_imported_first_and_what_it_names_is_there() -> None:
    names = "print([getattr(smallfry, name) for name in smallfry.__all__])"
    registered, named = in_a_fresh_python(f"import smallfry, timm; {REGISTERED}; {names}").split(
        "\n", 1
    )
    assert registered == "True"
    assert "cost" in named


def test_importing_it_does_not_import_pytorch() -> None:
    modules = "sys, smallfry, smallfry_runtime.images, smallfry_runtime.inputs"
    code = f"import {modules}; print('torch' in sys.modules)"
    assert in_a_fresh_python(code).strip() == "False"


def test_neither_importing_it_nor_its_help_needs_templates():
    code = (
        "import sys, smallfry\n"
        "from smallfry.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print('jinja2' in sys.modules)"
    )
    assert in_a_fresh_python(code).splitlines()[-1] == "False"


def projects():
    return [
        tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]
        for folder in (".", "runtime")
    ]


def test_every_library_that_is_needed_has_a_lower_bound_that_make_oldest_installs():
    ours, runtime = projects()
    bounds = dict(entry.split("==") for entry in lower_bounds(ours, runtime))
    extras = ours["optional-dependencies"]
    for entry in (*ours["dependencies"], *runtime["dependencies"], *extras["all"]):
        name = re.match(r"[\w-]+", entry)[0]
        if not name.startswith("smallfry"):
            assert entry.split(">=")[1] == bounds[name]


def test_both_wheels_have_one_version_and_one_needs_the_other():
    assert version.__version__ == smallfry_runtime.__version__
    assert f"smallfry-runtime=={version.__version__}" in projects()[0]["dependencies"]


WITHOUT = """
import sys
allowed = {allowed!r}.split()
class Without:  # of the finders of modules, those that refuse some
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        known = not allowed or top in allowed or top in sys.stdlib_module_names
        if top not in {refused!r}.split() and known:
            return self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
OF_SMALLFRY = (
    "timm torchvision lightning torchmetrics datasets pyarrow sklearn jsonargparse yaml "
    "huggingface_hub rich tensorboard matplotlib onnx onnxscript onnxruntime gradio PIL wrapt "
    "safetensors scipy transformers"
)


@pytest.mark.slow
def test_optimizers_and_curvature_need_torch_and_numpy_alone():
    code = WITHOUT.format(allowed="", refused=OF_SMALLFRY) + (
        "import torch, smallfry.optim, smallfry.curvature\n"
        "model = torch.nn.Linear(3, 2)\n"
        "optimizer = smallfry.optim.KFAC(model, likelihood='categorical')\n"
        "outputs, labels = model(torch.ones(4, 3)), torch.ones(4).long()\n"
        "torch.nn.functional.cross_entropy(outputs, labels).backward()\n"
        "before = model.weight.detach().clone(); optimizer.step()\n"
        "print(torch.equal(before, model.weight))"
    )
    assert in_a_fresh_python(code).strip() == "False"


def test_a_device_needs_onnx_runtime_numpy_and_pillow_alone(tmp_path):
    device = "smallfry_runtime numpy PIL onnxruntime google flatbuffers coloredlogs humanfriendly"
    code = WITHOUT.format(allowed=device, refused="smallfry") + (
        "from smallfry_runtime import Runtime\n"
        "from smallfry_runtime.errors import ExportError\n"
        f"try: Runtime({str(tmp_path / 'none')!r})\n"
        "except ExportError as error: print(error)"
    )
    assert "no such export" in in_a_fresh_python(code)


@pytest.mark.parametrize("old", sorted(MOVED))
def test_a_module_under_its_old_name_is_that_of_today(old):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"has moved to {MOVED[old]}"):
        assert import_module(old) is import_module(MOVED[old])
    assert import_module(MOVED[old]).__name__ == MOVED[old]
