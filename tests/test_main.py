"""How the process of the command ends."""

import subprocess
import sys

import pytest

CODE = """
import atexit, sys, types
import smallfry.__main__ as command
if {loaded}:
    sys.modules["gradio"] = types.ModuleType("gradio")

class Garbage:
    def __del__(self):
        print("looked for garbage")

def main():
    kept = Garbage()
    kept.itself = kept
    print("answered")
    return 3

command.main = main
atexit.register(print, "cleaned up")
command.run()
"""


@pytest.mark.parametrize("loaded", [True, False])
def test_it_ends_with_the_code_and_the_output_but_python_is_not_taken_apart(loaded):
    call = [sys.executable, "-c", CODE.format(loaded=loaded)]
    ended = subprocess.run(call, capture_output=True, text=True)
    assert ended.returncode == 3, ended.stderr
    garbage = [] if loaded else ["looked for garbage"]
    assert ended.stdout.splitlines() == ["answered", "cleaned up", *garbage]
    assert ended.stderr == ""


def test_python_runs_it_by_its_name():
    call = [sys.executable, "-m", "smallfry", "nonsense"]
    ended = subprocess.run(call, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("smallfry: ")
