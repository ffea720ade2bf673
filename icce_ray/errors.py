"""Errors, by who has to fix them.

The user has to fix a ``UserError``: its message gives the value, the bound and the remedy, and the program prints it
without a traceback and exits with code 2, as it does for a full disk and for paths that cannot be used. All other
errors are ours or the machine's: exit code 1, with the cause on the last line.
"""


class UserError(ValueError):
    """A setting, a path or an input that cannot work. The message gives the value, the bound and the remedy."""


class ConfigError(UserError):
    """A wrong key, type or combination in a config. Raised before any work starts."""


class InputError(UserError):
    """Images, embeddings or labels that cannot be used: missing, empty, of the wrong shape, not finite."""


class BusyError(InputError):
    """Another job is writing the artifact at the moment; its result can be used afterwards."""


class ResourceError(UserError):
    """The machine or cluster lacks the resources that the config asks for."""


class DamagedArtifactError(RuntimeError):
    """A part on storage is missing, or its bytes do not match its manifest."""


class WorkerError(RuntimeError):
    """A distributed stage failed in spite of retries. Finished parts stay, and the same command resumes."""


def find_cause(error: BaseException, kind: type[BaseException]) -> BaseException | None:
    """The first error of `kind` among `error` and its causes, or None.

    Ray wraps a worker's error (``cause``) and its trainer wraps it again (``worker_failures``); Python chains the rest.
    An error that Ray derived from ours is skipped: its text is a remote traceback.
    """
    pending, seen = [error], set[int]()
    while pending:
        current = pending.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, kind) and not isinstance(getattr(current, "cause", None), BaseException):
            return current
        pending += _causes(current)
        if current.__context__ is not None and not current.__suppress_context__:
            pending.append(current.__context__)
    return None


def one_line(error: BaseException) -> str:
    """Type and start of the message of an error."""
    return f"{type(error).__name__}: {message_of(error)}"[:200].rstrip()


def message_of(error: BaseException) -> str:
    """Start of the message of an error, in one line."""
    return " ".join(str(error).split())[:200]


def describe_cause(error: BaseException) -> str:
    """One line about the error at the bottom of a chain of wrapped errors."""
    current, seen = error, {id(error)}
    while (below := next(iter(_causes(current)), None)) is not None and id(below) not in seen:
        seen.add(id(below))
        current = below
    text = " ".join(str(current).split())
    if isinstance(current, (WorkerError, DamagedArtifactError)):
        return text
    return f"{type(current).__name__}: {text}" if text else type(current).__name__


def _causes(error: BaseException) -> list[BaseException]:
    """The errors that an error names as its cause."""
    failures = getattr(error, "worker_failures", None)
    found = [*(failures.values() if isinstance(failures, dict) else ()), getattr(error, "cause", None), error.__cause__]
    return [cause for cause in found if isinstance(cause, BaseException)]
