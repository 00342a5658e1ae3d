"""The one exception that means: the user's input is wrong."""


class InputError(Exception):
    """One line that names the key or file, its value, the rule it breaks and the remedy. The command line prints it
    and exits with code 2."""
