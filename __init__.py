"""groupwise: trains language models to be data analysts with group-relative policy optimisation."""

__version__ = "0.1.0"
