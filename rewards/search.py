"""Labels of steps without a teacher: a tree of a policy's own continuations says where they lead.

A node is a step, the root stands for the prompt, and a path from the root is a trajectory. A step is worth the share of
right answers among the trajectories that go through it. Hierarchical node compression (arXiv 2503.13551, 3.2) merges
a child into its parent: one step in place of two, with the child's worth, the child's children below it. That is the
merged pair on which the model's second number learns, so each edge of the tree gives one more sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ..engine.scorer import StepSequence
from ..engine.tokenizer import Tokenizer
from ..rollout.task import Task
from ..rollout.trajectory import Group, Trajectory, turn_starts
from .answer import trajectory_correct
from .hierarchical import Labels

BRANCHING = 4  # continuations of a node
WIDTH = 4  # nodes of one depth that are continued
DEPTH = 2  # steps behind which continuations begin, at most

Continue = Callable[[Sequence[Task], Sequence[Sequence[str]], int], list[Group]]
"""Tasks, an opening for each, and a number of continuations -> a group for each."""


@dataclass(eq=False)
class Node:
    """A step.

    Args:
        token_ids: of the turn and the observation behind it; of the prompt, at the root.
        turns: the text of the turn; none at the root, two of a merged step.
        observation: token ids of the observation, by which equal turns with other results are told apart.
        failed: its code ended with an error.
        children: the steps that were seen to follow it.
        right, ended: how many trajectories end with this step and the right answer, and with this step at all.
    """

    token_ids: list[int]
    turns: tuple[str, ...] = ()
    observation: tuple[int, ...] = ()
    failed: bool = False
    children: list[Node] = field(default_factory=list)
    right: int = 0
    ended: int = 0

    def leaves(self) -> tuple[int, int]:
        """Trajectories through this step: how many end with the right answer, and how many there are."""
        below = [child.leaves() for child in self.children]
        return self.right + sum(right for right, _ in below), self.ended + sum(ended for _, ended in below)

    def label(self, kind: Labels) -> float:
        """How sound the step is: 0 if it failed or nothing right follows from it.

        Else 1 ("binary"), or 1/2 where something wrong follows too ("graded").
        """
        right, ended = self.leaves()
        if self.failed or not right:
            return 0.0
        return 0.5 if kind == "graded" and right < ended else 1.0


def merged(parent: Node, child: Node) -> Node:
    """One step in place of two: what follows, and so the worth, is the child's; wrong and then right is right."""
    return Node(
        parent.token_ids + child.token_ids,
        parent.turns + child.turns,
        child.observation,
        child.failed,
        child.children,
        child.right,
        child.ended,
    )


def insert(root: Node, trajectory: Trajectory, tokenizer: Tokenizer) -> None:
    """Adds a trajectory to the tree of its task; steps that are there already are counted and not repeated."""
    node, spans = root, trajectory.spans
    starts = turn_starts([span.writer for span in spans])
    texts = trajectory.model_text(tokenizer)
    for number, (start, stop) in enumerate(pairwise([*starts, len(spans)])):
        observation = tuple(i for span in spans[start:stop] if span.writer == "environment" for i in span.token_ids)
        same = (child for child in node.children if (child.turns, child.observation) == ((texts[number],), observation))
        child = next(same, None)
        if child is None:
            failed = number < len(trajectory.executions) and not trajectory.executions[number].ok
            ids = [token for span in spans[start:stop] for token in span.token_ids]
            child = Node(ids, (texts[number],), observation, failed)
            node.children.append(child)
        node = child
    node.ended += 1
    node.right += trajectory_correct(trajectory)


def grow(tasks: Sequence[Task], continue_from: Continue, tokenizer: Tokenizer) -> list[Node]:
    """A tree for each task.

    First ``BRANCHING`` trajectories from the prompt; then, depth by depth up to ``DEPTH``, as many from each of the
    first ``WIDTH`` steps that were seen to go on. A trajectory that failed for reasons of its own is left out.

    Args:
        continue_from: called DEPTH + 1 times, also where nothing is left to continue.
    """
    roots = [Node([]) for _ in tasks]
    for depth in range(DEPTH + 1):
        places = [
            (number, opening)
            for number, root in enumerate(roots)
            for opening in list(_openings(root, depth))[:WIDTH]
        ]  # fmt: skip
        groups = continue_from([tasks[number] for number, _ in places], [opening for _, opening in places], BRANCHING)
        for (number, _), group in zip(places, groups, strict=True):
            for trajectory in group.trajectories:
                roots[number].token_ids = trajectory.spans[0].token_ids
                if trajectory.status != "failed":
                    insert(roots[number], trajectory, tokenizer)
    return roots


def _openings(node: Node, depth: int) -> Iterator[list[str]]:
    """The turns that lead to each step at this depth below a node which something follows."""
    if depth == 0:
        yield list(node.turns)
        return
    for child in node.children:
        if child.children:
            yield from ([*node.turns, *rest] for rest in _openings(child, depth - 1))


def tree_sequences(root: Node, kind: Labels) -> list[StepSequence]:
    """The tree as trajectories to learn from, in which each step, and each merged pair, has its label once."""
    sequences: list[StepSequence] = []
    labelled: set[int] = set()
    for path in _paths(root):
        ids, ends = list(root.token_ids), []
        steps: list[float | None] = []
        pairs: list[float | None] = []
        for parent, node in pairwise(path):
            ids += node.token_ids
            ends.append(len(ids) - 1)
            known = id(node) in labelled
            steps.append(None if known else node.label(kind))
            pairs.append(None if known or parent is root else merged(parent, node).label(kind))
            labelled.add(id(node))
        sequences.append(StepSequence(ids, len(root.token_ids), ends, steps, pairs))
    return sequences


def _paths(node: Node) -> Iterator[list[Node]]:
    """From a node to each step below it that nothing follows; none where nothing follows the root."""
    for child in node.children:
        if child.children:
            yield from ([node, *path] for path in _paths(child))
        else:
            yield [node, child]
