"""What zoscope raises when it cannot go on; each class knows the exit code of the command line."""

from zoscope.text import clean


class ZoscopeError(Exception):
    """A failed run. The message is one paragraph: what happened, where, what was expected, what to do.

    Args:
        message: The paragraph; control characters of what it quotes are shown as signs.
    """

    exit_code = 3

    def __init__(self, message: str = "") -> None:
        super().__init__(clean(message))


class UsageError(ZoscopeError):
    """A mistake in an option, a config file or a call: exit code 2."""

    exit_code = 2


class SpecError(UsageError):
    """A spec, or the problem that it returns, cannot be used: exit code 2.

    Args:
        message: One paragraph.
        frame: The user's own traceback lines (file, line, source), already formatted; empty when no user code raised.
    """

    def __init__(self, message: str, *, frame: str = "") -> None:
        super().__init__(message)
        self.frame = frame


class OutputError(ZoscopeError):
    """The result cannot be written where it should go: exit code 3."""


class NumericalError(ZoscopeError):
    """Non-finite loss or curvature, precision not reached under ``strict``, or out of memory: exit code 3."""


def require_package(module: str, *, option: str, extra: str) -> None:
    """Fail early, and say how to go on.

    Args:
        module: What has to be there.
        option: What asked for it.
        extra: The optional dependencies of zoscope that bring it along.

    Raises:
        UsageError: If it is not installed.
    """
    try:
        __import__(module)
    except ImportError:
        name = module.partition(".")[0]
        raise UsageError(
            f"{option} needs {name}, which is not installed. Install it with: pip install 'zoscope[{extra}]'"
        ) from None
