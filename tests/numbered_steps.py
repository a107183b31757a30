"""Training steps whose batches follow from their number, so that a resumed run sees the same."""

import torch
from torch.nn import functional as F

CLASSES = 4


def train(model, optimizer, start, end, shape=(1, 8, 8), batch=8):
    for number in range(start, end):
        torch.manual_seed(number)
        images, labels = torch.randn(batch, *shape), torch.randint(CLASSES, (batch,))
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
