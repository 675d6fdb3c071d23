"""What a run's questions are about: tables and databases to train on, and others to evaluate on."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.databases import Database, find_databases
from ..data.reading import DATABASES, SUFFIXES, Dropped, find_files
from ..data.tables import MAX_NAME, Table, find_tables, split_tables
from ..data.tasks import Problem, evaluation_views, headers, make_problems, make_sql_problems, training_views
from ..data.views import View, whole_view
from ..engine.config import Config
from ..rollout.grammar import GRAMMARS

DESCRIPTION_CHARS = 3000  # of a table in full detail, about 1,000 tokens
LONG_NAME = 60  # characters of a column's name in full detail


@dataclass(frozen=True)
class Part:
    """Tables and databases that serve one purpose."""

    tables: list[Table]
    databases: list[Database]

    @property
    def names(self) -> list[str]:
        """Of all of them, sorted."""
        return sorted([*(table.name for table in self.tables), *(database.name for database in self.databases)])

    @property
    def headers(self) -> frozenset[str]:
        """All column names."""
        stored = (str(name) for database in self.databases for table in database.tables for name in table.frame.columns)
        return headers(self.tables) | frozenset(stored)

    @property
    def sql_share(self) -> float:
        """Of the questions, those for databases: a stored table counts as much as any other."""
        stored = sum(len(database.usable) for database in self.databases)
        return stored / max(stored + len(self.tables), 1)


class Sources:
    """Finds what ``data.tables`` names, and poses problems about it in the configured detail.

    In full detail a database is asked by SQL, in short detail each of its tables is a table like others.

    Args:
        config: of the run.
        folder: where the files of problems go.
        evaluation: what a run that has its data evaluates on, by name; a folder of tables may have grown since.
    """

    def __init__(self, config: Config, folder: Path, evaluation: Collection[str] | None = None) -> None:
        data = config.data
        self._config, self.folder = config, folder
        self.dropped: list[Dropped] = []
        databases: list[Database] = []
        suffixes: tuple[str, ...] = SUFFIXES
        if data.detail == "full" and data.tables:
            databases, self.dropped = find_databases(data.tables)
            databases = [database for database in databases if database.usable]
            suffixes = tuple(suffix for suffix in SUFFIXES if suffix not in DATABASES)
        tables: list[Table] = []
        if not databases or find_files(data.tables, suffixes)[0]:
            max_name = LONG_NAME if data.detail == "full" else MAX_NAME
            tables, dropped = find_tables(data.tables or None, suffixes=suffixes, max_name=max_name)
            self.dropped += dropped
        # A single one of a kind serves training, if the other kind can serve evaluation.
        seed = config.run.seed
        one_table, one_database = len(tables) == 1 and len(databases) > 1, len(databases) == 1 and len(tables) > 1
        tables_split = (tables, []) if one_table or not tables else split_tables(tables, seed=seed)
        databases_split = (databases, []) if one_database or not databases else split_tables(databases, seed=seed)
        self.training = Part(tables_split[0], databases_split[0])
        self.evaluation = Part(tables_split[1], databases_split[1])
        if evaluation is not None:
            self.evaluation = Part(
                [table for table in tables if table.name in evaluation],
                [database for database in databases if database.name in evaluation],
            )
        self._views: list[View] = []

    def training_views(self) -> list[View]:
        """What training questions about tables are about; names of what is evaluated on never come up in short ones."""
        if not self._views and self._config.data.detail == "full":
            self._views = [whole_view(table, DESCRIPTION_CHARS) for table in self.training.tables]
        elif not self._views:
            count = max(1, self._config.data.num_trajectories * 2 // 5)
            avoid, seed = self.evaluation.headers, self._config.run.seed
            self._views = training_views(self.training.tables, count, seed=seed, avoid=avoid)
        return self._views

    def training_problems(self, count: int, name: str, modes: Mapping[str, float]) -> list[Problem]:
        """Problems to train on."""
        return self._pose(self.training_views() if self.training.tables else [], self.training, count, name, modes)

    def evaluation_problems(self, count: int, name: str, modes: Mapping[str, float]) -> list[Problem]:
        """Problems to evaluate on."""
        tables = self.evaluation.tables
        if self._config.data.detail == "full":
            views = [whole_view(table, DESCRIPTION_CHARS) for table in tables]
        else:
            views = evaluation_views(tables, count // 2 + 1, seed=self._config.run.seed) if tables else []
        return self._pose(views, self.evaluation, count, name, modes)

    def _pose(
        self, views: Sequence[View], part: Part, count: int, name: str, modes: Mapping[str, float]
    ) -> list[Problem]:
        seed, problems = self._config.run.seed, []
        of_sql = round(count * part.sql_share)
        if count > of_sql:
            detail = self._config.data.detail
            problems += make_problems(
                views, count - of_sql, seed=seed, name=name, folder=self.folder, modes=modes, detail=detail
            )
        if of_sql:
            problems += make_sql_problems(
                part.databases, of_sql, seed=seed, name=f"{name}-sql", folder=self.folder, modes=modes
            )
        return problems

    def digest(self) -> str:
        """A hash of what there is to train on, so that a run whose tables changed meanwhile is not gone on with."""
        digest = hashlib.sha256()
        for table in self.training.tables:
            digest.update(f"{table.name}\n{table.frame.to_csv(index=False)}\n".encode())
        for database in self.training.databases:
            digest.update(f"{database.name}\n{database.description}\n".encode())
        return digest.hexdigest()


def shares_with_code(modes: Mapping[str, float]) -> dict[str, float]:
    """Of the shares of the grammars, those in which code runs."""
    return {mode: share for mode, share in modes.items() if share and GRAMMARS[mode].code}
