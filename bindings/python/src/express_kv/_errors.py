"""Errors of the library as exceptions."""

from __future__ import annotations

import enum


class Status(enum.IntEnum):
    """What a call of the C ABI returns; numbers are pinned."""

    OK = 0
    INVALID_ARGUMENT = 1
    OUT_OF_RANGE = 2
    SHAPE_MISMATCH = 3
    DTYPE_MISMATCH = 4
    DEVICE_MISMATCH = 5
    NOT_FINITE = 6
    BUDGET_TOO_SMALL = 7
    WOULD_COMPRESS = 8
    ROLLBACK_UNAVAILABLE = 9
    BUFFER_TOO_SMALL = 10
    SIZE_OVERFLOW = 11
    OUT_OF_MEMORY = 12
    UNSUPPORTED = 13
    BROKEN = 14
    INTERNAL = 15
    DEVICE_ERROR = 16
    STEPS_PENDING = 17
    RING_FULL = 18


class Error(Exception):
    """A call failed, and changed nothing (but for Status.BROKEN). `status` says how; the message names the argument."""

    def __init__(self, status: Status | int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ArgumentError(Error, ValueError):
    """An argument is wrong."""


class OutOfMemoryError(Error, MemoryError):
    """There is no memory for the cache."""


_ARGUMENT = {
    Status.INVALID_ARGUMENT,
    Status.OUT_OF_RANGE,
    Status.SHAPE_MISMATCH,
    Status.DTYPE_MISMATCH,
    Status.DEVICE_MISMATCH,
    Status.NOT_FINITE,
    Status.BUDGET_TOO_SMALL,
    Status.BUFFER_TOO_SMALL,
    Status.SIZE_OVERFLOW,
}


def make_error(status: int, message: str) -> Error:
    known: Status | int = Status(status) if status in Status._value2member_map_ else status
    if known in _ARGUMENT:
        return ArgumentError(known, message)
    return OutOfMemoryError(known, message) if known == Status.OUT_OF_MEMORY else Error(known, message)
