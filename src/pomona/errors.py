"""The one exception a user's mistake raises."""


class PomonaError(Exception):
    """A mistake in the user's input, told in one sentence that names the culprit and the remedy.

    The command line prints the sentence and exits with code 2; everything else is a bug of ours and
    keeps its traceback.
    """
