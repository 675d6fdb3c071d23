"""What a trajectory earns: structure, the right answer, length, and how they are weighed over a run."""

from .curriculum import score

__all__ = ["score"]
