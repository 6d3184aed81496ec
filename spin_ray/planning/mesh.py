"""The mesh of the train workers: who holds which part of the model."""

from spin_ray.config.sections import Mesh

__all__ = ["Mesh"]
