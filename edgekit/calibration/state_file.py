"""A small state on disk that a crash leaves whole, written by a thread so that nothing waits for the disk."""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from pathlib import Path

import msgspec

from edgekit.errors import CalibrationError

__all__ = ["StateFile"]

INTERVAL_S = 1.0
"""Least time between two writes: flash memory wears, and of what comes in between only the latest matters."""


class _Sealed(msgspec.Struct):
    """What lies in the file: the state as JSON, and a digest of its bytes."""

    sha256: str
    state: msgspec.Raw


class StateFile:
    """One file, for one process at a time.

    A save is complete or has not happened: the state goes to a file aside, that is flushed to the disk, and then takes
    the other's name. A lock file beside it, ``.NAME.lock``, keeps others out; the system drops the lock when the
    process ends, however it ends.

    Args:
        path: of the file; its folder must exist.

    Raises:
        CalibrationError: another process has it, or nothing can be written there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._waiting: bytes | None = None
        self._closing = False
        self._failure: OSError | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="edgekit-audit-state", daemon=True)
        try:
            lock = os.open(self.path.with_name(f".{self.path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CalibrationError(f"{self.path}: cannot be written ({error.strerror}); name another file") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise CalibrationError(f"{self.path}: another audit is using it; give each process its own file") from error
        self._lock: int | None = lock

    @property
    def failure(self) -> str | None:
        """Why the latest write failed; ``None`` when it did not."""
        return None if self._failure is None else f"{self.path}: {self._failure.strerror}"

    def read(self) -> bytes | None:
        """The state that was saved last, as JSON; ``None`` where there is none.

        Raises:
            CalibrationError: the file cannot be read, or is not as it was written.
        """
        try:
            sealed = msgspec.json.decode(self.path.read_bytes(), type=_Sealed)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CalibrationError(f"{self.path}: cannot be read ({error.strerror})") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise CalibrationError(f"{self.path}: no audit state ({error}); move it away to start anew") from error
        content = bytes(sealed.state)
        if hashlib.sha256(content).hexdigest() != sealed.sha256:
            raise CalibrationError(f"{self.path}: damaged, its digest does not fit; move it away to start anew")
        return content

    def save(self, content: bytes) -> None:
        """Have JSON written soon; returns at once."""
        with self._changed:
            self._waiting = content
            self._changed.notify()
        if self._thread.ident is None:
            self._thread.start()

    def close(self) -> None:
        """Write what is waiting, and let others have the file.

        Raises:
            CalibrationError: the latest state could not be written.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)
        if self._failure is not None:
            raise CalibrationError(f"{self.failure}; the latest audits are not in it") from self._failure

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closing)
                content, self._waiting = self._waiting, None
            if content is None:
                return
            try:
                self._write(content)
                self._failure = None
            except OSError as error:
                self._failure = error
            with self._changed:
                self._changed.wait_for(lambda: self._closing, timeout=INTERVAL_S)

    def _write(self, content: bytes) -> None:
        sealed = _Sealed(hashlib.sha256(content).hexdigest(), msgspec.Raw(content))
        aside = self.path.with_name(f".{self.path.name}.part")
        with aside.open("wb") as file:
            file.write(msgspec.json.encode(sealed))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too
        finally:
            os.close(folder)
