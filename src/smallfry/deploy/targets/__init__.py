"""Device formats: each exports a trained model to a folder, and runs it without PyTorch."""

from smallfry.deploy.targets.target import Answering, Target, find_target, register_target, targets

__all__ = ["Answering", "Target", "find_target", "register_target", "targets"]
