import re
from dataclasses import replace
from random import Random

from small_tables import InProcess, small_tables, taught

from groupwise.data.renaming import COLUMN, renamed
from groupwise.data.tasks import make_problems, training_views
from groupwise.data.trajectories import Expert


def experts(folder: object) -> list[Expert]:
    views = training_views(small_tables(), 20, seed=1)
    problems = make_problems(views, 60, seed=1, name="sft", folder=str(folder))
    return taught(problems, InProcess(), seed=1)[0]


def text(expert: Expert) -> str:
    return "\n".join([expert.task.description, expert.task.question, *(part for _, part in expert.spans)])


def test_only_names_change_and_each_place_of_a_name_gets_the_same_one(tmp_path) -> None:
    changed = 0
    for number, expert in enumerate(experts(tmp_path)):
        new = renamed(expert, Random(number), avoid={"price"})
        if new is expert:
            continue
        changed += 1
        old_names, new_names = COLUMN.findall(expert.task.description), COLUMN.findall(new.task.description)
        assert len(set(new_names)) == len(old_names)
        assert not set(old_names) & set(new_names)
        assert "price" not in {name.lower() for name in new_names}
        back = text(new)
        for was, now in zip(old_names, new_names, strict=True):
            assert text(expert).count(f'"{was}"') == back.count(f'"{now}"')
            back = back.replace(f'"{now}"', f'"{was}"')
        file = re.compile(r'"[^"]+\.csv"')
        assert file.sub("F", back) == file.sub("F", text(expert))
        assert replace(new, task=expert.task, spans=expert.spans) == expert
    assert changed > 20


def test_a_trajectory_that_shows_a_bare_name_stays_as_it_is(tmp_path) -> None:
    for expert in experts(tmp_path):
        if "Error: '" in text(expert):
            assert renamed(expert, Random(0)) is expert


def test_the_same_state_gives_the_same_names(tmp_path) -> None:
    first = next(e for e in experts(tmp_path) if renamed(e, Random(0)) is not e)
    assert renamed(first, Random(3)) == renamed(first, Random(3)) != renamed(first, Random(4))
