"""TorchX components and resources: how the one training script is started anywhere."""
