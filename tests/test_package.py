import subprocess
import sys

import pytest


def in_a_fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("order", ["import smallfry, timm", "import timm, smallfry"])
def test_models_are_registered_whichever_is_imported_first(order: str) -> None:
    code = f"{order}; print(timm.is_model('vitrm_small_patch4_32'))"
    assert in_a_fresh_python(code).strip() == "True"


def test_importing_it_does_not_import_pytorch() -> None:
    code = "import sys, smallfry, smallfry.images, smallfry.inputs; print('torch' in sys.modules)"
    assert in_a_fresh_python(code).strip() == "False"


def test_what_the_package_names_is_there() -> None:
    code = "import smallfry; print([getattr(smallfry, name) for name in smallfry.__all__])"
    assert "cost" in in_a_fresh_python(code)
