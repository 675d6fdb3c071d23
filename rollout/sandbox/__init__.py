"""Isolated execution of model-written code: `Sandbox`, `Session`, `Limits`, `Installer`; `Execution` is the result."""

from .client import Sandbox
from .execution import Execution
from .install import Installer
from .limits import Limits
from .session import Session

__all__ = ["Execution", "Installer", "Limits", "Sandbox", "Session"]
