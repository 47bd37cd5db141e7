"""Errors that a user can act on. Each carries the exit code of the command line (see docs/commands.md)."""

from __future__ import annotations


class FedgcError(Exception):
    """Something a user can act on: the message says what, where, and what to do next."""

    exit_code = 1


class WorkFailedError(FedgcError):
    """The work itself failed (training diverged, nothing could be written)."""

    exit_code = 1


class UsageError(FedgcError):
    """The command or the configuration is wrong."""

    exit_code = 2


class DataError(UsageError):
    """The faces cannot be used as asked."""


class RefusedError(UsageError):
    """The threat model does not grant what an attack needs."""


class RunError(FedgcError):
    """A run directory is missing, damaged, unfinished, or of another schema."""

    exit_code = 3


class GateError(FedgcError):
    """A ``--fail-if`` expression is true."""

    exit_code = 4
