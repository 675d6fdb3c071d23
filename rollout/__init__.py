"""One policy talking to one environment: sampler, sandbox, grammars, the many-turn loop."""

from .agent import AgentLimits, run_agent
from .sampler import Sampler, SamplingParams
from .sandbox import Execution, Installer, Limits, Sandbox, Session
from .task import Task
from .trajectory import Group, Span, Trajectory

__all__ = [
    "AgentLimits",
    "Execution",
    "Group",
    "Installer",
    "Limits",
    "Sampler",
    "SamplingParams",
    "Sandbox",
    "Session",
    "Span",
    "Task",
    "Trajectory",
    "run_agent",
]
