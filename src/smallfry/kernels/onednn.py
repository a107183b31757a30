"""Float32 matrix products on a CPU with oneDNN, where PyTorch's default, MKL, is slower.

MKL keeps its fastest code for Intel's processors. Measured with ``benchmarks/vitrm.py``, oneDNN
makes a whole ViTRM 1.5 to 1.7 × as fast on an AMD EPYC, 1.01 to 1.06 × on another machine, and
0.8 × on an Intel Xeon. It comes with PyTorch, but nothing public has it multiply float32.

The two round differently in the last bits, so the choice must not change between a run and its
resumption. It therefore follows from the processor's vendor, oneDNN on all but Intel's, and not
from a race of both products at the start, whose outcome depends on how busy the machine is. The
environment variable SMALLFRY_ONEDNN, 0 or 1, overrides it.
"""

import math
import os
import platform
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from smallfry._torch import is_transformed
from smallfry.errors import UsageError

__all__ = ["VARIABLE", "multiplies", "multiply", "prefers_onednn"]

VARIABLE = "SMALLFRY_ONEDNN"
_EXACT = (
    Tensor,
    nn.Parameter,
)  # a subclass, such as torchao's or DTensor, has a product of its own
_BACKENDS: Any = torch.backends  # without types
_JIT: Any = torch.jit
_MULTIPLY: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_HAS_ONEDNN = (
    _MULTIPLY is not None and _BACKENDS.mkldnn.is_available() and _BACKENDS.mkl.is_available()
)


def prefers_onednn(setting: str | None, processor: str) -> bool:
    """Choose the library, the same at every start on a machine.

    Args:
        setting: Value of SMALLFRY_ONEDNN, None where it is unset.
        processor: A text that names the processor's vendor.

    Raises:
        UsageError: The setting is neither 0 nor 1.
    """
    if setting in (None, ""):
        return "GenuineIntel" not in processor
    if setting not in ("0", "1"):
        raise UsageError(f"{VARIABLE} must be 0 or 1, not {setting!r}; unset it for the default")
    return setting == "1"


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return platform.processor()


_PREFERRED = prefers_onednn(os.environ.get(VARIABLE), _processor())


def multiplies(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Decide whether to use oneDNN for this product: faster here, PyTorch's own not needed."""
    return bool(
        _PREFERRED
        and _HAS_ONEDNN
        and _BACKENDS.mkldnn.enabled
        and type(rows) in _EXACT
        and type(weight) in _EXACT
        and (bias is None or type(bias) in _EXACT)
        and rows.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32
        and rows.ndim > 1
        and rows.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
        and not _JIT.is_tracing()
        and not is_transformed()
    )


def multiply(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute rows (..., inner) @ weightᵀ + bias of a weight (outer, inner), if ``multiplies``.

    Knows no gradients.
    """
    return cast(Tensor, _MULTIPLY(rows, weight, bias, "none", [], ""))


if _HAS_ONEDNN:

    @register_flop_formula(_MULTIPLY)
    def _flops(rows: list[int], weight: list[int], *_: Any, **__: Any) -> int:
        return 2 * math.prod(rows) * weight[0]
