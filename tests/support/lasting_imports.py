"""To be imported before anything large: what is imported from here on stays, so that collections of garbage need not go
through it, neither meanwhile nor afterwards."""

import gc

gc.disable()


def end() -> None:
    """Collections go through what is made from here on."""
    gc.enable()
    gc.freeze()
    gc.set_threshold(100_000)  # graphs are many objects, of which most stay for a while
