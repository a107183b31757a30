"""What leaves the house: export, quantization, runtimes, latency, sharing.

``Runtime`` and ``Manifest`` need ONNX Runtime, NumPy and Pillow, and never import PyTorch.
"""

from smallfry.deploy.manifest import Manifest
from smallfry.deploy.runtime import Predictions, Runtime

__all__ = ["Manifest", "Predictions", "Runtime"]
