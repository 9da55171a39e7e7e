"""Confines this process, then becomes the command it was given. Started by `app.worker.sandbox`, standard library only.

    python -I -S confine.py '{"parent": 12, "status": 5, "limits": {…}, …}' command argument…

A confinement that one process puts on itself before `execve` needs no privilege and no code between fork and exec of a
process with threads. Whatever cannot be had is written to the pipe `status`, and the command is not run: fail closed.
Without a `parent` it is whoever starts this; a `status` of 2 is standard error, which the command keeps.
What the kernel is asked for, in order: death with the parent, resource limits, no new privileges, Landlock (files;
where there is one), and a seccomp filter (network, other processes, and the kernel's rarely used corners).
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import socket
import struct
import sys
from typing import NamedTuple

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
CLONE_THREAD = 0x10000

# Classic BPF (linux/filter.h): code, and where the words of `struct seccomp_data` lie.
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_SET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
SYSCALL, ARCHITECTURE, ARGUMENT_0 = 0, 4, 16
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000


class Calls(NamedTuple):
    """Numbers of system calls by what is done about them; the groups by name."""

    audit: int
    socket: int
    socketpair: int
    clone: int
    clone3: int
    own_process: dict[str, int]
    never: dict[str, int]


# linux/audit.h names the architectures; system calls are numbered per architecture. `own_process`: calls that may only
# name this very process. `clone3`: what glibc asks first and does without; ENOSYS sends it to the older call.
ARCHITECTURES = {
    "x86_64": Calls(
        audit=0xC000003E,
        socket=41,
        socketpair=53,
        clone=56,
        clone3=435,
        own_process={"kill": 62, "tgkill": 234},
        never={
            "ptrace": 101,
            "process_vm_readv": 310,
            "process_vm_writev": 311,
            "tkill": 200,
            "rt_sigqueueinfo": 129,
            "rt_tgsigqueueinfo": 297,
            "fork": 57,
            "vfork": 58,
            "setsid": 112,
            "setpgid": 109,
            "bpf": 321,
            "perf_event_open": 298,
            "userfaultfd": 323,
            "add_key": 248,
            "request_key": 249,
            "keyctl": 250,
            "mount": 165,
            "umount2": 166,
            "pivot_root": 155,
            "chroot": 161,
            "setns": 308,
            "unshare": 272,
            "open_by_handle_at": 304,
            "init_module": 175,
            "finit_module": 313,
            "delete_module": 176,
            "reboot": 169,
            "kexec_load": 246,
            "kexec_file_load": 320,
            "swapon": 167,
            "swapoff": 168,
        },
    ),
    "aarch64": Calls(
        audit=0xC00000B7,
        socket=198,
        socketpair=199,
        clone=220,
        clone3=435,
        own_process={"kill": 129, "tgkill": 131},
        never={
            "ptrace": 117,
            "process_vm_readv": 270,
            "process_vm_writev": 271,
            "tkill": 130,
            "rt_sigqueueinfo": 138,
            "rt_tgsigqueueinfo": 240,
            "setsid": 157,
            "setpgid": 154,
            "bpf": 280,
            "perf_event_open": 241,
            "userfaultfd": 282,
            "add_key": 217,
            "request_key": 218,
            "keyctl": 219,
            "mount": 40,
            "umount2": 39,
            "pivot_root": 41,
            "chroot": 51,
            "setns": 268,
            "unshare": 97,
            "open_by_handle_at": 265,
            "init_module": 105,
            "finit_module": 273,
            "delete_module": 106,
            "reboot": 142,
            "kexec_load": 104,
            "kexec_file_load": 294,
            "swapon": 224,
            "swapoff": 225,
        },
    ),
}
# The same number everywhere: pidfd_send_signal, io_uring_*, open_tree … fspick, pidfd_open, pidfd_getfd, mount_setattr.
NEVER_ANYWHERE = (424, 425, 426, 427, 428, 429, 430, 431, 432, 433, 434, 438, 442)
STANDARD_ERROR = 2
X32_BIT = 0x40000000  # x86_64 has a second set of numbers for the same calls from here on

LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
READ_DIR, READ_FILE, EXECUTE = 1 << 3, 1 << 2, 1 << 0
OF_A_FILE = EXECUTE | 1 << 1 | READ_FILE | 1 << 14 | 1 << 15  # execute, write, read, truncate, ioctl of a device
_libc = ctypes.CDLL(None, use_errno=True)


class CannotConfine(Exception):
    """The kernel refused a part of the confinement."""


def main(arguments: list[str]) -> None:
    plan, command = json.loads(arguments[0]), arguments[1:]
    status = int(plan["status"])
    try:
        die_with_parent(plan["parent"] or os.getppid())
        limit_resources(plan["limits"])
        call("prctl(PR_SET_NO_NEW_PRIVS)", _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        restrict_files(plan["list"], plan["read"], plan["write"])
        refuse_system_calls()
        os.set_inheritable(status, status == STANDARD_ERROR)
        os.execve(command[0], command, os.environ)  # noqa: S606 - without a shell on purpose
    except Exception as error:  # whatever it is, the command is not run unconfined
        os.write(status, f"{type(error).__name__}: {error}"[:2000].encode())
        os._exit(126)


def die_with_parent(parent: int) -> None:
    call("prctl(PR_SET_PDEATHSIG)", _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if os.getppid() != parent:  # it died before we asked
        raise CannotConfine("the parent process is gone")


def limit_resources(limits: dict[str, int]) -> None:
    """`limits`: RLIMIT_ name without the prefix -> soft and hard limit, never above what this process has."""
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        _, hard = resource.getrlimit(kind)
        wanted = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (wanted, wanted))


def restrict_files(listed: list[str], readable: list[str], writable: list[str]) -> None:
    """Landlock: folders of `listed` may only be listed, what lies below `readable` read and run, below `writable` all.

    It also hides the memory and environment of other processes. Kernels without it (before 5.13) do without."""
    version = int(_libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1))
    if version <= 0:
        return
    rights = 13 + (version >= 2) + (version >= 3) + (version >= 5)
    handled = (1 << rights) - 1
    attributes = struct.pack("=Q", handled)
    ruleset = call("landlock_create_ruleset", _libc.syscall(LANDLOCK_CREATE, attributes, ctypes.c_size_t(8), 0))
    kinds = ((listed, READ_DIR), (readable, READ_DIR | READ_FILE | EXECUTE), (writable, handled))
    for paths, allowed in kinds:
        for path in paths:
            _add_rule(ruleset, path, allowed)
    call("landlock_restrict_self", _libc.syscall(LANDLOCK_RESTRICT, ruleset, 0))
    os.close(ruleset)


def _add_rule(ruleset: int, path: str, allowed: int) -> None:
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # what is not there needs no rule
    mask = allowed if os.path.isdir(path) else allowed & OF_A_FILE  # noqa: PTH112 - without site, without pathlib
    rule = struct.pack("=Qi", mask, handle)
    call(f"landlock_add_rule for {path}", _libc.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0))
    os.close(handle)


def refuse_system_calls() -> None:
    """Put the filter on, and see that it holds. Raises `CannotConfine`."""
    filters = filter_program(platform.machine(), os.getpid())
    program = ctypes.create_string_buffer(filters, len(filters))
    header = struct.pack("@HP", len(filters) // 8, ctypes.addressof(program))
    call("prctl(PR_SET_SECCOMP)", _libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0))
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()
    except PermissionError:
        return
    raise CannotConfine("the seccomp filter was taken and does not hold: a network socket could be opened")


def filter_program(machine: str, pid: int) -> bytes:
    """The BPF instructions for this architecture. Raises `CannotConfine` for one that is not known."""
    known = ARCHITECTURES.get(machine)
    if known is None:
        raise CannotConfine(f"no system-call filter for {machine}; there is one for {', '.join(ARCHITECTURES)}")
    denied = REFUSE | errno.EPERM
    code = [
        *(op(LOAD, ARCHITECTURE), op(JUMP_EQUAL, known.audit, 1, 0), op(RETURN, KILL)),
        *(op(LOAD, SYSCALL), op(JUMP_AT_LEAST, X32_BIT, 0, 1), op(RETURN, denied)),
    ]
    for number in (known.socket, *known.never.values(), *NEVER_ANYWHERE):
        code += [op(JUMP_EQUAL, number, 0, 1), op(RETURN, denied)]
    code += [op(JUMP_EQUAL, known.clone3, 0, 1), op(RETURN, REFUSE | errno.ENOSYS)]
    code += unless(known.clone, JUMP_SET, CLONE_THREAD, denied)
    code += unless(known.socketpair, JUMP_EQUAL, socket.AF_UNIX, denied)
    for number in known.own_process.values():
        code += unless(number, JUMP_EQUAL, pid, denied)
    return b"".join([*code, op(RETURN, ALLOW)])


def unless(number: int, test: int, value: int, action: int) -> list[bytes]:
    """For system call `number` do `action` unless its first argument passes the test; other calls go on."""
    return [
        op(JUMP_EQUAL, number, 0, 4),
        op(LOAD, ARGUMENT_0),
        op(test, value, 1, 0),
        op(RETURN, action),
        op(RETURN, ALLOW),
    ]


def op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One `struct sock_filter`."""
    return struct.pack("=HBBI", code, if_true, if_false, value)


def call(what: str, result: int) -> int:
    if result < 0:
        raise CannotConfine(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
