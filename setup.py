"""The repository root is the package ``groupwise``: its folders stay at the top, an installed copy claims one name."""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
FOLDERS = [
    "engine",
    "kernels",
    "rollout",
    "rollout.sandbox",
    "rewards",
    "data",
    "data.asking",
    "data.teaching",
    "recipes",
    "configs",
]
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "__init__.py").read_text())[1]  # type: ignore[index]


class Build(build_py):
    """Leaves this file, which stands in the package's root, out of the package."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return [module for module in super().find_package_modules(package, package_dir) if module[1] != "setup"]


setup(
    cmdclass={"build_py": Build},
    name="groupwise",
    version=VERSION,
    description="Trains language models to be data analysts with group-relative policy optimisation",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    python_requires=">=3.11,<3.13",
    package_dir={"groupwise": "."},
    packages=["groupwise", *(f"groupwise.{folder}" for folder in FOLDERS)],
    package_data={"groupwise": ["py.typed"], "groupwise.configs": ["*.toml"]},
    install_requires=[
        "torch>=2.11,<2.14",
        'triton>=3.6,<3.10; sys_platform == "linux" and platform_machine == "x86_64"',
        "numpy>=1.26",
        "safetensors>=0.4",
        "tokenizers>=0.20",
        "pandas>=2.2",
        "rich>=13",
        "matplotlib>=3.8",
        "tensorboard>=2.16",
        "nbformat>=5",
        "httpx>=0.27",
    ],
    extras_require={
        "cuda": ["flash-attn", "xformers"],
        "data": ["openpyxl>=3.1", "scikit-learn>=1.4", "statsmodels>=0.14"],
        "sql": ["duckdb>=1.1"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "transformers>=4.46",
            "trl>=1.16,<1.17",
            "liger-kernel>=0.8.5,<0.9",
            "nbclient>=0.10",
            "ipykernel>=6",
            "duckdb>=1.1",
        ],
        "dev": ["ruff", "mypy", "pandas-stubs"],
    },
)
