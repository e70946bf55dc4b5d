"""Errors that a user's own code raises, told with the user's own lines."""

import contextlib
import os
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

from zoscope import runtime
from zoscope.errors import SpecError, ZoscopeError

_OWN = str(Path(__file__).parent.parent) + os.sep
_LIBRARIES = tuple({sysconfig.get_paths()[key] + os.sep for key in ("stdlib", "platstdlib", "purelib", "platlib")})
_MOST_FRAMES = 6


def user_frames(error: BaseException) -> traceback.StackSummary:
    """The frames of an error that are the user's: not zoscope's, not the interpreter's, not a library's.

    Where an error never passed through the user's own files, the innermost frame outside of zoscope is kept.
    """
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        frame = traceback.FrameSummary(
            error.filename, error.lineno, "<module>", line=(error.text or "").strip() or None
        )
        return traceback.StackSummary.from_list([frame])
    frames = traceback.extract_tb(error.__traceback__)
    outside = [f for f in frames if not f.filename.startswith((_OWN, "<frozen ", "<string>"))]
    own = [f for f in outside if not f.filename.startswith(_LIBRARIES)]
    return traceback.StackSummary.from_list((own or outside[-1:])[-_MOST_FRAMES:])


def format_frames(error: BaseException) -> str:
    """The user's frames as in a traceback (file, line, source), without a final newline."""
    return "".join(user_frames(error).format()).rstrip()


def where(error: BaseException) -> str:
    """Place of an error, such as `` (model.py, line 12)``; empty where unknown."""
    frames = user_frames(error)
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def described(error: BaseException) -> str:
    """Type and first paragraph of an error's message."""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    first = text.strip().split("\n\n")[0].replace("\n", " ")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


@contextlib.contextmanager
def user_code(what: str, *, remedy: str) -> Iterator[None]:
    """Turn what the user's code raises inside into a SpecError with the user's frame.

    Errors of zoscope itself and lack of memory pass through.

    Args:
        what: Subject of the sentence, e.g. ``"The loss function"``.
        remedy: Last sentence, unless the error says more itself.
    """
    try:
        yield
    except ZoscopeError:
        raise
    except Exception as error:
        if runtime.is_out_of_memory(error):
            raise
        said = runtime.explain_autograd_error(error) or _hint(error) or remedy
        raise SpecError(
            f"{what} raised {described(error)}{where(error)}. {said}", frame=format_frames(error)
        ) from error


def _hint(error: BaseException) -> str | None:
    text = str(error)
    if "call numpy() on Tensor that requires grad" in text:
        return "For a loss that leaves torch use 'zoscope bounds --curvature forward', which takes no derivatives."
    if "same device" in text or ("device" in text and "cuda" in text and "cpu" in text):
        return (
            "A tensor that is neither in the model nor in the batches lives on another device: "
            "register it as a buffer, put it into the batches, or use --device cpu."
        )
    if "same dtype" in text or "expected scalar type" in text:
        return (
            "A tensor that is neither in the model nor in the batches has another dtype: "
            "register it as a buffer, put it into the batches, or choose --dtype."
        )
    return None
