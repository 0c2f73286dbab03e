"""The error tree.

::

    FeverfewError
    ├── UserError             what a person got wrong; commands print one line and exit with code 2
    │   ├── ConfigError       unknown key, wrong type, value out of range
    │   │   ├── PrivacyTargetError   no noise multiplier reaches the target
    │   │   └── SchemaError   a file or plan of a version that this software does not read
    │   └── DataError         a missing directory, a case table that cannot be used
    ├── UnusableCase          one case that goes to quarantine; carries a code, never fatal for the rest
    ├── Refusal               a site says no to a task; only its code may leave the site
    ├── InvalidReply          the server rejects what a site sent; carries a code
    ├── RunError              a run cannot go on
    │   └── QuorumNotReached
    ├── StateError            something durable is damaged: checkpoint, stored reply
    │   └── LedgerError       the ledger is broken or shorter than it was; nothing is released
    └── DeploymentError       a process, a port or a connection that should be there is not

Messages have the form *expected, found, remedy*. ``code`` values are constants without any private text.
"""

from __future__ import annotations


class FeverfewError(Exception):
    """Root of every error that Feverfew raises on purpose."""


class UserError(FeverfewError):
    """What a person got wrong."""


class ConfigError(UserError):
    """A setting that is unknown, of the wrong type or out of range."""


class PrivacyTargetError(ConfigError):
    """A privacy target that no noise multiplier reaches."""


class SchemaError(ConfigError):
    """A file or a plan of a version that this software does not read; nothing was changed in it."""


class DataError(UserError):
    """A data directory or case table that cannot be used at all."""


class CodedError(FeverfewError):
    """An error whose ``code`` is a constant that may be counted and shown anywhere.

    The message may hold private text and stays where it was raised.
    """

    def __init__(self, code: str, message: str = "") -> None:
        super().__init__(message or code)
        self.code = code


class UnusableCase(CodedError):
    """One case that cannot be used; it goes to quarantine under ``code``."""


class Refusal(CodedError):
    """A site declines a task. Only ``code`` may leave the site."""


class InvalidReply(CodedError):
    """A reply that the server must not use."""


class RunError(FeverfewError):
    """A run that cannot go on."""


class QuorumNotReached(RunError):
    """Fewer valid updates than the plan's quorum."""


class StateError(FeverfewError):
    """Something durable is damaged; nothing is overwritten."""


class LedgerError(StateError):
    """The ledger is broken or shorter than it was; nothing is released until a person restores it."""


class DeploymentError(FeverfewError):
    """A process, port or connection that should be there is not."""
