"""R_tag: does the model write its grammar, judged on what the model itself wrote.

Prompt, observations, and the turns and closing tags that the agent forces are not looked at. The parser mends what it
can and names what it mended; here every mend counts against the trajectory.
"""

import re

from ..engine.tokenizer import Tokenizer
from ..rollout.grammar import GRAMMARS, Grammar, ParsedTurn, without_end
from ..rollout.trajectory import Trajectory

CHECKS = ("parses", "steps", "answer", "outside", "observation")

# Each fault that the parser names belongs to one check, so that one fault costs one fifth.
MENDED = frozenset(
    {"upper_case_tag", "missing_closing_tag", "code_fence", "missing_wrapper", "unclosed_thought", "nested_tag"}
)
INCOMPLETE = frozenset({"missing_thought", "missing_action", "empty_code"})


def tag_checks(trajectory: Trajectory, tokenizer: Tokenizer) -> dict[str, bool]:
    """The five checks of a trajectory's form, each over all of its model turns.

    parses: every turn is code or an answer, and nothing had to be mended. steps: every turn has its thought and, where
    it runs code, the action and a non-empty input. answer: exactly one non-empty answer, in the last turn. outside: no
    text outside the tags. observation: none written by the model. A trajectory without model text passes none.
    """
    grammar = GRAMMARS[trajectory.task.mode]
    texts = [tokenizer.decode(span.token_ids) for span in trajectory.spans if span.writer == "model"]
    if not "".join(texts).strip():
        return dict.fromkeys(CHECKS, False)
    turns = [grammar.parse_turn(text) for text in texts]
    names = {name for turn in turns for name in turn.repairs}
    answers = [turn for turn in turns if turn.kind == "answer" and turn.content.strip()]
    voids = [text for text, turn in zip(texts, turns, strict=True) if turn.kind == "void"]
    return {
        "parses": not voids and not names & MENDED,
        "steps": not names & INCOMPLETE,
        "answer": len(answers) == 1 and _is_only_answer(turns),
        "outside": "text_outside_tags" not in names and not any(_has_text_outside(grammar, text) for text in voids),
        "observation": "forged_observation" not in names and not any(_has_observation(grammar, text) for text in voids),
    }


def tag_reward(trajectory: Trajectory, tokenizer: Tokenizer) -> float:
    """R_tag in [0, 1]: the mean of the five checks of ``tag_checks``."""
    return sum(tag_checks(trajectory, tokenizer).values()) / len(CHECKS)


def format_right(trajectory: Trajectory, tokenizer: Tokenizer) -> bool:
    """Whether every model turn is well formed and the last holds the one answer (DataMind, arXiv 2509.25084)."""
    return all(tag_checks(trajectory, tokenizer).values())


def _is_only_answer(turns: list[ParsedTurn]) -> bool:
    return turns[-1].kind == "answer" and all(turn.kind != "answer" for turn in turns[:-1])


# The parser stops reading at a void turn; what such a turn holds besides is looked at here.


def _has_text_outside(grammar: Grammar, text: str) -> bool:
    text = without_end(text)
    names = [tag[1:-1] for tag in grammar.tags if not tag.startswith("</")]
    # Outer wrappers first: their removal would hide text between the pairs inside, so only inner pairs are removed.
    inner = [name for name in names if name not in (grammar.step, grammar.final)]
    for name in inner:
        text = re.sub(rf"<{name}>.*?(?:</{name}>|\Z)", "", text, flags=re.DOTALL | re.IGNORECASE)
    return bool(re.sub(rf"</?(?:{'|'.join(names)})>", "", text, flags=re.IGNORECASE).strip())


def _has_observation(grammar: Grammar, text: str) -> bool:
    return grammar.result is not None and re.search(rf"</?{grammar.result}>", text, re.IGNORECASE) is not None
