"""The side of the sandbox that holds the candidate: a server that forks jailed processes.

`python jail.py`-style process (started by a tester, see sandbox.py) -> preloads modules -> enters
what isolation the kernel grants -> forks candidates ahead of time. A candidate compiles and runs
one untrusted program and then answers requests (call this, read that) over one socket. Nothing it
says is believed: it cannot give a verdict, only values, and the other end reads them as data.

Layers, each used where the kernel allows it and named in the server's first message:
  namespaces  own mounts (a read-only root with Python's own files and an empty tmpfs /tmp), own
              processes, network, IPC; for an ordinary user inside a user namespace
  landlock    no file but those same ones, no TCP, no abstract sockets (counts without namespaces)
  seccomp     an allow-list of system calls: no fork or exec, no signal but to itself, no socket
              but a stream pair, no chmod, no ptrace; so killing one pid is the whole clean-up
  rlimits     CPU, address space, file size, descriptors, threads; an unprivileged id of its own

Not contained: side channels (timing, caches); bugs of the kernel; more than a few dozen threads of
an ordinary user's candidate. Without namespaces: how many files a candidate leaves in its own
directory until its end (each is bounded). Without landlock either: reading what the candidate's
user may read (writing is then refused altogether, and an interpreter in a private home of root's
imports nothing but what is preloaded). With rlimits only: a candidate has no threads, and does
what its user may do. Measured on x86_64; the numbers for aarch64 are from the kernel's headers.
Standard library only, Linux.
"""

import _thread
import builtins
import collections
import contextlib
import ctypes
import datetime
import decimal
import fractions
import functools
import gc
import importlib
import json
import operator
import os
import platform
import resource
import signal
import socket
import struct
import sys
import time
import types

# ---- values on the wire: JSON, where an object {tag: content} stands for what JSON has not -------

BIG = 4096  # bits from which an int travels in hex (decimal conversion is quadratic, and capped)
MAX_MESSAGE = 16 << 20  # bytes; the objects made of a message may take thirty times as much
_ATOMS = frozenset((float, str, bool, type(None)))


def _flat(pairs):
    return [part for pair in pairs for part in pair]


def _pairs(flat):
    return list(zip(flat[::2], flat[1::2], strict=True))


_PACK = {  # exact type -> (tag, function to something simpler)
    tuple: ("t", list),
    dict: ("d", lambda v: _flat(v.items())),
    set: ("s", list),
    frozenset: ("S", list),
    bytes: ("b", bytes.hex),
    bytearray: ("B", bytearray.hex),
    complex: ("c", lambda v: [v.real, v.imag]),
    range: ("r", lambda v: [v.start, v.stop, v.step]),
    slice: ("l", lambda v: [v.start, v.stop, v.step]),
    fractions.Fraction: ("F", lambda v: [v.numerator, v.denominator]),
    decimal.Decimal: ("D", str),
    collections.deque: ("q", lambda v: [list(v), v.maxlen]),
    collections.Counter: ("C", lambda v: _flat(v.items())),
    collections.OrderedDict: ("O", lambda v: _flat(v.items())),
    collections.defaultdict: ("m", lambda v: [v.default_factory, _flat(v.items())]),
    datetime.date: ("date", datetime.date.isoformat),
    datetime.time: ("time", datetime.time.isoformat),
    datetime.datetime: ("datetime", datetime.datetime.isoformat),
    datetime.timedelta: ("timedelta", lambda v: [v.days, v.seconds, v.microseconds]),
    type(...): ("e", lambda v: 0),
}
_UNPACK = {  # every entry makes plain data of plain data: safe on whatever a candidate sends
    "t": tuple,
    "d": lambda v: dict(_pairs(v)),
    "s": set,
    "S": frozenset,
    "b": bytes.fromhex,
    "B": bytearray.fromhex,
    "c": lambda v: complex(*v),
    "r": lambda v: range(*v),
    "l": lambda v: slice(*v),
    "F": lambda v: fractions.Fraction(*v),
    "D": decimal.Decimal,
    "q": lambda v: collections.deque(*v),
    "C": lambda v: collections.Counter(dict(_pairs(v))),
    "O": lambda v: collections.OrderedDict(_pairs(v)),
    "m": lambda v: collections.defaultdict(v[0] if isinstance(v[0], type) else None, _pairs(v[1])),
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "datetime": datetime.datetime.fromisoformat,
    "timedelta": lambda v: datetime.timedelta(*v),
    "e": lambda v: ...,
    "i": lambda v: int(v, 16),
    "T": lambda v: _builtin_type(v),
    "I": iter,
    "n": lambda v: _namedtuple(v[0], tuple(v[1]))(*v[2]),
}
_namedtuple = functools.lru_cache(64)(collections.namedtuple)


def _builtin_type(name):
    found = getattr(builtins, name)
    if not isinstance(found, type):
        raise ValueError(name)
    return found


class Link:
    """One end of the conversation between tester and candidate: frames and values.

    What is not plain data stays where it is and travels as a number: {"h": n} is "my object n",
    {"y": n} is "your object n". `proxy(n)` makes what stands for the other side's object n.
    """

    def __init__(self, sock, proxy):
        self.sock, self.proxy = sock, proxy
        self.objects, self.numbers = [], {}
        self.buffer = bytearray()

    def other(self, value):
        """The packed form of a value that is not plain data: here, a number to ask by."""
        number = self.numbers.get(id(value))
        if number is None:
            number = self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)  # also keeps it alive, so that its id stays its own
        return {"h": number}

    def pack(self, value):
        kind = type(value)
        if kind in _ATOMS:
            return value
        if kind is int:
            return value if value.bit_length() < BIG else {"i": hex(value)}
        if kind is list:
            kinds = set(map(type, value))
            if kinds <= _ATOMS:
                return value
            if kinds == {int} and max(map(int.bit_length, value)) < BIG:
                return value
            return [self.pack(part) for part in value]
        if kind in _PACK:
            tag, simpler = _PACK[kind]
            return {tag: self.pack(simpler(value))}
        if kind is type and value.__module__ == "builtins" and hasattr(builtins, value.__name__):
            return {"T": value.__name__}
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            fields = [str(name) for name in kind._fields]
            return {"n": [kind.__name__, fields, self.pack(list(value))]}
        return self.other(value)

    def dumps(self, value):
        return json_dumps(self.pack(value))

    def loads(self, text):
        return json.loads(text, object_hook=self._unpack)

    def _unpack(self, tagged):
        ((tag, content),) = tagged.items()
        if tag == "h":
            return self.proxy(int(content))
        if tag == "y":
            return self.objects[content]
        return _UNPACK[tag](content)

    def send(self, text):
        data = text.encode()
        self.write(len(data).to_bytes(4, "little") + data)

    def receive(self):
        buffer = self.buffer
        while len(buffer) < 4:
            buffer += self.more()
        end = 4 + int.from_bytes(buffer[:4], "little")
        if end > MAX_MESSAGE:
            raise EOFError("message too long")
        while len(buffer) < end:
            buffer += self.more()
        text = buffer[4:end].decode()
        del buffer[:end]
        return text

    def write(self, data):
        self.sock.sendall(data)

    def more(self):
        """The next bytes, never none."""
        data = self.sock.recv(1 << 18)
        if not data:
            raise EOFError
        return data


json_dumps = json.JSONEncoder(check_circular=False).encode  # bound before a candidate can patch it


# ---- the candidate -------------------------------------------------------------------------------


class CandidateLink(Link):
    """The candidate's end: objects of any kind get a number, subclasses of data become data."""

    def __init__(self, sock):
        super().__init__(sock, lambda number: Callback(self, number))
        self.running = _thread.RLock()

    def other(self, value):
        kind = type(value)
        if kind is Callback:
            return {"y": value._number}
        for base in (int, float, str):  # int enums, numpy's float64
            if isinstance(value, base):
                return self.pack(getattr(base, f"__{base.__name__}__")(value))
        for base in (tuple, list, set, frozenset, dict):
            if isinstance(value, base):
                return self.pack(base(value))
        if kind.__module__ == "numpy" and getattr(value, "shape", None) == ():
            return self.pack(value.item())
        return super().other(value)


class Callback:
    """A function of the tester's (a lambda in an argument), as the candidate sees it."""

    def __init__(self, link, number):
        self._link, self._number = link, number

    def __call__(self, *args):
        link = self._link
        with link.running:
            link.send("callback\n" + link.dumps([self._number, args]))
            while True:
                message = link.receive()
                kind, _, body = message.partition("\n")
                if kind in ("ok", "raise"):
                    break
                link.send(_answer(link, message))  # the function asks about its arguments
            value = link.loads(body)
        if kind == "raise":
            raise value[0](*value[1])
        return value


def _load(source, names):
    """Run the program as a module of its own; {name: value} for those of `names` that it has."""
    try:
        code = compile(source.encode("utf-8", "surrogatepass"), "candidate.py", "exec")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise SyntaxError(str(error)) from None
    module = types.ModuleType("candidate")
    module.__file__ = "candidate.py"
    sys.modules["candidate"] = module
    exec(code, module.__dict__)
    return {name: module.__dict__[name] for name in names if name in module.__dict__}


OPERATIONS = {
    "load": _load,
    "call": lambda function, *args, **kwargs: function(*args, **kwargs),
    "get": getattr,
    "set": setattr,
    "iter": iter,
    "next": next,
    "len": len,
    "item": operator.getitem,
    "setitem": operator.setitem,
    "delattr": delattr,
    "delitem": operator.delitem,
    "bool": bool,
    "str": str,
    "repr": repr,
}


def _answer(link, message):
    """Do what `operation NEWLINE [target, args, kwargs]` asks; the text of the answer."""
    name, _, body = message.partition("\n")
    target, args, kwargs = link.loads(body)
    try:
        value = OPERATIONS[name](target, *args, **kwargs)
        changed = "null"
        if name == "call":  # the test sees what the call did to its arguments
            after = link.dumps([args, kwargs])
            if not body.endswith(after[1:].replace('{"h": ', '{"y": ')):
                changed = after
        return f"ok\n[{link.dumps(value)}, {changed}]"
    except BaseException as error:
        kinds = [kind.__name__ for kind in type(error).__mro__[:-1]]
        try:
            args = link.dumps(list(error.args))
        except BaseException:
            args = "[]"
        return "raise\n" + f"[{json_dumps(kinds)},{args},{json_dumps(_text(error))}]"


def _text(error):
    try:
        return str(error)[:300]
    except BaseException:
        return ""


def serve(sock, directory):
    """A candidate's life: chdir, then answer requests until the server kills it."""
    link = CandidateLink(sock)
    sys.setrecursionlimit(1010)  # a program's own thousand, as in a process of its own
    message = link.receive()
    os.chdir(directory)
    while True:
        link.send(_answer(link, message))
        message = link.receive()


# ---- isolation -----------------------------------------------------------------------------------

libc = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1, 2, 4, 32, 4096, 16384, 1 << 18,
)  # fmt: skip
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID, CLONE_REST = (
    0x20000, 0x10000000, 0x20000000, 0x40000000 | 0x08000000 | 0x04000000,  # net, ipc, uts
)  # fmt: skip
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
DISK = 16 << 20  # bytes a file, and in all where the file system is ours


def _call(function, *args):
    """A libc function that must succeed. Strings become bytes."""
    args = [a.encode() if isinstance(a, str) else a for a in args]
    if getattr(libc, function)(*args) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")


def _syscall(number, *args):
    result = libc.syscall(number, *args)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def readable_paths():
    """What a candidate may read, this Python's library and the shared objects it loads: (real paths
    without those inside others, {symbolic link: real path})."""
    paths = [f"{prefix}/lib" for prefix in (sys.base_prefix, sys.prefix, "/usr", "/usr/local", "")]
    paths += [path for path in sys.path if os.path.isdir(path)]
    paths += ["/lib64", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache"]
    paths += DEVICES
    found = {path: os.path.realpath(path) for path in paths if os.path.exists(path)}
    real = set(found.values())
    outermost = [p for p in sorted(real) if not any(p.startswith(o + "/") for o in real)]
    return outermost, {path: target for path, target in found.items() if path != target}


def enter_namespaces(paths, links):
    """New namespaces and a read-only root; returns in a new process, number 1 of its own space:
    True if that took a user namespace."""
    uid, gid = os.getuid(), os.getgid()
    flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_REST
    as_user = False
    try:
        _call("unshare", flags)
    except OSError:
        as_user = True
        _call("unshare", flags | CLONE_NEWUSER)
        maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
        for name, text in maps.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    child = os.fork()
    if child:
        os.closerange(0, 1024)
        os.waitpid(child, 0)
        os._exit(0)
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    handles = [(path, os.open(path, os.O_PATH), os.path.isdir(path)) for path in paths]
    _call("mount", "none", "/", None, MS_REC | MS_PRIVATE, None)
    root = "/tmp" if os.path.isdir("/tmp") else "/mnt"
    _call("mount", "tmpfs", root, "tmpfs", MS_NOSUID, "size=1m,mode=755")
    for path, handle, is_directory in handles:
        _bind(f"/proc/self/fd/{handle}", root + path, is_directory)
        os.close(handle)
    for link, target in links.items():
        if not os.path.lexists(root + link):
            os.makedirs(os.path.dirname(root + link), exist_ok=True)
            os.symlink(target, root + link)
    os.makedirs(root + "/tmp", exist_ok=True)
    options = f"size={DISK},nr_inodes=4096,mode=700"
    _call("mount", "tmpfs", root + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, options)
    os.chdir(root)
    _call("mount", "none", root, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID, None)
    _call("syscall", 41 if platform.machine() == "aarch64" else 155, b".", b".")  # pivot_root
    _call("umount2", ".", 2)  # MNT_DETACH: the old root is gone
    os.chdir("/")
    return as_user


def _bind(source, target, is_directory):
    os.makedirs(target if is_directory else os.path.dirname(target), exist_ok=True)
    if not is_directory:
        os.close(os.open(target, os.O_CREAT, 0o600))
    try:
        _call("mount", source, target, None, MS_BIND, None)
    except OSError:  # mounts below it that a user namespace may not uncover
        _call("mount", source, target, None, MS_BIND | MS_REC, None)
    if not target.endswith(DEVICES):  # on these it would mean no use at all
        kept = os.statvfs(target).f_flag & (MS_NOSUID | MS_NODEV | 8 | 1024 | 2048)  # locked flags
        flags = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | kept
        _call("mount", "none", target, None, flags, None)


def enter_landlock(paths, directory):
    """From here on no file but `paths` (read) and `directory` (all), for this process's children
    too; no TCP, abstract sockets or signals to the outside where the kernel knows of them."""
    abi = _syscall(444, None, 0, 1)
    files = (1 << (13 if abi < 2 else 14 if abi < 3 else 15 if abi < 5 else 16)) - 1
    attributes = struct.pack("QQQ", files, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    ruleset = _syscall(444, attributes, size, 0)
    for path in [*paths, directory]:
        handle = os.open(path, os.O_PATH)
        rights = files if path == directory else 0b1101  # execute (dlopen), read file, read dir
        if not os.path.isdir(path):
            rights &= 0b110  # read and write file
            rights |= 0b10 if path in DEVICES else 0
        _syscall(445, ruleset, 1, struct.pack("<Qi", rights, handle), 0)
        os.close(handle)
    _syscall(446, ruleset, 0)
    os.close(ruleset)


# Two filters. The server's own, inherited: the system calls that Python, numpy, threads and asyncio
# use and the few that a server needs. Not in it, hence refused (EPERM): execve, ptrace, socket,
# connect, utime, link, mount, keyctl, bpf, io_uring, memfd_create, process_vm_*, pidfd_*, shm*, ...
_ALLOWED = {
    "x86_64": "0-28 32-40 44-48 51-56 60-63 72-77 79-85 87 89-90 92 96-100 102 104 107-108 110-111"
    " 115-118 120 126-128 130-131 137-138 140 143 145 149-150 157-158 160 186 202 204 217-218"
    " 228-234 247 257-258 260 262-264 267-271 273-274 281 285 290-293 302 316 318 324 326 332 334"
    " 436 439 449",
    "aarch64": "17 19-25 29 32 34-35 38 43-50 53-57 59 61-68 71-73 78-80 82-83 91 93-96 98-103"
    " 113-115 120-121 123-124 129 131-139 141 147-148 150 153 158-160 163-165 167 169 172-179 199"
    " 204-212 214-216 220 222 226-229 232-233 260-261 276 278 283 285 291 293 436 439 449",
}
# The candidate's, on top: arguments of some calls, and nothing of what is the server's alone.
_OWN_PID = 0x5EC0DE5E  # stands for the candidate's pid in the filter made ahead of time
_THREADS = "threads only"
_RULES = {  # name: ((numbers on x86_64 and aarch64), [(argument, allowed values)])
    "clone": ((56, 220), _THREADS),
    "kill": ((62, 129), [(0, [_OWN_PID])]),
    "tgkill": ((234, 131), [(0, [_OWN_PID])]),
    "socketpair": ((53, 199), [(0, [1]), (1, [1, 0x801, 0x80001, 0x80801])]),  # local streams
    "ioctl": ((16, 29), [(1, [0x5401, 0x541B, 0x5421, 0x5450, 0x5451])]),  # tty? blocking? ...
    "fcntl": ((72, 25), [(1, [0, 1, 2, 3, 4, 5, 6, 7, 1030])]),  # not F_SETOWN: signals to others
    "prctl": ((157, 167), [(0, [15, 16])]),  # a thread's name
    "prlimit": ((302, 261), [(0, [0, _OWN_PID])]),
    "chmod": ((90, None), []),
    "fchmodat": ((268, 53), []),
    "fchown": ((92, None), []),
    "fchownat": ((260, 54), []),
    "setgroups": ((116, 159), []),
    "setresuid": ((117, 147), []),
    "capset": ((126, 91), []),
}
_NO_BITS = "none of the bits"
_WRITES = {  # refused as well where no file system and no landlock of ours stands in the way
    "open": ((2, None), [(1, _NO_BITS)]),
    "openat": ((257, 56), [(2, _NO_BITS)]),
    **{name: (numbers, []) for name, numbers in {
        "creat": (85, None), "truncate": (76, 45), "rename": (82, None), "renameat": (264, 38),
        "renameat2": (316, 276), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None),
        "unlink": (87, None), "unlinkat": (263, 35),
    }.items()},
}  # fmt: skip
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _ABOVE, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x25, 0x45, 0x06


def seccomp_filters(may_write):
    """(the server's filter, the candidate's) as bytes, the latter with _OWN_PID in it."""
    machine = platform.machine()
    audit = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]
    start = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, audit), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    allow, refuse = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)
    server = [(_EQUAL, 0, 1, 435), (_RETURN, 0, 0, _REFUSE + 37)]  # clone3: ENOSYS, use clone
    for part in _ALLOWED[machine].split():
        low, _, high = part.partition("-")
        server += [(_AT_LEAST, 0, 2, int(low)), (_ABOVE, 1, 0, int(high or low)), allow]
    candidate = []
    for numbers, rules in (_RULES if may_write else _RULES | _WRITES).values():
        number = numbers[machine == "aarch64"]
        if rules is _THREADS:
            block = [(_LOAD, 0, 0, 16), (_ANY_BIT, 0, 1, 0x10000), allow, refuse]
        else:
            block = []
            for argument, values in rules:
                block.append((_LOAD, 0, 0, 16 + 8 * argument))
                if values is _NO_BITS:
                    block += [(_ANY_BIT, 0, 1, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)]
                    block += [refuse]
                    continue
                left = len(values)
                block += [(_EQUAL, left - i, 0, value) for i, value in enumerate(values)]
                block.append(refuse)
            block.append(allow if rules else refuse)
        if number is not None:
            candidate += [(_EQUAL, 0, len(block), number), *block]
    programs = [*start, *server, refuse], [*start, *candidate, allow]
    return [b"".join(struct.pack("HBBI", *line) for line in program) for program in programs]


def enter_seccomp(program):
    program = program.replace(struct.pack("I", _OWN_PID), struct.pack("I", os.getpid()))
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    _call("prctl", PR_SET_SECCOMP, 2, header, 0, 0)


# ---- the server ----------------------------------------------------------------------------------

PRELOADED = (
    "__future__", "bisect", "collections", "copy", "dataclasses", "datetime", "enum", "functools",
    "heapq", "itertools", "math", "operator", "random", "re", "statistics", "string", "typing",
)  # fmt: skip


class Server:
    """Forks candidates; keeps one ready. One at a time is in use; ending it is kill and wait.

    Requests on `control`, one byte each: "n" end the current candidate, then hand over the next
    (answer: how the old one ended, with the new one's socket); "c" CPU seconds of the current one.
    """

    def __init__(self, control, options):
        self.control, self.options = control, options
        self.current, self.spare = None, None  # (pid, the tester's end of its socket)
        pages = int(open("/proc/self/statm").read().split()[0])
        self.memory = (options["memory_mb"] << 20) + pages * resource.getpagesize()
        self.uid = (1 << 30) + os.getpid() if os.geteuid() == 0 else None  # no other process's
        self.filter = None

    def isolate(self):
        """Enter the layers not named in options["without"]; their names. Raises LayerError."""
        layers = "namespaces", "landlock", "seccomp"
        wanted = [layer for layer in layers if layer not in self.options["without"]]
        paths, links = readable_paths()
        if "namespaces" in wanted:
            with _layer("namespaces"):
                if enter_namespaces(paths, links):
                    self.uid = None  # a user namespace knows one id; capabilities are dropped
            self.directory = "/tmp"
            paths = [path for path in paths if os.path.exists(path)]
        else:
            self.directory = f"{self.options['temporary']}/pfppo-jail-{os.urandom(6).hex()}"
            os.mkdir(self.directory, 0o700)
            if self.uid and "landlock" in wanted and not _open_to_others(sys.base_prefix):
                self.uid = None  # it could not import; as root without capabilities it can
        if self.uid:
            os.chown(self.directory, self.uid, self.uid)
        _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
        if "landlock" in wanted:
            with _layer("landlock"):
                enter_landlock(paths, self.directory)
        self._limit()
        if "seccomp" in wanted:
            with _layer("seccomp"):
                ours, self.filter = seccomp_filters(may_write=len(wanted) > 1)
                enter_seccomp(ours)
        return wanted

    def _limit(self):
        """Limits that do not hinder the server are set here and inherited."""
        os.environ.update(HOME=self.directory, TMPDIR=self.directory)
        if self.uid:
            os.setgroups([])
            os.setresgid(self.uid, self.uid, self.uid)
        limits = {"AS": self.memory, "FSIZE": DISK, "NOFILE": 64, "CORE": 0, "MEMLOCK": 0}
        for name, most in limits.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))

    def fork(self):
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid:
            theirs.close()
            self.spare = pid, ours
            return
        try:
            ours.close()
            self._confine(theirs)
            serve(socket.socket(fileno=3), self.directory)
        finally:
            os._exit(1)

    def _confine(self, sock):
        """In the child: everything that makes it a candidate; seccomp last."""
        os.dup2(sock.detach(), 3)
        os.closerange(4, 1 << 20)
        seconds = int(self.options["timeout"]) + 2  # the tester reads the clock; this is a backstop
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        if self.uid or not self.filter:  # counted per user. Without seccomp: no thread, so no fork
            threads = 64 if self.filter else 1
            resource.setrlimit(resource.RLIMIT_NPROC, (threads, threads))
        if self.uid:
            os.setresuid(self.uid, self.uid, self.uid)
        else:
            _call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
        _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
        if self.filter:
            enter_seccomp(self.filter)

    def end_current(self):
        """Kill, reap and clean up after the current candidate; how it had ended, for the tester."""
        if self.current is None:
            return {}
        pid, _ = self.current
        self.current = None
        os.kill(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        try:
            left = os.listdir(self.directory)
        except OSError:
            left = [self.directory]
        if left:
            self._sweep()
        return {
            "code": os.waitstatus_to_exitcode(status),
            "cpu": usage.ru_utime + usage.ru_stime,
        }

    def _sweep(self):
        """Empty the working directory, unreadable folders included; make it again if need be."""
        for _ in range(2):
            for folder, folders, files in os.walk(self.directory, topdown=False):
                for name in folders + files:
                    path = os.path.join(folder, name)
                    with contextlib.suppress(OSError):
                        if os.path.isdir(path) and not os.path.islink(path):
                            os.chmod(path, 0o700)  # for the second round
                            os.rmdir(path)
                        else:
                            os.unlink(path)
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.directory, 0o700)
            if self.uid:
                os.chown(self.directory, self.uid, self.uid)

    def run(self):
        self.fork()
        while request := self.control.recv(1):
            if request == b"n":
                ended = self.end_current()
                (pid, sock), self.spare = self.spare, None
                socket.send_fds(self.control, [json_dumps(ended).encode()], [sock.fileno()])
                sock.close()
                self.current = pid, None
                self.fork()
            elif request == b"c":
                clock = (~self.current[0] << 3) | 2  # the kernel's name for a process's CPU clock
                self.control.send(json_dumps(time.clock_gettime(clock)).encode())


class LayerError(Exception):
    """A layer that this machine does not grant: (its name, why)."""


@contextlib.contextmanager
def _layer(name):
    try:
        yield
    except (OSError, KeyError, AttributeError) as error:
        raise LayerError(name, f"{type(error).__name__}: {error}") from None


def _open_to_others(path):
    while path != "/":
        if not os.stat(path).st_mode & 1:
            return False
        path = os.path.dirname(path)
    return True


def main(options):
    """The server's process. Descriptor 0 is the control socket."""
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    control = socket.socket(fileno=os.dup(0))
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    os.close(null)
    sys.stdout.reconfigure(errors="backslashreplace")
    directory = os.environ.get("TMPDIR", "/tmp")
    os.environ.clear()
    sys.argv = ["candidate.py"]
    os.register_at_fork = lambda **hooks: None  # they cost a tenth of a fork, and reseed `random`
    for name in PRELOADED + tuple(options["preload"]):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for name in {"random", "numpy.random"} & sys.modules.keys():
        sys.modules[name].seed(0)  # every candidate draws the same numbers
    server = Server(control, {**options, "temporary": directory})
    try:
        layers = server.isolate()
    except LayerError as error:
        control.send(json_dumps({"failed": error.args[0], "why": error.args[1]}).encode())
        return
    except Exception as error:
        control.send(json_dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        raise
    control.send(json_dumps({"layers": layers, "directory": server.directory}).encode())
    gc.collect()
    gc.freeze()
    server.run()
