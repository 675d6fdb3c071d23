"""Isolated execution of model-written code: `Sandbox`, `Session`, `Limits`, and the `Execution` that comes back."""

from .client import Sandbox
from .execution import Execution
from .limits import Limits
from .session import Session

__all__ = ["Execution", "Limits", "Sandbox", "Session"]
