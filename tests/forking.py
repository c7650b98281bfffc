"""A Python for scripts that need many: each command is forked from one process that has imported
torch already, which takes seconds, and otherwise runs as it would on its own.

`python forking.py serve SOCKET` is that process, `python forking.py SOCKET ARGUMENTS` stands for
`python ARGUMENTS`: its folder, environment, output and exit code are those of the command, and
signals are passed on. Of the arguments `SCRIPT ...` and `-m MODULE ...` are understood."""

import importlib
import json
import os
import signal
import socket
import sys

# What the commands import anyway. small has the peak of the machine measured by a small product.
PRELOADED = (
    "torch._inductor",
    "safetensors.torch",
    "matplotlib.figure",
    "small",
    "nanochat.eval.core",
    "nanochat.optim.step",
    "nanochat.run.keeper",
    "nanochat.run.lifecycle",
    "nanochat.run.log",
    "nanochat.run.profiler",
    "nanochat.run.resume",
    "nanochat.run.training_text",
)


def command(path, arguments):
    """Have the command run, and return its exit code."""
    asked = socket.socket(socket.AF_UNIX)
    asked.connect(path)
    wanted = {"arguments": arguments, "folder": os.getcwd(), "environ": dict(os.environ)}
    socket.send_fds(asked, [b"x"], [0, 1, 2])
    asked.sendall(json.dumps(wanted).encode() + b"\n")
    answers = asked.makefile()
    pid = int(answers.readline())
    for number in (signal.SIGINT, signal.SIGTERM):
        # as in the background of a shell
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: os.kill(pid, number))
    return int(answers.readline())


def serve(path):
    """Fork a process for each command until this one is ended."""
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    for name in PRELOADED:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()
    print("ready", flush=True)
    # nobody waits for those that answer
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        asked, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os._exit(answer(asked))
        asked.close()


def answer(asked):
    """Start the command that is asked for, and say how it ended."""
    _, streams, _, _ = socket.recv_fds(asked, 1, 3)
    wanted = json.loads(asked.makefile().readline())
    pid = os.fork()
    if pid == 0:
        asked.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        become(**wanted)
    for stream in streams:
        os.close(stream)
    asked.sendall(f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    # as a shell has it
    asked.sendall(f"{code if code >= 0 else 128 - code}\n".encode())
    return 0


def become(arguments, folder, environ):
    """Run the command in this process, which ends with it."""
    import runpy

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    # whoever replaces these streams must not close the files behind them
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    code = 0
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ended:
        code = ended.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(command(sys.argv[1], sys.argv[2:]))
