"""What is asked of a model that helps, a judge or a teacher, and what comes back: a reply, or why there is none."""

from dataclasses import dataclass
from typing import Literal, TypedDict


class Message(TypedDict):
    """One message of a conversation, as chat endpoints take it."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Sampling:
    """How a reply is drawn.

    Args:
        temperature: 0 takes the likeliest.
        max_tokens: of the reply, at most.
        stop: strings at which it ends; it may end with one of them or before it, as the model's server has it.
    """

    temperature: float = 0.0
    max_tokens: int = 1024
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """What a model said, whether ``max_tokens`` cut it, and what it cost; a server that does not say counts 0."""

    text: str
    is_cut: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0


class NoReply(Exception):
    """Why there is no reply.

    Args:
        reason: in words.
        is_transient: another attempt may have one.
        wait_s: after so many seconds, if the server says so.
        is_refusal: it is for what was asked, and other questions may be answered.
    """

    def __init__(
        self, reason: str, is_transient: bool = True, wait_s: float | None = None, is_refusal: bool = False
    ) -> None:
        super().__init__(reason)
        self.is_transient, self.wait_s, self.is_refusal = is_transient, wait_s, is_refusal
