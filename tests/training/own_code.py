"""Code of a user: losses, metrics and callbacks, as documentation suggests them."""

import subprocess
from dataclasses import dataclass, field

from torch.nn import functional as F

CALLED = []
WIDTH = 3
imported_function = subprocess.run  # of another module


def cross_entropy(logits, targets):
    return -(targets * logits.log_softmax(1)).sum(1)


def mean_cross_entropy(logits, targets):
    return F.cross_entropy(logits, targets)


def detached(logits, targets):
    return F.cross_entropy(logits, targets).detach()


def of_another_shape(logits, targets):
    return logits * targets


def no_tensor(logits, targets):
    return 1.0


def right(logits, labels):
    return (logits.argmax(1) == labels).double().mean()


def wrong_error(logits, labels):
    return 1 - right(logits, labels)


def broken(logits, labels):
    raise ZeroDivisionError("by nothing")


def accuracy(logits, labels):
    return 0.0


class Recorder:
    def __init__(self):
        CALLED.append("made")

    def on_epoch(self, done):
        CALLED.append(done.epoch)


class Misspelt:
    def on_epoch_end(self, done):
        pass


class Hookless:
    pass


@dataclass
class Unmakeable:
    needed: int
    also: list = field(default_factory=list)

    def on_end(self, summary):
        pass


recorder = Recorder()
