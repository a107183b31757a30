"""Reported figures of the papers on these problems, kept apart from measured ones.

Training losses per pixel (sample, for ``deep_linear``) after so many epochs, from the published
result files of Koroko et al. 2022 (arXiv 2201.10285; a refresh every 100 steps, a code behind a
rectifier, CURVES of another file) and Koroko et al. 2023 (arXiv 2303.18083; Fashion-MNIST).
"""

from collections.abc import Mapping

Figures = Mapping[str, Mapping[str, float]]


def _at_10_50_200(**losses: tuple[float, float, float]) -> Figures:
    columns = ("10 epochs", "50 epochs", "200 epochs")
    return {name: dict(zip(columns, values, strict=True)) for name, values in losses.items()}


REPORTED: Mapping[str, Figures] = {
    "curves": _at_10_50_200(
        sgd=(0.1589, 0.1243, 0.0769),
        adamw=(0.1267, 0.0852, 0.0796),
        kfac_papers=(0.1108, 0.0829, 0.0752),
        kpsvd=(0.1078, 0.0800, 0.0750),
        deflation=(0.1133, 0.0796, 0.0746),
        lanczos=(0.1082, 0.0724, 0.0705),
        kfac_corrected=(0.0864, 0.0724, 0.0705),
    ),
    "mnist": _at_10_50_200(
        sgd=(0.1428, 0.0902, 0.0768),
        adamw=(0.0968, 0.0795, 0.0732),
        kfac_papers=(0.1105, 0.0769, 0.0692),
        kpsvd=(0.1119, 0.0774, 0.0693),
        deflation=(0.0804, 0.0680, 0.0653),
        lanczos=(0.0794, 0.0677, 0.0652),
        kfac_corrected=(0.0766, 0.0672, 0.0644),
    ),
    "faces": _at_10_50_200(
        sgd=(0.2138, 0.0929, 0.0456),
        adamw=(0.1200, 0.0593, 0.0420),
        kfac_papers=(0.1360, 0.0477, 0.0313),
        kpsvd=(0.1442, 0.0493, 0.0317),
        deflation=(0.0515, 0.0214, 0.0169),
        lanczos=(0.0485, 0.0208, 0.0164),
        kfac_corrected=(0.0410, 0.0209, 0.0172),
    ),
    "deep_linear": {
        name: {"100 epochs": loss}
        for name, loss in {
            "sgd": 0.758,
            "adamw": 0.559,
            "kfac": 0.541,
            "nicolaides": 0.504,
            "residual": 0.499,
            "krylov_residual": 0.519,
            "krylov_nicolaides": 0.499,
            "spectral": 0.498,
            "tko": 0.569,
        }.items()
    },
    "convnet": {
        name: {"100 epochs": loss}
        for name, loss in {
            "sgd": 0.550,
            "adamw": 0.492,
            "kfac": 0.465,
            "nicolaides": 0.462,
            "residual": 0.461,
            "krylov_residual": 0.467,
            "krylov_nicolaides": 0.459,
            "spectral": 0.462,
            "tko": 0.470,
        }.items()
    },
}
