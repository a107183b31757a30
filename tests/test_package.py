import re
import subprocess
import sys
import tomllib
from pathlib import Path

from oldest import lower_bounds

ROOT = Path(__file__).parent.parent


def in_a_fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


REGISTERED = "print(timm.is_model('vitrm_small_patch4_32'))"


def test_models_are_registered_if_timm_is_imported_first() -> None:
    assert in_a_fresh_python(f"import timm, smallfry; {REGISTERED}").strip() == "True"


def test_models_are_registered_if_it_is_imported_first_and_what_it_names_is_there() -> None:
    names = "print([getattr(smallfry, name) for name in smallfry.__all__])"
    registered, named = in_a_fresh_python(f"import smallfry, timm; {REGISTERED}; {names}").split(
        "\n", 1
    )
    assert registered == "True"
    assert "cost" in named


def test_importing_it_does_not_import_pytorch() -> None:
    code = "import sys, smallfry, smallfry.images, smallfry.inputs; print('torch' in sys.modules)"
    assert in_a_fresh_python(code).strip() == "False"


def test_every_library_that_is_needed_has_a_lower_bound_that_make_oldest_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = dict(entry.split("==") for entry in lower_bounds(project))
    for entry in project["dependencies"]:
        name = re.match(r"[\w-]+", entry)[0]
        assert entry.split(">=")[1] == bounds[name]
