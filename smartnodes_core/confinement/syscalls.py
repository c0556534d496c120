"""Numbers of system calls, and which of them a process that computes makes.

The lists come from tracing torch (import, training with threads, oneDNN's compiled kernels) and from what the C
library and Python do besides. What is not here is refused with EPERM, which torch and Python take for a missing
permission and go on. Numbers are from the kernel's headers; a name that an architecture lacks is not in its table.
"""

from __future__ import annotations

# fmt: off
X86_64 = {
    "accept": 43, "accept4": 288, "access": 21, "alarm": 37, "arch_prctl": 158, "bind": 49, "brk": 12,
    "clock_getres": 229, "clock_gettime": 228, "clock_nanosleep": 230, "clone": 56, "clone3": 435, "close": 3,
    "close_range": 436, "connect": 42, "dup": 32, "epoll_create": 213, "epoll_create1": 291, "epoll_ctl": 233,
    "epoll_pwait": 281, "epoll_wait": 232, "eventfd2": 290, "exit": 60, "exit_group": 231, "faccessat": 269,
    "faccessat2": 439, "fadvise64": 221, "fcntl": 72, "fstat": 5, "ftruncate": 77, "futex": 202, "get_mempolicy": 239,
    "get_robust_list": 274, "getcpu": 309, "getcwd": 79, "getdents64": 217, "getegid": 108, "geteuid": 107,
    "getgid": 104, "getitimer": 36, "getpeername": 52, "getpid": 39, "getppid": 110, "getpriority": 140,
    "getrandom": 318, "getrlimit": 97, "getrusage": 98, "getsockname": 51, "getsockopt": 55, "gettid": 186,
    "gettimeofday": 96, "getuid": 102, "ioctl": 16, "listen": 50, "lseek": 8, "lstat": 6, "madvise": 28, "mbind": 237,
    "membarrier": 324, "memfd_create": 319, "mincore": 27, "mlock": 149, "mlock2": 325, "mmap": 9, "mprotect": 10,
    "mremap": 25, "munlock": 150, "munmap": 11, "nanosleep": 35, "newfstatat": 262, "open": 2, "openat": 257,
    "openat2": 437, "pause": 34, "pipe2": 293, "poll": 7, "ppoll": 271, "prctl": 157, "pread64": 17, "preadv": 295,
    "preadv2": 327, "prlimit64": 302, "pselect6": 270, "pwrite64": 18, "pwritev": 296, "pwritev2": 328, "read": 0,
    "readlink": 89, "readlinkat": 267, "readv": 19, "recvfrom": 45, "recvmsg": 47, "restart_syscall": 219, "rseq": 334,
    "rt_sigaction": 13, "rt_sigpending": 127, "rt_sigprocmask": 14, "rt_sigreturn": 15, "sched_get_priority_max": 146,
    "sched_get_priority_min": 147, "sched_getaffinity": 204, "sched_getparam": 143, "sched_getscheduler": 145,
    "sched_setaffinity": 203, "sched_yield": 24, "seccomp": 317, "select": 23, "sendto": 44, "set_mempolicy": 238,
    "set_robust_list": 273, "set_tid_address": 218, "setitimer": 38, "setpriority": 141, "setsockopt": 54,
    "shutdown": 48, "sigaltstack": 131, "socket": 41, "stat": 4, "statx": 332, "sysinfo": 99, "tgkill": 234,
    "time": 201, "times": 100, "umask": 95, "uname": 63, "write": 1, "writev": 20,
}

AARCH64 = {
    "accept": 202, "accept4": 242, "bind": 200, "brk": 214, "clock_getres": 114, "clock_gettime": 113,
    "clock_nanosleep": 115, "clone": 220, "clone3": 435, "close": 57, "close_range": 436, "connect": 203, "dup": 23,
    "epoll_create1": 20, "epoll_ctl": 21, "epoll_pwait": 22, "eventfd2": 19, "exit": 93, "exit_group": 94,
    "faccessat": 48, "faccessat2": 439, "fadvise64": 223, "fcntl": 25, "fstat": 80, "ftruncate": 46, "futex": 98,
    "get_mempolicy": 236, "get_robust_list": 100, "getcpu": 168, "getcwd": 17, "getdents64": 61, "getegid": 177,
    "geteuid": 175, "getgid": 176, "getitimer": 102, "getpeername": 205, "getpid": 172, "getppid": 173,
    "getpriority": 141, "getrandom": 278, "getrlimit": 163, "getrusage": 165, "getsockname": 204, "getsockopt": 209,
    "gettid": 178, "gettimeofday": 169, "getuid": 174, "ioctl": 29, "listen": 201, "lseek": 62, "madvise": 233,
    "mbind": 235, "membarrier": 283, "memfd_create": 279, "mincore": 232, "mlock": 228, "mlock2": 284, "mmap": 222,
    "mprotect": 226, "mremap": 216, "munlock": 229, "munmap": 215, "nanosleep": 101, "newfstatat": 79, "openat": 56,
    "openat2": 437, "pipe2": 59, "ppoll": 73, "prctl": 167, "pread64": 67, "preadv": 69, "preadv2": 286,
    "prlimit64": 261, "pselect6": 72, "pwrite64": 68, "pwritev": 70, "pwritev2": 287, "read": 63, "readlinkat": 78,
    "readv": 65, "recvfrom": 207, "recvmsg": 212, "restart_syscall": 128, "rseq": 293, "rt_sigaction": 134,
    "rt_sigpending": 136, "rt_sigprocmask": 135, "rt_sigreturn": 139, "sched_get_priority_max": 125,
    "sched_get_priority_min": 126, "sched_getaffinity": 123, "sched_getparam": 121, "sched_getscheduler": 120,
    "sched_setaffinity": 122, "sched_yield": 124, "seccomp": 277, "sendto": 206, "set_mempolicy": 237,
    "set_robust_list": 99, "set_tid_address": 96, "setitimer": 103, "setpriority": 140, "setsockopt": 208,
    "shutdown": 210,
    "sigaltstack": 132, "socket": 198, "statx": 291, "sysinfo": 179, "tgkill": 131, "times": 153, "umask": 166,
    "uname": 160, "write": 64, "writev": 66,
}

#: Allowed with any arguments: they touch this process's own memory, threads, clock and open descriptors, or read.
ALWAYS = (
    "access", "alarm", "arch_prctl", "brk", "clock_getres", "clock_gettime", "clock_nanosleep", "close",
    "close_range", "dup", "exit", "exit_group", "faccessat", "faccessat2", "fadvise64", "fstat", "futex",
    "get_robust_list", "getcpu", "getcwd", "getdents64", "getegid", "geteuid", "getgid", "getitimer", "getpeername",
    "getpid", "getpriority", "getppid", "getrandom", "getrlimit", "getrusage", "getsockname", "getsockopt", "gettid",
    "gettimeofday", "getuid", "lseek", "lstat", "madvise", "membarrier", "mincore", "mmap", "mprotect", "mremap",
    "munmap", "nanosleep", "newfstatat", "pause", "poll", "ppoll", "pread64", "preadv", "preadv2", "pselect6",
    "pwrite64", "pwritev", "pwritev2", "read",
    "readlink", "readlinkat", "readv", "recvfrom", "restart_syscall", "rseq", "rt_sigaction", "rt_sigpending",
    "rt_sigprocmask", "rt_sigreturn", "sched_getaffinity", "sched_yield", "select", "set_robust_list",
    "set_tid_address", "setitimer", "setsockopt", "shutdown", "sigaltstack", "stat", "statx", "sysinfo", "time",
    "times", "umask", "uname", "write", "writev",
)

#: What the CUDA driver needs besides, whatever the arguments; files stay bounded by Landlock.
CUDA = (
    "epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_wait", "eventfd2", "ftruncate", "get_mempolicy", "ioctl",
    "mbind", "memfd_create", "mlock", "mlock2", "munlock", "open", "openat", "pipe2", "sched_get_priority_max",
    "sched_get_priority_min", "sched_getparam", "sched_getscheduler", "sched_setaffinity", "set_mempolicy",
)
#: What a rig of several devices needs besides, for good: its ranks wait for each other on connected sockets.
RANKS = ("epoll_ctl", "epoll_pwait", "epoll_wait")

#: And while its ranks connect, before the first message is taken: sockets, and the filter that ends all of this.
CONNECTING = (
    *RANKS, "accept", "accept4", "bind", "connect", "epoll_create", "epoll_create1", "eventfd2", "listen", "pipe2",
    "recvmsg", "seccomp", "sendto", "socket",
)
# fmt: on
