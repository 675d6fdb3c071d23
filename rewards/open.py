"""A model by its name: behind an endpoint, or in a folder. Judges and teachers are named so."""

import os
import re
from pathlib import Path

import torch

from ..engine.errors import UserError
from .endpoint import Endpoint
from .local import LocalModel


def open_model(
    spec: str, role: str, *, device: torch.device | None, concurrency: int, timeout_s: float, max_tokens: int
) -> Endpoint | LocalModel:
    """The model that ``spec`` names; it is asked nothing yet.

    Args:
        spec: ``MODEL@http://HOST:PORT/v1``, an OpenAI-compatible endpoint whose key, if it needs one, is in the
            environment variable OPENAI_API_KEY; or a Hugging Face folder.
        role: what it is to be, for errors.
        device: of a local model; None: the CPU.
        concurrency: requests at once.
        timeout_s: seconds of one request to an endpoint.
        max_tokens: of a local model's reply.

    Raises:
        UserError: ``spec`` is neither, or the folder does not hold a model.
    """
    if match := re.fullmatch(r"(.+?)@(https?://.+)", spec):
        key = os.environ.get("OPENAI_API_KEY", "")
        return Endpoint(match[1], match[2], api_key=key, concurrency=concurrency, timeout_s=timeout_s)
    if not Path(spec).is_dir():
        raise UserError(f"the {role} {spec!r} is neither MODEL@http://HOST:PORT/v1 nor a folder; name one of the two")
    return LocalModel(Path(spec), device or torch.device("cpu"), concurrency, max_tokens)
