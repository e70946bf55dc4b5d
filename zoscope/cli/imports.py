"""Loading torch, which takes longer than everything else that a small problem asks for."""

import gc
import sys


def load_torch() -> None:
    """Import torch without looking for garbage among what it makes: none of it goes before the program ends.

    Half a million objects, at every one of the collections that making them sets off; frozen, they are left out of
    the later ones too.
    """
    if "torch" in sys.modules:
        return
    collects = gc.isenabled()
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        if collects:
            gc.enable()
    gc.freeze()
