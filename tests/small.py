"""A model small enough to train in a test, and ways to run train.py on it: in this process, in
another, or on two ranks."""

import atexit
import functools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import torch
from ports import free_port

import train
from nanochat import hardware

ROOT = Path(__file__).resolve().parent.parent
# Texts and GPT-2's files for tests that skip without them.
SHARED = Path(os.environ.get("NANOCHAT_SHARED_DATA") or ROOT.parent / "shared" / "data")
FLAGS = [
    "--depth=2",
    "--aspect-ratio=16",
    "--head-dim=16",
    "--max-seq-len=32",
    "--tokenizer=byte",
    "--total-batch-size=256",
    "--num-iterations=12",
    "--eval-every=5",
    "--sample-every=6",
    "--save-every=4",
    "--no-compile",
    "--dtype=float32",
]
# Nothing but the steps themselves.
BARE = ["--eval-every=-1", "--sample-every=-1", "--no-save", "--save-every=-1"]
# The peak of this machine only serves to report MFU and to estimate times: a small product measures
# it well enough here, and large ones take as long as a whole run.
hardware.PEAK_SIZES = (64,)
# Sends this process a signal while it writes the metrics line of a step: the update is done, the
# line is not yet written. The save before it is over by then, so that a test knows which checkpoint
# is the last (runs/chaos.sh kills in the middle of saves).
KILLER = """
import os, signal, sys
sys.path.insert(0, {root!r})
from nanochat.run.metrics import Record
from nanochat.run.saver import Saver
write, begin, savers = Record.write, Saver.__init__, []
def begin_and_note(self, *args, **options):
    savers.append(self)
    begin(self, *args, **options)
Saver.__init__ = begin_and_note
def write_or_die(self, **values):
    if values.get("step") == {step} and "train/loss" in values:
        for saver in savers:
            saver.wait()
        os.kill(os.getpid(), signal.{signal})
    write(self, **values)
Record.write = write_or_die
import train
sys.exit(train.run(sys.argv[1:]))
"""
RUNNER = """
import sys
import train
sys.exit(train.run(sys.argv[1:]))
"""
# Importing torch takes seconds: one process does it, and the others are forked from it before it
# has any threads.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "small",
        # imported by torch.use_deterministic_algorithms(), which every run calls
        "torch._inductor",
        "safetensors.torch",
        "nanochat.run.resume",
        "nanochat.run.training_text",
        "nanochat.run.keeper",
        "nanochat.run.lifecycle",
        "nanochat.run.log",
        "nanochat.run.profiler",
        "nanochat.eval.core",
        "nanochat.optim.step",
    ]
)


def round_in_interpreter(monkeypatch):
    """Let Triton's interpreter round fp32 to bf16 to nearest, as GPUs do; it would truncate."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cut_off = InterpreterBuilder.cast_impl

    def cast(self, source, wanted):
        if source.dtype.scalar != tl.float32 or wanted.scalar != tl.bfloat16:
            return cut_off(self, source, wanted)
        rounded = (
            torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16).numpy()
        )
        return TensorHandle(rounded.view(np.uint16), wanted.scalar)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast)


def corpus(folder):
    """A text file with enough structure to learn from; returns the flag that names it."""
    path = Path(folder) / "text.txt"
    path.write_text(
        "\n<|endoftext|>\n".join(
            f"{i} squared is {i * i}, and twice {i} is {2 * i}." for i in range(400)
        )
    )
    return f"--data={path}"


def core_bundle(folder, n=6):
    """A complete CORE bundle of n made-up examples a task; returns its folder.

    Texts differ in length; a choice may begin another."""
    from tasks.core import CORRECTED, PUBLISHED, published_yaml

    bundle = Path(folder) / "bundle"
    (bundle / "eval_data").mkdir(parents=True)
    (bundle / "core.yaml").write_text(published_yaml())
    chances = {"language_modeling": 0, "schema": 50, "multiple_choice": 25}
    baselines = ["Eval Task,Random baseline\n"]
    for number, (label, uri, _, kind, _) in enumerate(PUBLISHED):
        baselines.append(f"{label},{CORRECTED.get(label, [chances[kind]])[0]}\n")
        examples = [core_example(label, kind, number, i) for i in range(n)]
        path = bundle / "eval_data" / uri
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    (bundle / "eval_meta_data.csv").write_text("".join(baselines))
    return bundle


def core_example(label, kind, number, i):
    """The i-th example of the task with that number, as the bundle's files hold it."""
    long = "and so on " * ((7 * i + number) % 5)
    if kind == "multiple_choice":
        return {
            "query": f"Question {i} of {label}: {long}what follows {i}?",
            "gold": (i + number) % 4,
            "choices": [str(i + 1), f"{i} again", f"{i}", f"nothing {long}".strip()],
        }
    if kind == "schema":
        return {
            "context_options": [
                f"The cat {long}saw {i} dogs and the cat",
                f"The cat saw {i} dogs and the dogs",
            ],
            "continuation": f"were {i}.",
            "gold": i % 2,
        }
    return {"context": f"After {i} {long}comes Answer: ", "continuation": f"{i + 1}"}


def environment():
    """This process's environment, for another one with one thread.

    Without the cache folder that torch noted in it when it was set up here."""
    copy = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
    return copy | {"OMP_NUM_THREADS": "1"}


def argv_of(folder, tag, flags):
    """The command line of a small run in that folder, by that name."""
    return [*FLAGS, corpus(folder), f"--out-dir={folder}", f"--model-tag={tag}", *flags]


def run(folder, *flags, tag="run"):
    """train.py in this process; returns its exit code."""
    return train.run(argv_of(folder, tag, flags))


@functools.cache
def finished():
    """A folder with one uninterrupted run of FLAGS, to compare others with and to copy. Nobody may
    change it: all tests of this process share it."""
    folder = Path(tempfile.mkdtemp(prefix="nanochat-finished-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    assert run(folder) == 0
    return folder


def copy_run(folder, target, tag="run"):
    """Copy a run into another folder; returns the path of the copy."""
    return shutil.copytree(Path(folder) / "run", Path(target) / tag)


def run_killed(folder, step, *flags, signal="SIGKILL", tag="run"):
    """train.py in a process of its own that gets a signal at a step; returns its exit code (minus
    the signal if it died)."""
    script = KILLER.format(root=str(ROOT), step=step, signal=signal)
    return ended(start(argv_of(folder, tag, flags), environment(), os.devnull, script))


def start(argv, environ, output, script=RUNNER):
    """A process that runs a script with these arguments, forked from a server that has imported
    torch already."""
    process = FORKS.Process(target=_child, args=(argv, environ, str(output), script))
    process.start()
    return process


def _child(argv, environ, output, script):
    os.environ.clear()
    os.environ.update(environ)
    shown = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(shown, stream)
    torch.set_num_threads(1)
    sys.argv[1:] = argv
    exec(script, {"__name__": "__main__"})


def ended(process, seconds=240):
    """The exit code of a process that start() returned."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode is not None, f"still running after {seconds} s"
    return process.exitcode


def run_ranks(folder, n, *flags, tag="run", script=RUNNER):
    """train.py (or a script that calls it) as n ranks on this machine: as ranks_of()."""
    return ranks_of(folder, n, argv_of(folder, tag, flags), script)


def ranks_of(folder, n, argv, script):
    """A script as n ranks on this machine, set up as by torchrun.

    What returns has `returncode` (the worst of them) and `stderr`, which is all that they
    printed."""
    shown = Path(folder) / "shown"
    worst = max(abs(ended(rank)) for rank in start_ranks(n, argv, shown, script))
    return types.SimpleNamespace(returncode=worst, stderr=shown.read_text())


def start_ranks(n, argv, output, script):
    """The processes of a script as n ranks on this machine, each as start() returns it."""
    meeting = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        start(
            argv,
            environment() | meeting | {"RANK": str(i), "LOCAL_RANK": str(i)},
            output,
            script,
        )
        for i in range(n)
    ]


def run_torchrun(folder, n, *flags, tag="run", script=ROOT / "train.py"):
    """train.py, or a script that calls it, under torchrun with n processes on this machine; returns
    the finished process."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    # without the dashes torchrun would take flags of train.py that begin like its own
    command = [*launcher, f"--nproc_per_node={n}", "--", str(script)]
    return subprocess.run(
        [*command, *argv_of(folder, tag, flags)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )


def lines(folder, tag="run", name="metrics.jsonl"):
    """The objects of one of a run's records; a torn line fails."""
    return [json.loads(line) for line in (Path(folder) / tag / name).read_text().splitlines()]


def losses(folder, tag="run"):
    """{step: training loss}; fails if a step stands twice."""
    trained = [line for line in lines(folder, tag) if "train/loss" in line]
    found = {line["step"]: line["train/loss"] for line in trained}
    assert len(found) == len(trained)
    return found


def summary(folder, tag="run"):
    """summary.json of a run."""
    return json.loads((Path(folder) / tag / "summary.json").read_text())


def config(folder, tag="run"):
    """config.json of a run."""
    return json.loads((Path(folder) / tag / "config.json").read_text())


def files(folder, tag="run"):
    """{path: content} of all files of a run but its lock."""
    paths = (Path(folder) / tag).rglob("*")
    return {path: path.read_bytes() for path in paths if path.is_file() and path.name != ".lock"}


def timeless(entries):
    """Metrics lines without what a clock decides."""
    clocked = {"total_training_time", "train/dt", "train/tok_per_sec", "train/mfu"}
    return [{k: v for k, v in entry.items() if k not in clocked} for entry in entries]


def weights(folder, step, tag="run"):
    """{name: tensor} of a checkpoint."""
    from safetensors.torch import load_file

    checkpoint = Path(folder) / tag / "checkpoints" / f"step_{step:06d}"
    return load_file(checkpoint / "model.safetensors")


def assert_same_weights(folder, step, tag, expected_folder, expected_tag="run"):
    """Two checkpoints of a step hold the same tensors, to the last bit."""
    mine = weights(folder, step, tag)
    expected = weights(expected_folder, step, expected_tag)
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[name], expected[name]) for name in expected)
