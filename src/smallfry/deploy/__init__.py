"""What leaves the house: export, quantization, runtimes, latency, sharing.

``Runtime`` and ``Manifest`` need ONNX Runtime, NumPy and Pillow, and never import PyTorch.
"""

from smallfry_runtime.manifest import Manifest
from smallfry_runtime.runtime import Predictions, Runtime

__all__ = ["Manifest", "Predictions", "Runtime"]
