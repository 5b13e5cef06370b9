"""The sandbox's processes as their owner sees them: the servers that it starts, and the clocks that
it reads. Nothing here believes what a process says of itself.

Not here: what the servers do (candidate.py, judge.py), and what a clock's time means (__init__.py).
"""

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import time


class Server:
    """A process that forks judges or candidates, as its owner sees it. `control` carries requests
    and replies, `births` the sockets of its children. At the end of `control` it reaps them, and
    ends. Layers of walls that the machine refuses are added to options["without"]."""

    def __init__(self, module, options, preload):
        said = {"refused": None}
        while "refused" in said:
            self.control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.births, births = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.control.settimeout(60)
            self.births.settimeout(60)
            own = {"preload": preload, "directory": f"{options['folder']}/{os.urandom(6).hex()}"}
            with control, births:
                self.process = _start_python(module, options | own, control, births)
            if not (hello := self.control.recv(1 << 12)):
                self.close()
                raise RuntimeError("the sandbox does not start; see standard error")
            if "refused" in (said := json.loads(hello)):
                self.close()
                options["without"] = [*options["without"], said["refused"]]
        self.layers = said["layers"]

    def next(self):
        """The socket of the next child, its process id, and the same as the server knows it."""
        inner, descriptors, *_ = socket.recv_fds(self.births, 64, 1)
        if not descriptors:
            raise EOFError("no more births")
        sock = socket.socket(fileno=descriptors[0])
        peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return sock, struct.unpack("3i", peer)[0], inner

    def end(self, inner):
        """End a child: [exit status or minus the signal that ended it, CPU seconds]."""
        self.control.send(inner)
        return json.loads(self.control.recv(1 << 12))

    def close(self):
        self.control.close()
        self.births.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def cpu_seconds(*pids):
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)  # the kernel's names for them


def all_sleep(*pids):
    """Does every thread of these processes wait, and for something else than a core?"""
    before = cpu_seconds(*pids)
    for pid in pids:
        with contextlib.suppress(OSError):  # not to be seen, so believe the clock
            for thread in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{thread}/stat") as file:
                    if file.read().rpartition(")")[2].split()[0] == "R":
                        return False
    return cpu_seconds(*pids) == before  # else they took turns while this looked


def _start_python(module, options, stdin, stdout):
    """A process that runs `pfppo.sandbox.MODULE.main(options)`: a clean interpreter with nothing of
    this one's environment. An empty package stands for pfppo.sandbox, so that nothing of this side
    is in a candidate's process. All of the module's imports happen before `main`: then the path is
    gone."""
    code = (
        "import json, os, sys, types; os.register_at_fork = lambda **hooks: None;"  # cost each fork
        "name = 'pfppo.sandbox'; package = sys.modules[name] = types.ModuleType(name);"
        "package.__path__ = [sys.argv[1]];"
        f"from pfppo.sandbox.{module} import main; package.__path__ = [];"
        "main(json.loads(sys.argv[2]))"
    )
    environment = {
        "PYTHONHASHSEED": "0",
        "LANG": "C.UTF-8",
        "MALLOC_ARENA_MAX": "1",  # each arena of a thread would reserve 64 MB of address space
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""),
    }
    command = [sys.executable, "-P", "-c", code, os.path.dirname(__file__), json.dumps(options)]
    streams = {"stdin": stdin, "stdout": stdout}
    return subprocess.Popen(command, env=environment, cwd="/", start_new_session=True, **streams)
