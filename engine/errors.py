"""The one exception that a recipe shows to its user as a single sentence."""


class UserError(ValueError):
    """Something the user can mend: a setting, a file, a launch. Recipes print it in one line and exit with status 2."""
