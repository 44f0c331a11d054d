"""Defines TorchX components and resources, by which the one training script is started anywhere."""
