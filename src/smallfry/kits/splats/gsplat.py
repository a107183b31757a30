"""Rasteriser of gsplat for CUDA GPUs: faster than ``render`` for large scenes."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from smallfry.errors import UsageError
from smallfry.kits.splats.render import BLUR, NEAR, Camera
from smallfry.kits.splats.scene import RESTS, Scene

__all__ = ["gsplat_arguments", "render_with_gsplat"]


def gsplat_arguments(
    scene: Scene, camera: Camera, background: Sequence[float] = (0, 0, 0)
) -> dict[str, object]:
    """Return the arguments of ``gsplat.rasterization`` for one view, on the CPU, float32."""
    attributes = torch.tensor(scene.attributes, dtype=torch.float32)
    view = torch.eye(4, dtype=torch.float32)
    view[:3, :3], view[:3, 3] = torch.tensor(camera.rotation), torch.tensor(camera.translation)
    calibration = torch.tensor(
        [[camera.focal, 0, camera.width / 2], [0, camera.focal, camera.height / 2], [0, 0, 1]]
    )
    rest = attributes[:, 11:].reshape(len(scene), 3, RESTS[scene.degree] // 3)
    harmonics = torch.cat([attributes[:, None, 8:11], rest.mT], 1)
    return {
        "means": torch.tensor(scene.positions, dtype=torch.float32),
        "quats": attributes[:, 4:8],
        "scales": attributes[:, 1:4].exp(),
        "opacities": attributes[:, 0].sigmoid(),
        "colors": harmonics,
        "viewmats": view[None],
        "Ks": calibration[None],
        "width": camera.width,
        "height": camera.height,
        "near_plane": NEAR,
        "eps2d": BLUR,
        "sh_degree": scene.degree,
        "backgrounds": torch.tensor([background], dtype=torch.float32),
    }


@torch.no_grad()
def render_with_gsplat(
    scene: Scene, camera: Camera, background: Sequence[float] = (0, 0, 0)
) -> NDArray[np.floating]:
    """Render a scene on a CUDA GPU by gsplat: (height, width, 3), float32.

    Raises:
        UsageError: No CUDA GPU, or gsplat is not installed.
    """
    if not torch.cuda.is_available():
        raise UsageError("gsplat needs a CUDA GPU: use smallfry.kits.splats.render.render")
    try:
        from gsplat import rasterization
    except ImportError as error:
        raise UsageError("gsplat is not installed: pip install 'smallfry[splats]'") from error
    arguments = {
        name: each.cuda() if isinstance(each, torch.Tensor) else each
        for name, each in gsplat_arguments(scene, camera, background).items()
    }
    images, _, _ = rasterization(**arguments)
    found: NDArray[np.floating] = images[0].cpu().numpy()
    return found
