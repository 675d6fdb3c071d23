"""Trees of continuations: their values, their compression, and how they grow, against naive counts."""

from collections.abc import Sequence
from random import Random

from hypothesis import given
from hypothesis import strategies as st
from scripted import LIMITS, Characters, ScriptedSampler, ScriptedSandbox, answer, code, task

from groupwise.rewards.hierarchical import step_sequence
from groupwise.rewards.search import BRANCHING, DEPTH, WIDTH, Node, grow, insert, merged, tree_sequences
from groupwise.rollout.agent import run_agent
from groupwise.rollout.draw import SamplingParams
from groupwise.rollout.sandbox import Execution
from groupwise.rollout.task import Task
from groupwise.rollout.trajectory import Group, Span, Trajectory

PROMPT = "[system][How many?]"


def trajectory(steps: str, status: str = "answered") -> Trajectory:
    """A letter a step: code that prints it, which fails for "x"; the last is the answer, and 3 is right."""
    spans, executions = [Span("prompt", Characters().encode(PROMPT))], []
    for letter in steps[:-1]:
        spans += [Span("model", Characters().encode(code(letter))), Span("environment", Characters().encode(letter))]
        executions.append(Execution(letter != "x", letter, "ok", 0.0))
    spans.append(Span("model", Characters().encode(answer(steps[-1]))))
    return Trajectory(task(), 0, spans, status, answer=steps[-1], executions=executions)


def tree(words: Sequence[str]) -> Node:
    root = Node(Characters().encode(PROMPT))
    for word in words:
        insert(root, trajectory(word), Characters())
    return root


words = st.lists(st.tuples(st.text("abx", max_size=3), st.sampled_from("34")).map("".join), min_size=1, max_size=12)


def prefixes(found: Sequence[str]) -> list[str]:
    return sorted({word[:size] for word in found for size in range(1, len(word) + 1)})


def naive_label(prefix: str, found: Sequence[str], kind: str) -> float:
    """By looking through all trajectories."""
    through = [word for word in found if word.startswith(prefix)]
    share = sum(word[-1] == "3" for word in through) / len(through)
    if prefix[-1] == "x":
        return 0.0
    return float(share > 0) if kind == "binary" else 0.0 if share == 0 else 1.0 if share == 1 else 0.5


def nodes(node: Node, path: str = "") -> dict[str, Node]:
    """By the letters that lead to them."""
    found = {}
    for child in node.children:
        [turn] = child.turns
        letter = turn.split("\n")[2] if "<code>" in turn else turn[-len("3</answer>")]
        found |= {path + letter: child} | nodes(child, path + letter)
    return found


@given(words)
def test_a_step_is_worth_the_share_of_right_ends(found: list[str]) -> None:
    by_path = nodes(root := tree(found))
    assert sorted(by_path) == prefixes(found)
    assert root.leaves() == (sum(word[-1] == "3" for word in found), len(found))
    for prefix, node in by_path.items():
        assert [node.label(kind) for kind in ("binary", "graded")] == [
            naive_label(prefix, found, kind) for kind in ("binary", "graded")
        ]


@given(words, st.sampled_from(["binary", "graded"]))
def test_each_step_and_each_pair_is_learnt_once(found: list[str], kind: str) -> None:
    steps, pairs = {}, {}
    for sequence in tree_sequences(tree(found), kind):
        text = Characters().decode(sequence.token_ids)
        assert text.startswith(PROMPT)
        first = sequence.prompt_tokens
        path = ""
        for end, step, pair in zip(sequence.ends, sequence.step_labels, sequence.pair_labels, strict=True):
            path += text[first : end + 1].removesuffix("</answer>")[-1]
            first = end + 1
            for labels, label in ((steps, step), (pairs, pair)):
                assert label is None or path not in labels
                if label is not None:
                    labels[path] = label
        assert first == len(sequence.token_ids)
    expected = {prefix: naive_label(prefix, found, kind) for prefix in prefixes(found)}
    assert steps == expected
    assert pairs == {prefix: label for prefix, label in expected.items() if len(prefix) > 1}


@given(words)
def test_a_merged_step_is_one_whose_children_are_the_childs(found: list[str]) -> None:
    by_path = nodes(tree(found))
    for prefix, child in by_path.items():
        if len(prefix) == 1:
            continue
        node = merged(parent := by_path[prefix[:-1]], child)
        assert node.token_ids == parent.token_ids + child.token_ids
        assert node.children is child.children
        assert node.leaves() == child.leaves()
        # Compressed in the text itself: the same trajectories, with two steps written as one.
        assert node.label("binary") == naive_label(prefix, found, "binary")
        assert len(node.turns) == 2


def test_one_path_is_the_trajectory() -> None:
    word = trajectory("xa3")
    root = Node(Characters().encode(PROMPT))
    insert(root, word, Characters())
    insert(root, word, Characters())
    [sequence] = tree_sequences(root, "binary")
    assert sequence == step_sequence(word.spans, [0.0, 1.0, 1.0])


def test_equal_turns_with_other_results_are_other_steps() -> None:
    root, first, second = Node([]), trajectory("a3"), trajectory("a4")
    second.spans[2] = Span("environment", Characters().encode("another"))
    for found in (first, second):
        insert(root, found, Characters())
    assert [child.leaves() for child in root.children] == [(1, 1), (0, 1)]


class Policy:
    """Answers or goes on by chance, and counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[list[tuple[str, ...]]] = []

    def __call__(self, tasks: Sequence[Task], openings: Sequence[Sequence[str]], count: int) -> list[Group]:
        self.asked.append([tuple(opening) for opening in openings])
        rng = Random(len(self.asked))
        script = {}
        for sample in range(count):
            for turn in range(4):
                ends = turn == 3 or rng.random() < 0.2
                script[sample, turn] = answer(rng.choice("34")) if ends else code(rng.choice(["a", "bad"]))
        return run_agent(
            ScriptedSampler(script), ScriptedSandbox(), tasks, tokenizer=Characters(), num_generations=count,
            params=SamplingParams(), limits=LIMITS, seed=0, openings=openings,
        )  # fmt: skip


def test_trees_grow_from_steps_that_go_on() -> None:
    policy = Policy()
    tasks = [task(0), task(1)]
    roots = grow(tasks, policy, Characters())
    assert len(policy.asked) == DEPTH + 1
    assert policy.asked[0] == [(), ()]
    for depth, openings in enumerate(policy.asked):
        assert all(len(opening) == depth for opening in openings)
        assert 0 < len(openings) <= WIDTH * len(tasks)
    for root in roots:
        assert Characters().decode(root.token_ids).startswith("[")
        assert BRANCHING < root.leaves()[1] <= BRANCHING * (1 + DEPTH * WIDTH)
        assert tree_sequences(root, "graded")
    assert sum(root.leaves()[1] for root in roots) == BRANCHING * sum(map(len, policy.asked))


def test_what_cannot_be_grown_leaves_nothing() -> None:
    calls = []

    def continue_from(tasks: Sequence[Task], openings: Sequence[Sequence[str]], count: int) -> list[Group]:
        calls.append(len(tasks))
        prompt = Span("prompt", Characters().encode(PROMPT))
        return [Group(each, [Trajectory(each, 0, [prompt], "failed")]) for each in tasks]

    roots = grow([task()], continue_from, Characters())
    assert calls == [1, *[0] * DEPTH]
    assert tree_sequences(roots[0], "binary") == []
    assert grow([], continue_from, Characters()) == []
