"""Processes with time limits: each is a process group, logs its lines at once, and ends with all its children.

A crash, a hang or a kill of one process raises in its caller and affects no other process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

# A group, not a session: the end of our session ends these processes too. Python before 3.11 has only sessions.
_GROUP = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
# Seconds for a process that was asked to end, and for one that was killed; a driver may hold it beyond that.
_ASKED, _KILLED = 2.0, 3.0
# Seconds between two calls of `on_tick`.
_TICK = 2.0


class Stopped(BaseException):
    """The run was told to end. A BaseException, so that no step catches it as its own failure."""


class Skipped(Exception):
    """A step that cannot run here; the text is the reason."""


class Failed(Exception):
    """A step that ran and did not succeed; the text says how."""


class Log:
    """A file that many processes write to, line by line.

    Args:
        hidden: what is written in place of a path: nothing in a log tells where it was made.
    """

    def __init__(self, path: Path, hidden: dict[str, str]):
        self._file = open(path, "w", buffering=1)
        self._hidden, self._lock = hidden, threading.Lock()

    def write(self, text: str) -> None:
        """Add a line, on the disk at once."""
        for path, shown in self._hidden.items():
            text = text.replace(path, shown)
        with self._lock:
            if not self._file.closed:
                self._file.write(text + "\n")

    def close(self) -> None:
        """Later lines are lost."""
        with self._lock:
            self._file.close()


class Process:
    """A running command, and the lines that it has printed so far."""

    def __init__(self, name: str, command: list[str], popen: subprocess.Popen, on_line: Callable[[str], None]):
        self.name, self.command, self.popen = name, command, popen
        self.lines: list[str] = []
        self.began = time.time()
        self.stopped = False  # whether it was told to end already
        self._on_line = on_line
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.popen.stdout:
            self.lines.append(line.rstrip("\n"))
            self._on_line(self.lines[-1])

    @property
    def running(self) -> bool:
        """True while the process or a child can still print. It does not reap the process, so the pid stays valid until
        `end`."""
        return self._reader.is_alive()

    @property
    def text(self) -> str:
        """The output so far."""
        return "\n".join(self.lines)

    def wait(self, until: float, on_tick: Callable[[], None]) -> int | None:
        """The exit status; None if the process still runs at `until`, in epoch seconds."""
        code = self.popen.poll()
        while code is None and time.time() < until:
            try:
                code = self.popen.wait(timeout=min(_TICK, max(0.01, until - time.time())))
            except subprocess.TimeoutExpired:
                on_tick()
        return code

    def signal(self, signum: int) -> bool:
        """Send a signal to the group; False if the group has no process left."""
        try:
            os.killpg(self.popen.pid, signum)
        except ProcessLookupError:
            return False
        return True

    def end(self) -> None:
        """End the process and its children; nothing happens if they have ended."""
        for signum, patience in ((signal.SIGTERM, _ASKED), (signal.SIGKILL, _KILLED)):
            if not self.signal(signum):
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(timeout=patience)
        self._reader.join(timeout=2.0)


@dataclass
class Processes:
    """Starts processes and waits for them.

    Args:
        environment: of every process.
        directory: in which they run.
        on_tick: called every few seconds while one is waited for.
    """

    environment: dict[str, str]
    directory: Path
    log: Log
    on_tick: Callable[[], None] = lambda: None

    def __post_init__(self):
        self._running: list[Process] = []

    def start(
        self, name: str, command: list[str], *, environment: dict[str, str] | None = None,
        cores: Iterable[int] | None = None, echo: bool = False,
    ) -> Process:  # fmt: skip
        """Start a command, and wait for nothing.

        Args:
            name: precedes each of its lines in the log.
            environment: variables to add.
            cores: that it and what it starts may use; None: all.
            echo: print its lines as well.
        """

        def on_line(line: str) -> None:
            self.log.write(f"{name}| {line}")
            if echo:
                print(f"  {line}", flush=True)

        self.log.write(f"{name}$ {' '.join(command)}")
        popen = subprocess.Popen(
            command, cwd=self.directory, env=self.environment | (environment or {}), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", **_GROUP,
        )  # fmt: skip
        if cores is not None:
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.sched_setaffinity(popen.pid, cores)
        self._running.append(Process(name, command, popen, on_line))
        return self._running[-1]

    def finish(self, process: Process, limit: float, codes: tuple[int, ...] = (0,)) -> str:
        """Wait for the end of a process; its output.

        Args:
            limit: seconds from now.
            codes: exit statuses that are no failure.

        Raises:
            Failed: another exit status, a signal, or out of time, when the process is ended.
        """
        code = process.wait(time.time() + max(limit, 0.1), self.on_tick)
        process.end()
        if process in self._running:
            self._running.remove(process)
        if code in codes:
            return process.text
        if code is None or process.stopped:
            ended = f"stopped after {time.time() - process.began:.0f} s"
        else:
            ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        self.log.write(f"{process.name}: {ended}")
        last = next((line.strip() for line in reversed(process.lines) if line.strip()), "no output")
        raise Failed(f"{ended}: {last}")

    def call(self, name: str, command: list[str], limit: float, *, codes: tuple[int, ...] = (0,), **options) -> str:
        """`start` and `finish`."""
        return self.finish(self.start(name, command, **options), limit, codes)

    def call_all(
        self, commands: dict[str, list[str]], limit: float, at_once: int, **options
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Several commands, some at a time, all within a limit.

        Returns:
            (what those that succeeded printed, why the others did not), by name.
        """
        until = time.time() + limit
        tick = time.time() + _TICK
        waiting, running = list(commands), []
        texts, failures = {}, {}
        while waiting or running:
            late = time.time() > until
            if time.time() > tick:
                self.on_tick()
                tick = time.time() + _TICK
            while waiting and not late and len(running) < at_once:
                name = waiting.pop(0)
                running.append(self.start(name, commands[name], **options))
            for process in running if late else ():
                process.stopped = True
                process.signal(signal.SIGTERM)  # all at once: each is then waited for
            ended = running if late else [process for process in running if not process.running]
            for process in list(ended):
                running.remove(process)
                try:
                    texts[process.name] = self.finish(process, _KILLED if not late else 0.0)
                except Failed as reason:
                    failures[process.name] = str(reason)
            if late:
                failures |= dict.fromkeys(waiting, "out of time")
                break
            time.sleep(0.05)
        return texts, failures

    def end(self) -> None:
        """End everything that still runs."""
        while self._running:
            self._running.pop().end()
