"""One policy talking to one environment: sampler, sandbox, grammars, the many-turn loop."""

from .agent import AgentLimits, run_agent
from .sampler import Sampler, SamplingParams
from .sandbox import Limits, Sandbox
from .task import Task
from .trajectory import Group, Span, Trajectory

__all__ = [
    "AgentLimits",
    "Group",
    "Limits",
    "Sampler",
    "SamplingParams",
    "Sandbox",
    "Span",
    "Task",
    "Trajectory",
    "run_agent",
]
