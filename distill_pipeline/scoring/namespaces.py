"""Linux namespaces by the system calls themselves: a process with its own users, processes, network, mounts and root folder.

Nothing has to be installed, and no program with special rights is used. The new root is a small memory file system with the
interpreter and the system libraries bound into it read-only; no folder is made on the host. Idea and order of the calls:
bubblewrap.
"""

import ctypes
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path

WORK_DIR = "/.program"
"""Where a program works: a name that no folder of the host has, since what is bound into the root keeps its own."""
INSIDE_ID = 1000
"""User and group of the program inside."""

_CLONE_FLAGS = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x40000000
"""New mount, cgroup, uts, ipc, user and network namespaces (linux/sched.h)."""
_CLONE_NEWPID = 0x20000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x2, 0x4, 0x8, 0x1000, 0x4000, 0x40000
_MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV = -100, 0x8000, 1, 2, 4
_SYS_MOUNT_SETATTR = 442
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
_SIGKILL = 9
_NUM_CAPABILITIES = 64
_STAGING = "/proc"
"""A folder every Linux has and the program does not need: the new root is mounted over it, in the new namespace only."""
_MAX_HOST_ID = 2**31
_ID_CHOICES = 20_000


class NamespaceError(OSError):
    """A step of the isolation is not possible on this machine."""


def call(what: str, name: str, *args: object) -> None:
    """One C library call; raises NamespaceError that says what was tried."""
    libc = ctypes.CDLL(None, use_errno=True)
    converted = [arg.encode() if isinstance(arg, str) else arg for arg in args]
    if getattr(libc, name)(*converted) == -1:
        code = ctypes.get_errno()
        raise NamespaceError(code, f"{what}: {os.strerror(code)}")


def end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends."""
    call("tie to parent", "prctl", _PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)


def enter(*, new_processes: bool) -> None:
    """Leave the caller's namespaces. The process has no user until one outside has called :func:`map_users`.

    Args:
        new_processes: also see no processes but those started from here on.
    """
    call("new namespaces (unshare)", "unshare", _CLONE_FLAGS | (_CLONE_NEWPID if new_processes else 0))


def map_users(pid: int) -> None:
    """Called from outside: give process ``pid`` a user without rights, and root of its namespace for the setting up.

    As root, the user inside is a host user that nobody else is, so that limits on processes count its own alone; else it is
    the caller, to whom nothing outside is visible any more.
    """
    folder = Path(f"/proc/{pid}")
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        for kind in ("uid", "gid"):
            (folder / f"{kind}_map").write_text(f"0 0 1\n{INSIDE_ID} {_spare_id(kind, pid)} 1\n")
        return
    (folder / "setgroups").write_text("deny")
    (folder / "uid_map").write_text(f"{INSIDE_ID} {user} 1\n")
    (folder / "gid_map").write_text(f"{INSIDE_ID} {group} 1\n")


def _spare_id(kind: str, pid: int) -> int:
    """A host id at the far end of what this machine has, another one for each process."""
    ranges = [[int(part) for part in line.split()] for line in Path(f"/proc/self/{kind}_map").read_text().splitlines()]
    first, _, count = max(ranges, key=lambda found: found[2])
    end = min(first + count, _MAX_HOST_ID)
    if end - first < 2 * _ID_CHOICES:
        raise NamespaceError(0, f"choose a user: this container has only {count} {kind}s")
    return end - 2 - pid % _ID_CHOICES


def build_root(scratch_mb: int) -> None:
    """Change to a root that holds the interpreter and system libraries, read-only, and an empty WORK_DIR in memory."""
    with suppress(OSError):  # further namespaces inside: not needed; some containers do not let this be said
        Path("/proc/sys/user/max_user_namespaces").write_text("0")
    bound = _needed_paths()
    call("keep mounts private", "mount", None, "/", None, _MS_REC | _MS_PRIVATE, None)
    call("mount a root", "mount", "tmpfs", _STAGING, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    for path in bound:
        inside = _STAGING + path
        if os.path.islink(path):
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            os.symlink(os.readlink(path), inside)
            continue
        os.makedirs(inside, exist_ok=True)
        call(f"bind {path}", "mount", path, inside, None, _MS_BIND | _MS_REC, None)
        _restrict(inside, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV)
    os.mkdir(f"{_STAGING}/dev")
    for device in ("null", "zero", "urandom", "random"):
        inside = f"{_STAGING}/dev/{device}"
        os.close(os.open(inside, os.O_CREAT | os.O_WRONLY))
        call(f"bind {device}", "mount", f"/dev/{device}", inside, None, _MS_BIND, None)
    work = _STAGING + WORK_DIR
    os.mkdir(work)
    options = f"size={scratch_mb}m,nr_inodes=1000,mode=700,uid={INSIDE_ID},gid={INSIDE_ID}"
    call("mount a work folder", "mount", "tmpfs", work, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, options)
    os.chdir(_STAGING)
    number = _SYS_PIVOT_ROOT.get(platform.machine())
    if number is None:
        raise NamespaceError(0, f"change the root: not known how on {platform.machine()}")
    call("change the root", "syscall", number, ".", ".")
    call("leave the old root", "umount2", ".", _MNT_DETACH)
    _restrict("/", 0, _MOUNT_ATTR_RDONLY)
    os.chdir(WORK_DIR)


def _needed_paths() -> list[str]:
    """What the interpreter needs, parents before what lies in them."""
    wanted = ["/usr", "/lib", "/lib32", "/lib64", "/etc/ld.so.conf.d", "/etc/alternatives"]
    wanted += [os.path.realpath(sys.base_prefix), os.path.realpath(sys.prefix), sys.base_prefix, sys.prefix]
    wanted += [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    found: list[str] = []
    for path in dict.fromkeys(wanted):
        if os.path.lexists(path) and not any(path == other or path.startswith(other + "/") for other in found):
            found.append(path)
    return found


def _restrict(path: str, flags: int, attributes: int) -> None:
    """Set mount attributes on a mount, and with ``AT_RECURSIVE`` on all below it (Linux 5.12)."""
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    call(
        f"make {path} read-only", "syscall", _SYS_MOUNT_SETATTR, _AT_FDCWD, path, flags, ctypes.byref(wanted),
        ctypes.c_size_t(ctypes.sizeof(wanted)),
    )  # fmt: skip


def hide_from_program() -> None:
    """Keep the program from looking into this process."""
    call("hide", "prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)


def drop_rights() -> None:
    """Become the user without rights, for good."""
    with suppress(PermissionError):  # an ordinary user's namespace keeps its groups; none of them means anything inside
        os.setgroups([])
    for capability in range(_NUM_CAPABILITIES):
        with suppress(NamespaceError):  # numbers the kernel does not know
            call("drop a capability", "prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0)
    os.setresgid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
    os.setresuid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
    call("give up new rights", "prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
