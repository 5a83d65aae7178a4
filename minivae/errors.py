"""The one exception that means: the user's input is wrong, and here is what was expected."""


class InputError(Exception):
    """Bad input. The message is one line that names the file or option and what was expected."""
