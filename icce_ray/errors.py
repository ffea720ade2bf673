"""What can go wrong, by whose hand it is mended.

``UserError`` is the user's to mend: the message gives the value, the bound and the remedy, the program prints it without
a traceback and exits with code 2. Everything else is ours or the machine's: exit code 1, the cause last.
"""


class UserError(ValueError):
    """A setting, a path or an input that cannot work. The message says what was given, what is allowed, what to do."""


class ConfigError(UserError):
    """A wrong key, type or combination in a config. Raised before any work starts."""


class InputError(UserError):
    """Images, embeddings or labels that cannot be used: missing, empty, of the wrong shape, not finite."""


class ResourceError(UserError):
    """The machine or cluster lacks what the run was told to use."""


class DamagedArtifactError(RuntimeError):
    """A part on storage is missing, or its bytes are not those that its manifest promises."""


class WorkerError(RuntimeError):
    """A distributed stage ended by a fault that retries did not mend. Finished parts stay: the same command resumes."""
