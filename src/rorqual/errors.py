"""The one exception a user is meant to see."""


class UserError(Exception):
    """Something the user gave is wrong: one sentence naming the file, field, value and the remedy.

    The command line prints the message alone and exits with status 2; a library caller can catch it.
    """
