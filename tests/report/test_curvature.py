import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from smallfry.optim import EKFAC, KFAC, ExactNG
from smallfry.report.curvature import curvature_overview


def test_the_overview_of_every_method_is_drawn(tmp_path):
    for kind in (KFAC, EKFAC, ExactNG):
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        optimizer = kind(model, lr=0.1)
        optimizer.monitor()
        F.cross_entropy(model(torch.randn(5, 3)), torch.arange(5) % 2).backward()
        optimizer.step()
        file = tmp_path / f"{kind.__name__}.png"
        curvature_overview(optimizer.diagnostics(), file)
        with Image.open(file) as picture:
            assert picture.width > 1000
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
