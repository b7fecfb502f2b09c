"""Small networks that several papers share."""

from wellposed.nets.mlp import MLP
from wellposed.nets.resnet import ResNet
from wellposed.nets.routed import RoutedExperts
from wellposed.nets.stacked import Stacked

__all__ = ["MLP", "ResNet", "RoutedExperts", "Stacked"]
