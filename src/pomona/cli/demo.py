"""`pomona demo`."""


def demo() -> None:
    """Demo."""
