"""Isolated execution of model-written code: `Sandbox`, its `Limits`, and the `Execution` that comes back."""

from .client import Execution, Sandbox
from .limits import Limits

__all__ = ["Execution", "Limits", "Sandbox"]
