"""What a candidate cannot do: the layers that a process enters, and never leaves.

Layers, each used where the kernel allows it:
  namespaces  own mounts (a read-only root with Python's own files and an empty tmpfs /tmp), own
              processes, network, IPC; for an ordinary user inside a user namespace
  landlock    no file but those same ones, no TCP, no abstract sockets (counts without namespaces)
  seccomp     an allow-list of system calls: no fork or exec, no signal but to itself, no socket
              but a stream pair, no chmod, no ptrace; so killing one pid is the whole clean-up
  limits      CPU, address space, file size, descriptors, threads; an unprivileged id of its own

Seccomp with namespaces or with landlock holds untrusted code; less than that is weak isolation.
Not contained: side channels (timing, caches); bugs of the kernel; more than a few dozen threads of
an ordinary user's candidate. Without namespaces: how many files a candidate leaves in its own
directory until its end (each is bounded). Weak, without landlock: reading what the candidate's
user may read (writing is then refused altogether, and an interpreter in a private home of root's
imports nothing but what is preloaded). Weak, with limits only: a candidate has no threads, and
does what its user may do. Measured on x86_64; numbers for aarch64 are from the kernel's headers.
Not here: who is forked, killed and swept up after (candidate.py). Standard library only, Linux.
"""

import ctypes
import os
import platform
import resource
import signal
import struct
import sys

libc = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_GET_SECCOMP, PR_SET_SECCOMP = 1, 4, 21, 22
PR_SET_NO_NEW_PRIVS = 38
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT = 1, 2, 4, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x20000, 0x10000000, 0x20000000
CLONE_REST = 0x40000000 | 0x08000000 | 0x04000000  # net, ipc, uts
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
DISK = 16 << 20  # bytes a file, and in all where the file system is ours
ARM = platform.machine() == "aarch64"


def call(function, *args):
    """What a libc function returns, which must succeed. Strings become bytes."""
    result = getattr(libc, function)(*[a.encode() if isinstance(a, str) else a for a in args])
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")
    return result


def readable_paths():
    """What a candidate may read, this Python's library and the shared objects it loads: (real paths
    without those inside others, {symbolic link: real path})."""
    paths = [f"{prefix}/lib" for prefix in (sys.base_prefix, sys.prefix, "/usr", "/usr/local", "")]
    paths += [path for path in sys.path if path.endswith("-packages")]  # not a checkout's
    paths += ["/lib64", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", *DEVICES]
    real = {path: os.path.realpath(path) for path in paths if os.path.exists(path)}
    inside = [p for p in real.values() for other in real.values() if p.startswith(other + "/")]
    links = {path: target for path, target in real.items() if path != target}
    return sorted({*real.values()} - {*inside}), links


def working_directory(paths):
    """Where candidates work in a root of their own: a place with nothing in it that they read."""
    places = "/tmp", "/var/tmp", "/candidate"
    return next(p for p in places if not any(f"{path}/".startswith(f"{p}/") for path in paths))


def enter_namespaces(paths, links, directory):
    """New namespaces and a read-only root but for `directory`; returns in a new process, number 1
    of its own space: True if that took a user namespace."""
    uid, gid, as_user = os.getuid(), os.getgid(), False
    flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_REST
    try:
        call("unshare", flags)
    except OSError:
        as_user = True
        call("unshare", flags | CLONE_NEWUSER)
        maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
        for name, text in maps.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    if child := os.fork():
        os.closerange(0, 1024)
        os.waitpid(child, 0)
        os._exit(0)
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    handles = [(path, os.open(path, os.O_PATH), os.path.isdir(path)) for path in paths]
    call("mount", "none", "/", None, MS_REC | MS_PRIVATE, None)
    root = "/tmp" if os.path.isdir("/tmp") else "/mnt"
    call("mount", "tmpfs", root, "tmpfs", MS_NOSUID, "size=1m,mode=755")
    for path, handle, is_directory in handles:
        _bind(f"/proc/self/fd/{handle}", root + path, is_directory)
        os.close(handle)
    for link, target in links.items():
        if not os.path.lexists(root + link):
            os.makedirs(os.path.dirname(root + link), exist_ok=True)
            os.symlink(target, root + link)
    os.makedirs(root + directory, exist_ok=True)
    options = f"size={DISK},nr_inodes=4096,mode=700"
    call("mount", "tmpfs", root + directory, "tmpfs", MS_NOSUID | MS_NODEV, options)
    os.chdir(root)
    call("mount", "none", root, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID, None)
    call("syscall", 41 if ARM else 155, b".", b".")  # pivot_root
    call("umount2", ".", 2)  # MNT_DETACH: the old root is gone
    os.chdir("/")
    return as_user


def _bind(source, target, is_directory):
    os.makedirs(target if is_directory else os.path.dirname(target), exist_ok=True)
    if not is_directory:
        os.close(os.open(target, os.O_CREAT, 0o600))
    try:
        call("mount", source, target, None, MS_BIND, None)
    except OSError:  # mounts below it that a user namespace may not uncover
        call("mount", source, target, None, MS_BIND | MS_REC, None)
    if not target.endswith(DEVICES):  # on these it would mean no use at all
        kept = os.statvfs(target).f_flag & (MS_NOSUID | MS_NODEV | 8 | 1024 | 2048)  # locked flags
        call(
            "mount", "none", target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | kept, None
        )


def enter_landlock(paths, directory):
    """From here on no file but `paths` (read) and `directory` (all), for this process's children
    too; no TCP, abstract sockets or signals to the outside where the kernel knows of them."""
    abi = call("syscall", 444, None, 0, 1)
    files = (1 << (13 if abi < 2 else 14 if abi < 3 else 15 if abi < 5 else 16)) - 1
    attributes = struct.pack("QQQ", files, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    ruleset = call("syscall", 444, attributes, 8 if abi < 4 else 16 if abi < 6 else 24, 0)
    for path in [*paths, directory]:
        handle = os.open(path, os.O_PATH)
        rights = files if path == directory else 0b1101  # execute (dlopen), read file, read dir
        if not os.path.isdir(path):
            rights = 0b110 if path in DEVICES else 0b100  # write and read file
        call("syscall", 445, ruleset, 1, struct.pack("<Qi", rights, handle), 0)
        os.close(handle)
    call("syscall", 446, ruleset, 0)
    os.close(ruleset)


# System calls that Python, numpy, threads and asyncio use. All others are refused (EPERM): execve,
# fork, ptrace, socket, connect, chmod, utime, link, mount, keyctl, bpf, io_uring, memfd_create, and
# locks: those on files that all have, as /dev/null, would tell others something.
_ALLOWED = (
    "17 19-25 29 34-35 38 43-50 56-57 59 61-68 71-73 78-80 82-83 93-96 98-103 113-115 120-121"
    " 123-124 129 131-139 141 148 150 153 158 160 163-165 167 169 172-179 199 204-212 214-216 220"
    " 222 226-229 232-233 260-261 276 278 283 285 291 293 436 439 449"
    if ARM
    else "0-28 32-40 44-48 51-56 60-63 72 74-77 79-85 87 89 96-100 102 104 107-108 110-111 115 118"
    " 120 127-128 130-131 137-138 140 143 145 149-150 157-158 160 186 202 204 217-218 228-234 247"
    " 257-258 262-264 267 269-271 273-274 281 285 290-293 302 316 318 324 326 332 334 436 439 449"
)
_OWN_PID = 0x5EC0DE5E  # stands for the candidate's pid in the filter made ahead of time
_ARGUMENTS = {  # of (calls on x86_64 and aarch64): (argument, its allowed values)
    "kill": ((62, 129), (0, [_OWN_PID])),
    "tgkill": ((234, 131), (0, [_OWN_PID])),
    "prlimit": ((302, 261), (0, [0, _OWN_PID])),
    "socketpair": ((53, 199), (1, [1, 0x801, 0x80001, 0x80801])),  # streams; only local ones exist
    "ioctl": ((16, 29), (1, [0x5401, 0x541B, 0x5421, 0x5450, 0x5451])),  # tty? blocking? ...
    "fcntl": ((72, 25), (1, [0, 1, 2, 3, 4, 1030])),  # no locks; no F_SETOWN: signals to others
    "prctl": ((157, 167), (0, [15, 16])),  # a thread's name
}
_THREAD = 0x10000  # the bit of `clone` that makes a thread
# Where no walls for files stand: no truncate, rename, mkdir, unlink, ..., and no `open` to write.
_CHANGES = "34-35 38 45 276" if ARM else "76 82-85 87 258 263-264 316"
_OPENS = {56: 2} if ARM else {2: 1, 257: 2}  # call: which argument has the flags
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _ABOVE, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x25, 0x45, 0x06


def seccomp_filter(may_write):
    """The candidate's filter as bytes, with _OWN_PID in it."""
    audit = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[platform.machine()]
    allow, refuse = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, audit), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]

    def at(number, *block):
        program.extend([(_EQUAL, 0, len(block), number), *block])

    def argument(index):
        return _LOAD, 0, 0, 16 + 8 * index

    for numbers, (index, values) in _ARGUMENTS.values():
        tests = [(_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
        at(numbers[ARM], argument(index), *tests, refuse, allow)
    at(220 if ARM else 56, argument(0), (_ANY_BIT, 0, 1, _THREAD), allow, refuse)  # clone
    at(435, (_RETURN, 0, 0, _REFUSE + 37))  # clone3: ENOSYS, use clone
    for number, index in {} if may_write else _OPENS.items():
        at(number, argument(index), (_ANY_BIT, 0, 1, _WRITES), refuse, allow)
    for parts, verdict in ("" if may_write else _CHANGES, refuse), (_ALLOWED, allow):
        for part in parts.split():
            low, _, high = part.partition("-")
            program += [(_AT_LEAST, 0, 2, int(low)), (_ABOVE, 1, 0, int(high or low)), verdict]
    return b"".join(struct.pack("HBBI", *line) for line in [*program, refuse])


def enter_seccomp(program):
    program = program.replace(struct.pack("I", _OWN_PID), struct.pack("I", os.getpid()))
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    call("prctl", PR_SET_SECCOMP, 2, header, 0, 0)


class Walls:
    """One server's layers: entered once by the server, completed in each child that it forks."""

    def __init__(self, options):
        self.options, self.directory, self.filter = options, options["directory"], None
        pages = int(open("/proc/self/statm").read().split()[0])
        self.memory = (options["memory_mb"] << 20) + pages * resource.getpagesize()
        self.uid = (1 << 30) + os.getpid() if os.geteuid() == 0 else None  # no other process's
        self.entering = None  # the layer that an error is about

    def enter(self):
        """Enter the layers not named in options["without"]; their names."""
        layers = "namespaces", "landlock", "seccomp"
        wanted = [layer for layer in layers if layer not in self.options["without"]]
        paths, links = readable_paths()
        if "namespaces" in wanted:
            self.entering = "namespaces"
            self.directory = working_directory(paths)
            if enter_namespaces(paths, links, self.directory):
                self.uid = None  # a user namespace knows one id; capabilities are dropped
            paths = [path for path in paths if os.path.exists(path)]
        else:
            if self.uid and "landlock" in wanted and not open_to_others(sys.base_prefix):
                self.uid = None  # it could not import; as root without capabilities it can
            os.makedirs(self.directory, 0o700)
        if self.uid:
            os.chown(self.directory, self.uid, self.uid)
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
        if "landlock" in wanted:
            self.entering = "landlock"
            enter_landlock(paths, self.directory)
        if "seccomp" in wanted:
            self.entering = "seccomp"
            call("prctl", PR_GET_SECCOMP, 0, 0, 0, 0)
            self.filter = seccomp_filter(may_write=len(wanted) > 1)
        self.entering = None
        if self.uid:
            os.setgroups([])
            os.setresgid(self.uid, self.uid, self.uid)
        limits = {"AS": self.memory, "FSIZE": DISK, "NOFILE": 64, "CORE": 0, "MEMLOCK": 0}
        for name, most in limits.items():  # they do not hinder the server, and are inherited
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
        return wanted

    def confine(self, sock):
        """In the child: everything that makes it a candidate; seccomp last."""
        os.dup2(sock.detach(), 3)
        null = os.open("/dev/null", os.O_RDWR)  # its own, as flags on it would stay for the next
        for number in 0, 1, 2:
            os.dup2(null, number)
        os.closerange(4, 1 << 20)
        seconds = int(self.options["timeout"]) + 2  # a backstop: others read the clock
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        if self.uid or not self.filter:  # counted per user. Without seccomp: no thread, so no fork
            threads = 64 if self.filter else 1
            resource.setrlimit(resource.RLIMIT_NPROC, (threads, threads))
        if self.uid:
            os.setresuid(self.uid, self.uid, self.uid)
        else:
            call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
        if self.filter:
            enter_seccomp(self.filter)


def open_to_others(path):
    """May any user pass through `path`, and through all that is above it?"""
    return path == "/" or os.stat(path).st_mode & 1 and open_to_others(os.path.dirname(path))


def sweep(directory):
    """Empty a directory, unreadable folders included. It goes down by single names, as the whole
    path may be longer than the kernel takes, and deeper than Python recurses."""
    os.chdir(directory)
    way, left = [], [os.listdir()]  # names of the folders above; names not yet seen in each
    while way or left[-1]:
        if not left[-1]:
            left.pop()
            os.chdir("..")
            os.rmdir(way.pop())
        elif os.path.isdir(name := left[-1].pop()) and not os.path.islink(name):
            os.chmod(name, 0o700)
            os.chdir(name)
            way.append(name)
            left.append(os.listdir())
        else:
            os.unlink(name)
    os.chdir("/")
