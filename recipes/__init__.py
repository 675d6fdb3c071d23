"""One entry point a recipe, for ``torchrun -m groupwise.recipes.NAME``."""
