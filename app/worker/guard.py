"""Run a program, and leave nothing of it behind: python guard.py PARENT RULESET PROGRAM [ARGUMENT...].

Standard library only, no import of ours: it starts in milliseconds and works whatever is installed. The kernel tells it
when the worker (PARENT) dies, and hands it every process that the program leaves without a parent, so that killing is
complete also for a launcher that gives each of its processes a session of its own.

RULESET is the descriptor of a Landlock ruleset that the program and this guard are put under, -1 for none.
SIGTERM is passed on to the program. SIGUSR1, and the worker's death, kill all.
"""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
LANDLOCK_RESTRICT_SELF = 446  # the number of the system call, the same on every architecture


def main() -> int:
    parent, ruleset, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    signal.signal(signal.SIGUSR1, lambda *_: kill_all())
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((PR_SET_CHILD_SUBREAPER, 1), (PR_SET_PDEATHSIG, signal.SIGUSR1)):
        if libc.prctl(option, int(value), 0, 0, 0) != 0:
            sys.stderr.write(f"the kernel refuses prctl({option}), so this program cannot be guarded\n")
            return 125
    if os.getppid() != parent:  # it died before the kernel was asked to tell us
        return 125
    if ruleset >= 0:
        if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0):
            sys.stderr.write("the kernel refuses to keep this program from writing\n")
            return 125
        os.close(ruleset)
    # While SIGTERM is held back none can come between the start of the program and the knowledge of whom to pass it to.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        program = subprocess.Popen(command, preexec_fn=_take_signals)  # noqa: S603, PLW1509 - there is one thread
    except OSError as error:
        sys.stderr.write(f"{command[0]} cannot be started: {error.strerror}\n")
        return 127
    signal.signal(signal.SIGTERM, lambda *_: program.send_signal(signal.SIGTERM))
    _take_signals()
    status = program.wait()
    kill_descendants()
    if status < 0:  # end the same way, so that the worker sees the signal
        number = -status
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    return status


def _take_signals() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def kill_all() -> None:
    kill_descendants()
    os.kill(os.getpid(), signal.SIGKILL)


def kill_descendants() -> None:
    """Until there are none: one that is killed hands its children to us."""
    while found := descendants():
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        while True:
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
            except ChildProcessError:
                break


def descendants() -> list[int]:
    """Living processes that stem from this one."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it has just ended
        if state != "Z":
            parents[int(folder.name)] = int(parent)
    found = [os.getpid()]
    for pid in found:
        found.extend(child for child, parent in parents.items() if parent == pid)
    return found[1:]


if __name__ == "__main__":
    sys.exit(main())
