"""A model small enough to train in a test, and ways to run train.py on it in this process, in another, or on two ranks."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import torch

import train

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
# Sends this process a signal while it writes the metrics line of a step: the update is done, the line is not yet there. The save
# before it is over by then, so that a test knows which checkpoint is the last (runs/chaos.sh kills in the middle of saves).
KILLER = """
import os, signal, sys
sys.path.insert(0, {root!r})
from nanochat.run import checkpoint, log as runlog
write, begin, savers = runlog.Metrics.write, checkpoint.Saver.__init__, []
def begin_and_note(self, *args):
    savers.append(self)
    begin(self, *args)
checkpoint.Saver.__init__ = begin_and_note
def write_or_die(self, **values):
    if values.get("step") == {step} and "train/loss" in values:
        for saver in savers:
            saver.wait()
        os.kill(os.getpid(), signal.{signal})
    write(self, **values)
runlog.Metrics.write = write_or_die
import train
sys.exit(train.run(sys.argv[1:]))
"""
RUNNER = """
import sys
import train
sys.exit(train.run(sys.argv[1:]))
"""
# Importing torch takes seconds: one process does it, and the others are forked from it before it has any threads.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "small",
        "safetensors.torch",
        "nanochat.run.resume",
        "nanochat.run.faults",
        "nanochat.eval.bpb",
        "nanochat.eval.generation",
    ]
)


def round_in_interpreter(monkeypatch):
    """Let Triton's interpreter round fp32 to bf16 to nearest, as GPUs do, where it would cut off."""
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
    """A complete CORE bundle of n made-up examples a task; returns its folder. Texts differ in length; a choice may begin another."""
    from tasks.core import CORRECTED, PUBLISHED, published_yaml

    bundle = Path(folder) / "bundle"
    (bundle / "eval_data").mkdir(parents=True)
    (bundle / "core.yaml").write_text(published_yaml())
    chances = {"language_modeling": 0, "schema": 50, "multiple_choice": 25}
    (bundle / "eval_meta_data.csv").write_text(
        "Eval Task,Random baseline\n"
        + "".join(
            f"{label},{CORRECTED.get(label, [chances[kind]])[0]}\n"
            for label, _, _, kind, _ in PUBLISHED
        )
    )
    for number, (label, uri, _, kind, _) in enumerate(PUBLISHED):
        examples = []
        for i in range(n):
            long = "and so on " * ((7 * i + number) % 5)
            if kind == "multiple_choice":
                examples.append(
                    {
                        "query": f"Question {i} of {label}: {long}what follows {i}?",
                        "gold": (i + number) % 4,
                        "choices": [str(i + 1), f"{i} again", f"{i}", f"nothing {long}".strip()],
                    }
                )
            elif kind == "schema":
                examples.append(
                    {
                        "context_options": [
                            f"The cat {long}saw {i} dogs and the cat",
                            f"The cat saw {i} dogs and the dogs",
                        ],
                        "continuation": f"were {i}.",
                        "gold": i % 2,
                    }
                )
            else:
                examples.append(
                    {"context": f"After {i} {long}comes Answer: ", "continuation": f"{i + 1}"}
                )
        path = bundle / "eval_data" / uri
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return bundle


def environment():
    """This process's environment, one thread, without the cache folder that torch noted in it when it was set up here."""
    return {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"} | {
        "OMP_NUM_THREADS": "1"
    }


def run(folder, *flags, tag="run"):
    """train.py in this process; returns its exit code."""
    return train.run([*FLAGS, corpus(folder), f"--out-dir={folder}", f"--model-tag={tag}", *flags])


def run_killed(folder, step, *flags, signal="SIGKILL", tag="run"):
    """train.py in a process of its own that gets a signal at a step; returns its exit code (minus the signal if it died)."""
    argv = [*FLAGS, corpus(folder), f"--out-dir={folder}", f"--model-tag={tag}", *flags]
    return ended(
        start(
            argv, environment(), os.devnull, KILLER.format(root=str(ROOT), step=step, signal=signal)
        )
    )


def start(argv, environ, output, script=RUNNER):
    """A process that runs a script with these arguments, forked from a server that has imported torch already."""
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
    return ranks_of(
        folder,
        n,
        [*FLAGS, corpus(folder), f"--out-dir={folder}", f"--model-tag={tag}", *flags],
        script,
    )


def ranks_of(folder, n, argv, script):
    """A script as n ranks on this machine, set up as by torchrun: what returns has `returncode` (the worst of them) and `stderr`, which
    is all that they printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {
            "WORLD_SIZE": str(n),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
        }
    ranks = [
        start(
            argv,
            environment() | meeting | {"RANK": str(i), "LOCAL_RANK": str(i)},
            folder / "shown",
            script,
        )
        for i in range(n)
    ]
    return types.SimpleNamespace(
        returncode=max(abs(ended(rank)) for rank in ranks), stderr=(folder / "shown").read_text()
    )


def run_torchrun(folder, n, *flags, tag="run", script=ROOT / "train.py"):
    """train.py, or a script that calls it, under torchrun with n processes on this machine; returns the finished process."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={n}",
            str(script),
            *FLAGS,
            corpus(folder),
            f"--out-dir={folder}",
            f"--model-tag={tag}",
            *flags,
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )


def lines(folder, tag="run", name="metrics.jsonl"):
    return [json.loads(line) for line in (Path(folder) / tag / name).read_text().splitlines()]


def losses(folder, tag="run"):
    """{step: training loss}; fails if a step stands twice."""
    found = [
        (line["step"], line["train/loss"]) for line in lines(folder, tag) if "train/loss" in line
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


def summary(folder, tag="run"):
    return json.loads((Path(folder) / tag / "summary.json").read_text())


def timeless(entries):
    """Metrics lines without what a clock decides."""
    clocked = {"total_training_time", "train/dt", "train/tok_per_sec", "train/mfu"}
    return [{k: v for k, v in entry.items() if k not in clocked} for entry in entries]


def weights(folder, step, tag="run"):
    """{name: tensor} of a checkpoint."""
    from safetensors.torch import load_file

    return load_file(Path(folder) / tag / "checkpoints" / f"step_{step:06d}" / "model.safetensors")
