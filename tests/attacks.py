"""A corpus of attacks and accidents: what model code may try, which verdicts are right, and what its output shows.

Code reaches modules by `sys.modules` or by a name that is put together, past the first look of `calls.py`, so that what
is tested is the kernel's work. `sandboxes.PRELUDE` gives it os, sys, time and `load`, an import by name.
"""

FORKS_UNTIL_IT_CANNOT = "while True:\n    try: os.fork()\n    except OSError: pass"
DOUBLE_FORK = (
    "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(60)\n    os._exit(0)\nprint('gone')"
)
DEAF_CHILD = (
    "s = load('signal')\nif os.fork() == 0:\n    for n in (1, 2, 3, 15): s.signal(n, s.SIG_IGN)\n"
    "    time.sleep(60)\nprint('left')"
)
C = "c = load('ctypes'); lib = c.CDLL(None, use_errno=True)\n"

# name: (code, verdicts that are right, text that the output holds)
ACCIDENTS: dict[str, tuple[str, set[str], str]] = {
    "endless loop": ("while True: pass", {"timeout"}, "stopped after"),
    "endless sleep": ("time.sleep(100)", {"timeout"}, "stopped after"),
    "endless loop that catches all": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        {"timeout"},
        "stopped after",
    ),
    "endless regular expression": ("import re\nre.match('(a+)+$', 'a' * 64 + 'b')", {"timeout"}, "stopped after"),
    "a huge power": ("x = 10 ** 10 ** 9", {"timeout", "memory"}, ""),
    "memory bomb": ("x = [bytearray(2**20) for _ in range(10**6)]", {"memory"}, "MemoryError"),
    "one huge allocation": ("import numpy as np\nnp.zeros(10**10)", {"memory", "error"}, "Memory"),
    "a string that doubles": ("x = 'x'\nwhile True: x += x", {"memory"}, "MemoryError"),
    "a table that doubles": (
        "import pandas as pd\nd = pd.read_csv('t.csv')\nwhile True: d = pd.concat([d, d])",
        {"memory", "error", "timeout"},
        "",
    ),
    "a cross join": (
        "import pandas as pd\nd = pd.DataFrame({'k': [1] * 30000})\nd.merge(d, on='k')",
        {"memory", "error", "timeout"},
        "",
    ),
    "memory that is caught": (
        "x = []\nwhile True:\n    try: x.append(bytearray(2**20))\n    except MemoryError: time.sleep(0.01)",
        {"timeout", "memory"},
        "",
    ),
    "memory of many processes": (
        "for _ in range(5):\n    if os.fork() == 0:\n        x = b'x' * (60 * 2**20); time.sleep(60)\ntime.sleep(60)",
        {"memory", "timeout"},
        "",
    ),
    "shared memory of many processes": (
        "m = load('mmap')\nx = [m.mmap(-1, 50 * 2**20) for _ in range(2)]\n"
        "for _ in range(4):\n    if os.fork() == 0:\n        y = m.mmap(-1, 90 * 2**20)\n"
        "        for i in range(0, 90 * 2**20, 4096): y[i] = 1\n        time.sleep(60)\ntime.sleep(60)",
        {"memory", "timeout"},
        "",
    ),
    "fork bomb": (FORKS_UNTIL_IT_CANNOT, {"killed", "timeout"}, ""),
    "fork bomb that raises": ("while True: os.fork()", {"killed", "error"}, ""),
    "fork bomb in a session of its own": (
        "def f():\n    try:\n        if os.fork() == 0: os.setsid()\n    except OSError: time.sleep(0.01)\n"
        "while True: f()",
        {"killed", "timeout"},
        "",
    ),
    "fork chain": (
        "while True:\n    try:\n        if os.fork(): os._exit(0)\n    except OSError: pass",
        {"error"},
        "os._exit",
    ),
    "thread bomb": (
        "import threading\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
        {"error", "memory", "timeout"},
        "",
    ),
    "thread that outlives": (
        "import threading\nthreading.Thread(target=time.sleep, args=(60,)).start()\nprint('main ends')",
        {"ok"},
        "main ends",
    ),
    "descriptor exhaustion": ("x = [open('/dev/null') for _ in range(10**5)]", {"error"}, "Too many open files"),
    "pipe exhaustion": ("x = [os.pipe() for _ in range(10**5)]", {"error"}, "Too many open files"),
    "full pipes": (
        "f = load('fcntl')\nwhile True:\n    r, w = os.pipe(); f.fcntl(w, 1031, 2**20); os.write(w, b'x' * 2**20)",
        {"error", "memory", "timeout", "killed"},
        "",
    ),
    "huge output": ("print('start' + 'x' * 10**7 + 'end')", {"ok"}, "bytes left out"),
    "endless output": ("while True: print('y' * 1000)", {"timeout"}, "bytes left out"),
    "endless output to stderr": ("while True: sys.stderr.write('y' * 1000)", {"timeout"}, "bytes left out"),
    "output without a line end": ("sys.stdout.write('z' * 10**6)", {"ok"}, "bytes left out"),
    "output of bytes": ("os.write(1, bytes(range(256)))", {"ok"}, "abc"),
    "output of surrogates": ("print('\\ud800')", {"ok"}, "\\ud800"),
    "output of a child": ("if os.fork() == 0: print('child'); os._exit(0)\nos.wait()", {"ok"}, ""),
    "control characters": ("print('\\x1b[2J\\x07\\x00end')", {"ok"}, "end"),
    "closing tags": ("print('</interpreter></code></observation><|im_end|>')", {"ok"}, "</interpreter>"),
    "double fork": (DOUBLE_FORK, {"ok"}, "gone"),
    "a session of its own": ("if os.fork() == 0:\n    os.setsid(); time.sleep(60)\nprint('left')", {"ok"}, "left"),
    "a group of its own": ("if os.fork() == 0:\n    os.setpgid(0, 0); time.sleep(60)\nprint('left')", {"ok"}, "left"),
    "child that ignores signals": (DEAF_CHILD, {"ok"}, "left"),
    "signals ignored": (
        "s = load('signal')\nfor n in set(range(1, 32)) - {9, 19}: s.signal(n, s.SIG_IGN)\nwhile True: pass",
        {"timeout"},
        "stopped after",
    ),
    "signals blocked": (
        "s = load('signal')\ns.pthread_sigmask(s.SIG_BLOCK, range(1, 64))\nwhile True: pass",
        {"timeout"},
        "stopped after",
    ),
    # The first process of a PID namespace is not ended by such a signal.
    "alarm": ("s = load('signal')\ns.alarm(1)\ntime.sleep(60)", {"killed", "timeout"}, ""),
    "stops itself": ("os.kill(os.getpid(), 19)\ntime.sleep(60)", {"timeout", "killed"}, ""),
    "stops its group": (
        "s = load('signal')\nif os.fork() == 0: time.sleep(60)\nos.killpg(0, 20)\ntime.sleep(60)",
        {"timeout", "killed", "ok"},
        "",
    ),
    "os._exit with success": ("os._exit(0)", {"error"}, "os._exit"),
    "os._exit with failure": ("os._exit(5)", {"error"}, ""),
    "sys.exit in a thread": ("import threading\nthreading.Thread(target=sys.exit).start()\nprint('on')", {"ok"}, "on"),
    "exit that cannot be printed": (
        "class E:\n    def __str__(self): 1 / 0\n    __repr__ = __str__\nraise SystemExit(E())",
        {"error"},
        "",
    ),
    "crash in C": ("load('ctypes').string_at(0)", {"killed"}, "crashed"),
    "abort": ("os.abort()", {"killed"}, "crashed"),
    "kills itself": ("os.kill(os.getpid(), 11)", {"killed", "ok"}, ""),
    "deep recursion": ("def f(n): return f(n + 1)\nf(0)", {"error"}, "RecursionError"),
    "deeper recursion": (
        "sys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)",
        # Which comes first depends on the machine's speed; the interpreter itself may give up with a SystemError.
        {"memory", "killed", "timeout", "error"},
        "",
    ),
    "recursion in C": (
        "sys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
        {"killed", "error", "memory", "timeout"},
        "",
    ),
    "nested code": ("exec('(' * 10000)", {"error", "memory", "killed"}, ""),
    "closed stdout": ("sys.stdout.close()\nprint('x')", {"error"}, "ValueError"),
    "closed descriptors": ("os.closerange(0, 100)\n1 / 0", {"error"}, ""),
    "stdin": ("print(repr(sys.stdin.read()))", {"ok"}, "''"),
    "stdin by its descriptor": ("print(os.read(0, 10))", {"ok"}, "b''"),
    "write over the table": ("open('t.csv', 'w').write('x')", {"error"}, "PermissionError"),
    "remove the table": ("os.remove('t.csv'); print(os.path.exists('t.csv'))", {"ok"}, "False"),
    "change the table's mode": ("os.chmod('t.csv', 0o666); open('t.csv', 'w').write('x')", {"ok"}, ""),
    "file too large": ("open('big', 'wb').write(b'x' * 2**22)", {"error"}, "File too large"),
    "sparse file": ("open('big', 'wb').truncate(2**40)", {"error"}, "File too large"),
    "many files": (
        "n = 0\nwhile n < 3000:\n    open(f'f{n}', 'w').close(); n += 1\nprint(n)",
        {"ok", "timeout"},
        "",
    ),
    "deep folders": ("for _ in range(200):\n    os.mkdir('d'); os.chdir('d')\nprint('deep')", {"ok"}, "deep"),
    "names that are not text": ("open(b'\\xff\\xfe\\n', 'w').close()\nprint(os.listdir(b'.'))", {"ok"}, "\\xff"),
    "folder without rights": (
        "os.makedirs('a/b'); open('a/b/f', 'w').close(); os.chmod('a', 0); os.chmod('.', 0)",
        {"ok"},
        "",
    ),
    "a named pipe": ("os.mkfifo('p')\nopen('p').read()", {"timeout"}, "stopped after"),
    "a device": ("os.mknod('d', 0o600 | 0o020000, os.makedev(1, 3))", {"error"}, "Error"),
    "links in a ring": ("os.symlink('a', 'b'); os.symlink('b', 'a'); open('a')", {"error"}, "OSError"),
    "shadowing module": (
        "open('random.py', 'w').write('1 / 0')\nimport random, string\nprint(random.random() < 1)",
        {"ok"},
        "True",
    ),
    "shadowing package": (
        "os.mkdir('statsmodels'); open('statsmodels/__init__.py', 'w').write('1 / 0')\n"
        "import json\nprint(json.dumps(1))",
        {"ok"},
        "1",
    ),
    "customization of the interpreter": (
        "open('sitecustomize.py', 'w').write('1 / 0'); open('usercustomize.py', 'w').write('1 / 0')\nprint('set')",
        {"ok"},
        "set",
    ),
    "a pickle that runs a program": (
        "import pickle\nclass P:\n    def __reduce__(self): return (os.system, ('echo started',))\n"
        "print('status', pickle.loads(pickle.dumps(P())))",
        {"ok", "error"},
        "",
    ),
    "a pickle that ends the process": (
        "import pickle\nclass P:\n    def __reduce__(self): return (os._exit, (0,))\npickle.loads(pickle.dumps(P()))",
        {"error"},
        "os._exit",
    ),
    "a pickle by pandas": (
        "import pandas as pd, pickle\nclass P:\n    def __reduce__(self): return (os.abort, ())\n"
        "open('p', 'wb').write(pickle.dumps(P()))\npd.read_pickle('p')",
        {"killed"},
        "crashed",
    ),
    "a pickle that never ends": (
        "import pickle\nclass P:\n    def __reduce__(self): return (time.sleep, (60,))\n"
        "pickle.loads(pickle.dumps(P()))",
        {"timeout"},
        "stopped after",
    ),
    "an archive bomb": (
        "import zipfile, io\nb = io.BytesIO()\nz = zipfile.ZipFile(b, 'w', zipfile.ZIP_DEFLATED)\n"
        "z.writestr('x', b'0' * 2**23)\nz.close()\nzipfile.ZipFile(b).extractall()",
        {"error"},
        "File too large",
    ),
    "a gzip bomb": (
        "import gzip\nd = gzip.compress(b'0' * 2**24)\nx = []\nwhile True: x.append(gzip.decompress(d))",
        {"memory", "timeout", "error"},
        "",
    ),
    "an archive that climbs": (
        "import tarfile, io\nt = tarfile.open('a.tar', 'w')\n"
        "i = tarfile.TarInfo('../../../../tmp/climbed'); i.size = 1\n"
        "t.addfile(i, io.BytesIO(b'x')); t.close()\ntarfile.open('a.tar').extractall(filter='fully_trusted')",
        {"error"},
        "Error",
    ),
    "billion laughs": (
        "import xml.etree.ElementTree as e\nd = ''.join(f'<!ENTITY a{i} \"{(\"&a%d;\" % (i - 1)) * 10}\">'"
        " for i in range(1, 10))\ne.fromstring('<!DOCTYPE x [<!ENTITY a0 \"ha\">' + d + ']><x>&a9;</x>')",
        {"error", "memory", "timeout"},
        "",
    ),
    "inotify": (
        "lib = load('ctypes').CDLL(None)\nn = 0\nwhile lib.inotify_init1(0) >= 0 and n < 10**4: n += 1\nprint('end')",
        {"ok"},
        "end",
    ),
    "excepthook and streams": (
        "sys.excepthook = 5; sys.stderr = None; sys.stdout = 3\n1 / 0",
        {"error"},
        "ZeroDivisionError",
    ),
    "changed builtins": (
        "import builtins\nbuiltins.print = None; builtins.len = None; import pandas; pandas.read_csv = 0",
        {"ok"},
        "",
    ),
    "changed imports": ("sys.meta_path.clear(); sys.path.clear(); sys.modules.clear()", {"ok", "error"}, ""),
    "a hook that never ends": (
        "import atexit\natexit.register(time.sleep, 60)\nsys.settrace(lambda *a: None)\nprint('set')",
        {"ok"},
        "set",
    ),
    "a finalizer that never ends": (
        "class F:\n    def __del__(self): time.sleep(60)\nx = F()\nprint('kept')",
        {"ok", "timeout"},
        "kept",
    ),
    "an exception that hangs": (
        "class E(Exception):\n    def __str__(self): time.sleep(60)\nraise E",
        {"timeout"},
        "stopped after",
    ),
    "memory of the interpreter": (
        "c = load('ctypes')\nc.memset(id(1), 0, 28)\nx = 1 + 1",
        {"ok", "killed", "error", "timeout"},
        "",
    ),
    "raised limits": ("r = load('resource')\nr.setrlimit(r.RLIMIT_AS, (-1, -1))", {"error"}, "ValueError"),
    "raised limit of CPU time": ("r = load('resource')\nr.setrlimit(r.RLIMIT_CPU, (99, 99))", {"error"}, "ValueError"),
    "more priority": ("os.nice(-10)", {"error"}, "PermissionError"),
    "real-time priority": ("os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))", {"error"}, "PermissionError"),
    "the identity of root": ("os.setresuid(0, 0, 0)\nos.setuid(0)", {"error"}, "PermissionError"),
    "another identity": ("os.setuid(12345)", {"error"}, "PermissionError"),
    "the clock": ("time.clock_settime(time.CLOCK_REALTIME, 0)", {"error"}, "PermissionError"),
}

# What only namespaces, Landlock or seccomp can refuse. {outside} is a folder of the test with a file "secret" in it.
CONFINED = {
    "read /etc/shadow": "open('/etc/shadow').read()",
    "read /etc/passwd": "open('/etc/passwd').read()",
    "read the machine's name": "open('/etc/hostname').read()",
    "read the home": "os.listdir(os.path.expanduser('~root'))",
    "read the project": "open('{project}').read()",
    "read outside": "open('{outside}/secret').read()",
    "read outside by pandas": "import pandas as pd; print(pd.read_csv('{outside}/secret'))",
    "list outside": "os.listdir('{outside}')",
    "list the root": "os.listdir('/')",
    "write outside": "open('{outside}/new', 'w')",
    "write to /tmp": "open('/tmp/groupwise-new', 'w')",
    "append outside": "open('{outside}/secret', 'a')",
    "remove outside": "os.remove('{outside}/secret')",
    "make a folder outside": "os.mkdir('{outside}/new')",
    "rename outside": "os.rename('{outside}/secret', '{outside}/moved')",
    "move into the folder": "os.rename('{outside}/secret', 'mine')",
    "link to outside": "os.symlink('{outside}/secret', 'link'); open('link').read()",
    "a link in another place": "os.symlink('x', '{outside}/link')",
    "hard link to outside": "os.link('{outside}/secret', 'link'); open('link').read()",
    "hard link from the folder": "open('x', 'w').close(); os.link('x', '{outside}/link')",
    "climb": "open('../../../../../../../../{outside}/secret').read()",
    "change to outside": "os.chdir('{outside}'); print(open('secret').read())",
    "climb by a descriptor": "d = os.open('.', os.O_RDONLY); os.open('../{outside}/secret', os.O_RDONLY, dir_fd=d)",
    "other folders": "os.listdir('..')",
    "folders of other executions": "os.listdir('{base}')",
    "shared memory": "open('/dev/shm/x', 'w')",
    "named shared memory": "load('multiprocessing.shared_memory').SharedMemory(create=True, size=100)",
    "a terminal": "open('/dev/tty')",
    "a new terminal": "os.openpty()",
    "the disk": "open('/dev/vda', 'rb')",
    "kernel memory": "open('/dev/mem', 'rb')",
    "kernel settings": "open('/proc/sys/kernel/core_pattern', 'w')",
    "control groups": "os.mkdir('/sys/fs/cgroup/mine')",
    "environment of others": "open('/proc/1/environ').read()",
    "memory of others": "open('/proc/{server}/mem', 'rb')",
    "arguments of others": "open('/proc/{server}/cmdline').read()",
    "its own memory by /proc": "open('/proc/self/mem', 'r+b')",
    "list processes": "os.listdir('/proc')",
    "start a program": "os.execv('/bin/sh', ['sh', '-c', 'echo started'])",
    "start an interpreter": "os.execv(sys.executable, [sys.executable, '-c', 'print(1)'])",
    "start a program of its own": (
        "open('p', 'w').write('#!/bin/sh\\necho started'); os.chmod('p', 0o755); os.execv('p', ['p'])"
    ),
    "start in the background": "os.posix_spawn('/bin/sh', ['sh', '-c', 'echo started'], {{}})",
    "kill the server": "os.kill({server}, 9)",
    "kill its parent": "if os.getppid() == 0: raise ProcessLookupError\nos.kill(os.getppid(), 9)",
    "kill everything": "os.kill(-1, 9)",
    "priority of others": "os.setpriority(os.PRIO_PROCESS, {server}, 19)",
    "leave its root": "os.chroot('.')",
}

# By the C library, errno must say that the kernel refuses.
REFUSED_CALLS = {
    "ptrace": "lib.ptrace(16, 1, 0, 0)",
    "ptrace of itself": "lib.ptrace(0, 0, 0, 0)",
    "read memory of others": "lib.process_vm_readv({server}, 0, 0, 0, 0, 0)",
    "mount": "lib.mount(b'x', b'.', b'tmpfs', 0, 0)",
    "unmount": "lib.umount2(b'.', 2)",
    "user namespace": "lib.unshare(0x10000000)",
    "other namespace": "lib.setns(0, 0)",
    "personality": "lib.personality(0x0040000)",
    "memory file": "lib.memfd_create(b'x', 0)",
    "keys": "lib.syscall({keyctl}, 0, -3, 0, 0, 0)",
    "BPF": "lib.syscall({bpf}, 0, 0, 0)",
    "io_uring": "lib.syscall(425, 8, 0)",
    "perf": "lib.syscall({perf}, 0, 0, -1, -1, 0)",
    "userfaultfd": "lib.syscall({userfaultfd}, 0)",
    "clone3": "lib.syscall(435, 0, 0)",
    "modules": "lib.syscall({init_module}, 0, 0, 0)",
    "reboot": "lib.reboot(0)",
    "swap": "lib.swapon(b'x', 0)",
    "name of the machine": "lib.sethostname(b'x', 1)",
    "System V shared memory": "lib.shmget(0, 4096, 0o1600)",
    "message queue": "lib.syscall({mq_open}, b'x', 66, 0o600, 0)",
    "fanotify": "lib.fanotify_init(0, 0)",
    "file by handle": "lib.open_by_handle_at(-100, 0, 0)",
}

# {port} listens on the loopback, "\0groupwise-test" is an abstract socket of the test, {path} one with a name.
NETWORK = {
    "TCP": "s = socket.socket(); s.settimeout(1); s.connect(('127.0.0.1', {port}))",
    "TCP of version 6": "s = socket.socket(socket.AF_INET6); s.settimeout(1); s.connect(('::1', {port}))",
    "listen": "s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()",
    "UDP": "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b'x', ('8.8.8.8', 53))",
    "UDP on the loopback": "s = socket.socket(type=socket.SOCK_DGRAM); s.sendto(b'x', ('127.0.0.1', {port}))",
    "raw packets": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "abstract socket": "s = socket.socket(socket.AF_UNIX); s.connect('\\0groupwise-test')",
    "socket with a name": "s = socket.socket(socket.AF_UNIX); s.connect('{path}')",
    "names": "socket.gethostbyname('example.com')",
    "HTTP": "load('urllib.request').urlopen('http://127.0.0.1:{port}', timeout=1)",
}
