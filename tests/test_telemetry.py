"""Libraries report to nobody."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, {package}
import onnxruntime
from onnx import TensorProto, helper
value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
print(os.environ.get("ORT_DISABLE_TELEMETRY"))
"""


def run(program, tmp_path, **environment):
    """What a program printed."""
    homes = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), str(tmp_path))
    others = {name: v for name, v in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    command = [sys.executable, "-c", program]
    environment = others | homes | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("package", ["smallfry", "smallfry.deploy"])
def test_onnx_runtime_prepares_no_report(tmp_path, package):
    assert run(PROGRAM.format(package=package), tmp_path) == "1"
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_a_choice_of_the_users_stays(tmp_path):
    program = "import os, smallfry; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert run(program, tmp_path, ORT_DISABLE_TELEMETRY="0") == "0"
