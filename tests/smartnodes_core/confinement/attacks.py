"""What hostile code would try once it runs inside a computing process. Each raises OSError where it is refused."""

import ctypes
import os
import platform
import signal
import socket
import struct
import subprocess
import threading
import time

_NUMBERS = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "mount": (165, 40), "bpf": (321, 280), "keyctl": (250, 219),
    "io_uring_setup": (425, 425), "userfaultfd": (323, 282), "perf_event_open": (298, 241), "unshare": (272, 97),
    "pidfd_open": (434, 434), "setns": (308, 268), "memfd_create": (319, 279), "init_module": (175, 105),
    "add_key": (248, 217), "personality": (135, 92), "socketpair": (53, 199), "fork": (57, None), "clone": (56, 220),
    "io_uring_register": (427, 427), "pidfd_send_signal": (424, 424), "sched_setscheduler": (144, 119),
}  # fmt: skip


def call(name, *arguments):
    number = _NUMBERS[name][platform.machine() == "aarch64"]
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(number, *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


def _fork():
    if os.fork() == 0:
        os._exit(0)


def _connect():
    with socket.socket() as end:
        end.connect(("127.0.0.1", 9))


def _read(path):
    with open(path, "rb") as file:
        return len(file.read(1))


def _write(path):
    with open(path, "w") as file:
        file.write("x")


def attacks(folder, parent):
    """By name. `folder` holds a file called key; `parent` is a process of the same user."""
    home = os.path.expanduser("~")
    return {
        "open a socket": socket.socket,
        "open a Unix socket": lambda: socket.socket(socket.AF_UNIX),
        "connect": _connect,
        "send to an address": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 9)),
        "make a pair of sockets": socket.socketpair,
        "read the key": lambda: _read(os.path.join(folder, "key")),
        "list the key's folder": lambda: os.listdir(folder),
        "read the password file": lambda: _read("/etc/passwd"),
        "list the home folder": lambda: os.listdir(home if os.path.isdir(home) else "/"),
        "list the root folder": lambda: os.listdir("/"),
        "read the node's environment": lambda: _read(f"/proc/{parent}/environ"),
        "read the node's memory": lambda: _read(f"/proc/{parent}/mem"),
        "list processes": lambda: os.listdir("/proc"),
        "write a file": lambda: _write(os.path.join(folder, "new")),
        "write over a file": lambda: _write(os.path.join(folder, "key")),
        "write to the temporary folder": lambda: _write("/tmp/attack"),
        "write beside its own code": lambda: _write(os.path.join(os.path.dirname(__file__), "new")),
        "truncate a file": lambda: os.truncate(os.path.join(folder, "key"), 0),
        "remove a file": lambda: os.remove(os.path.join(folder, "key")),
        "rename a file": lambda: os.rename(os.path.join(folder, "key"), os.path.join(folder, "other")),
        "make a folder": lambda: os.mkdir(os.path.join(folder, "newer")),
        "link a file": lambda: os.link(os.path.join(folder, "key"), os.path.join(folder, "other")),
        "change a mode": lambda: os.chmod(os.path.join(folder, "key"), 0o777),
        "run a program": lambda: subprocess.run(["/bin/true"], check=True),
        "become a program": lambda: os.execv("/bin/true", ["true"]),
        "fork": _fork,
        "clone a process": lambda: call("clone", signal.SIGCHLD, 0, 0, 0, 0),
        "kill the node": lambda: os.kill(parent, 0),
        "kill everything": lambda: os.kill(-1, 0),
        "trace the node": lambda: call("ptrace", 16, parent, 0, 0),
        "read memory of the node": lambda: call("process_vm_readv", parent, 0, 0, 0, 0, 0),
        "mount": lambda: call("mount", 0, 0, 0, 0, 0),
        "load a filter": lambda: call("bpf", 0, 0, 0),
        "use the keyring": lambda: call("keyctl", 0, 0, 0, 0, 0),
        "io_uring": lambda: call("io_uring_setup", 1, ctypes.create_string_buffer(256)),
        "userfaultfd": lambda: call("userfaultfd", 0),
        "perf": lambda: call("perf_event_open", ctypes.create_string_buffer(256), 0, -1, -1, 0),
        "new namespaces": lambda: call("unshare", 0x10000000),
        "a handle of the node": lambda: call("pidfd_open", parent, 0),
        "an anonymous file": lambda: call("memfd_create", ctypes.c_char_p(b"x"), 0),
        "another personality": lambda: call("personality", 0x0400000),
        "raise its limits": lambda: __import__("resource").setrlimit(7, (4096, 4096)),
        "become root": lambda: os.setuid(0),
        "change another's priority": lambda: os.setpriority(os.PRIO_PROCESS, parent, 19),
        "raise its own priority": lambda: os.setpriority(os.PRIO_PROCESS, 0, -5),
        "watch files": lambda: ctypes.CDLL(None, use_errno=True).inotify_init() < 0 and _raise("inotify"),
        "open a terminal": lambda: _write("/dev/tty"),
    }


def _raise(what):
    raise OSError(ctypes.get_errno(), what)


def works():
    """What computing needs, by name: raises where it does not work."""
    found = []
    thread = threading.Thread(target=lambda: found.append(1))
    thread.start()
    thread.join()
    import mmap

    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)  # compiled kernels
    page.close()
    time.sleep(0)
    os.urandom(8)
    struct.pack("I", len(os.sched_getaffinity(0)))
    import colorsys  # from the standard library, for the first time

    return bool(found) and colorsys.__name__ == "colorsys"


def outcomes(folder, parent):
    """For each attack "refused: why" or "done"."""
    found = {}
    for name, attack in attacks(folder, parent).items():
        try:
            attack()
        except (OSError, ValueError) as error:
            found[name] = f"refused: {error}"
        else:
            found[name] = "done"
    return found
