"""Every setting in a table of Markdown, with what the configurations of ``configs/`` give it.

    python -m groupwise.recipes.settings > docs/configuration.md

writes the page that README.md names; a test compares them.
"""

from ..engine.config import SECTIONS, load_config
from ..engine.settings import settings_of, spell, type_name

SHOWN = ("train", "datarus", "datamind")
HEAD = """# Configuration

A configuration is a TOML file, or the name of one in `configs/`; `section.key=value` on a command line changes it,
and the section may be left out where the key is in one section alone. Unknown keys, wrong types and values out of
bounds are refused before anything starts. A run that is resumed keeps its configuration, but for the settings marked *:
those say how it computes and not what. This page is what `python -m groupwise.recipes.settings` prints.
"""


def settings_table() -> str:
    """The page; a cell of a configuration is empty where it leaves the default."""
    values = {name: load_config(name).to_dict() for name in SHOWN}
    lines = [HEAD.rstrip()]
    for section, cls in SECTIONS.items():
        lines += ["", f"## [{section}]", "", (cls.__doc__ or "").strip(), ""]
        lines += ["| | default | " + " | ".join(SHOWN) + " | |", "| --- " * (len(SHOWN) + 3) + "|"]
        for field in settings_of(cls):
            mine = [values[name][section][field.name] for name in SHOWN]
            cells = ["" if value == field.default else spell(value) for value in mine]
            mark = "*" if field.metadata["changeable"] else ""
            text = f"{type_name(cls, field)}: {field.metadata['help']}".replace("|", "\\|")
            lines.append(f"| `{field.name}`{mark} | {spell(field.default)} | {' | '.join(cells)} | {text} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(settings_table())
