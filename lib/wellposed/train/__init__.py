"""Devices, seeds and the few shared pieces of a training loop."""

from wellposed.train.loop import accuracy, minibatches
from wellposed.train.optim import StackedAdam, StackedSGD
from wellposed.train.reproducible import generator, pick_device, seeded, spawn_seeds

__all__ = [
    "StackedAdam",
    "StackedSGD",
    "accuracy",
    "generator",
    "minibatches",
    "pick_device",
    "seeded",
    "spawn_seeds",
]
