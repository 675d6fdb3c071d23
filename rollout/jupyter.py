"""What the first cell of a notebook does: functions whose source is copied there, where this package is not needed."""


def imitate_sandbox(files: list[str]) -> None:
    """Makes a Jupyter kernel run cells as the sandbox ran them.

    Works in a temporary folder, with a copy of each file: that which lies beside the notebook, else that at its path.
    """
    import ast
    import os
    import random
    import shutil
    import sys
    import tempfile
    import warnings
    from typing import Any

    import numpy
    import pandas
    from IPython import get_ipython

    class Exits(ast.NodeTransformer):
        """Lets `sys.exit()` end a cell; to IPython it is an error."""

        def visit_Module(self, tree: ast.Module) -> ast.Module:
            future = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
            guard: Any = ast.parse("try: pass\nexcept SystemExit as _exit:\n    if _exit.code not in (None, 0): raise")
            guard = guard.body[0]
            guard.body = [node for node in tree.body if node not in future] or guard.body
            tree.body = [*future, guard]
            return ast.fix_missing_locations(tree)

    succeeded = -1  # cells; the first, this one, is none of the sandbox's

    def count(result: Any) -> None:
        nonlocal succeeded
        succeeded += result.success

    shell: Any = get_ipython()
    shell.ast_node_interactivity = "none"  # what is not printed is not shown
    shell.ast_transformers.append(Exits())
    shell.events.register("post_run_cell", count)
    shell.compile.get_code_name = lambda *_: f"<cell {succeeded + 1}>"
    shell.user_ns["exit"] = shell.user_ns["quit"] = sys.exit  # IPython's end the kernel
    sys.argv, sys.stderr = [""], sys.stdout
    os.environ.update(MPLBACKEND="Agg", COLUMNS="80", LINES="24")
    warnings.simplefilter("ignore")
    pandas.set_option("display.max_columns", 0)  # as many as fit the width
    pandas.set_option("mode.string_storage", "python")
    shell.working_folder = tempfile.TemporaryDirectory()  # removed with the kernel
    for path in files:
        beside = os.path.basename(path)
        shutil.copy(beside if os.path.exists(beside) else path, shell.working_folder.name)
    os.chdir(shell.working_folder.name)
    random.seed(0)
    numpy.random.seed(0)


def add_failures() -> None:
    """Adds the cell magics `%%forked` and `%%stopped` to a Jupyter kernel, for cells that failed in the sandbox."""
    import io
    import json
    import linecache
    import os
    import random
    import sys
    import traceback
    import warnings
    from typing import Any

    from IPython import get_ipython
    from IPython.core.magic import no_var_expand

    shell: Any = get_ipython()

    def fail(name: str, message: str, lines: list[str]) -> None:
        raise type(name, (Exception,), {"_render_traceback_": lambda self: lines})(message)

    def run(code: str) -> tuple[str, str, list[str]]:
        name = shell.compile.get_code_name()
        linecache.cache[name] = len(code), None, code.splitlines(keepends=True), name
        try:
            exec(compile(code, name, "exec", dont_inherit=True), shell.user_ns)
        except SystemExit as leaving:
            if isinstance(leaving.code, str):
                print(leaving.code)
            return "" if leaving.code in (None, 0) else "SystemExit", "", []
        except BaseException as error:
            behind = error.__traceback__ and error.__traceback__.tb_next
            message = error.msg if isinstance(error, SyntaxError) else str(error)
            return type(error).__name__, message.strip(), traceback.format_exception(type(error), error, behind)
        return "", "", []

    def forked(line: str, cell: str) -> None:
        """Runs a cell in a forked copy of this kernel: of a cell that failed in the sandbox nothing stayed either."""
        state = random.getstate()
        receive, send = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this kernel has threads
            pid = os.fork()
        if pid == 0:
            try:
                random.setstate(state)  # the module seeds itself anew in a fork
                sys.stdout = sys.stderr = printed = io.StringIO()
                result = run(cell)
                with open(send, "w") as pipe:
                    json.dump([printed.getvalue(), *result], pipe)
            finally:
                os._exit(0)
        os.close(send)
        with open(receive) as pipe:
            text, name, message, lines = json.load(pipe)
        os.waitpid(pid, 0)
        print(text, end="")
        if name:
            fail(name, message, lines)

    @no_var_expand
    def stopped(line: str, cell: str) -> None:
        """Does not run a cell that the sandbox refused or had to end, or a query that failed; the line says why."""
        name, _, message = line.partition(": ")
        fail(name, message, [line])

    for magic in (forked, stopped):
        shell.register_magic_function(magic, "cell")


def add_sql(files: list[str]) -> None:
    """Adds the cell magic `%%sql` to a Jupyter kernel: it runs a query over the files, and pandas prints the result.

    As in the sandbox, SQLite reads databases (the first is `main`; of several, each has its stem as its name), and
    where there is none, DuckDB reads .csv files as tables named by their stems.
    """
    import os
    import sqlite3
    from typing import Any

    import pandas
    from IPython import get_ipython

    names = {os.path.basename(path): os.path.splitext(os.path.basename(path))[0] for path in files}
    databases = [name for name in names if name.lower().endswith((".sqlite", ".sqlite3", ".db", ".db3"))]
    connection: Any
    if databases:
        connection = sqlite3.connect(databases[0])
        for name in databases if len(databases) > 1 else ():
            connection.execute("ATTACH ? AS ?", (name, names[name]))
    else:
        import duckdb

        connection = duckdb.connect()
        for name, stem in names.items():
            connection.from_csv_auto(name, header=True).create(stem)

    def sql(line: str, cell: str) -> None:
        cursor = connection.execute(cell)
        columns = [column[0] for column in cursor.description]
        print(pandas.DataFrame(cursor.fetchall(), columns=columns).to_string(index=False, max_rows=10))

    shell: Any = get_ipython()
    shell.register_magic_function(sql, "cell")
