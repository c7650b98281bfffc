"""A stand-in for train.py in the tests of sweeps. It imports nothing of the package."""

import json
from pathlib import Path

from nanochat.run.flags import FLAGS

# It notes its call, then does what behave.json says for its folder (an exit code, or "wait" until a
# signal comes; else it completes), and leaves a run folder with made-up bits per byte. A sweep has
# a best size: 1 + 2 C^-0.1 at N = 0.2 sqrt(C), and a parabola around it. In a trial (`sweep try`),
# which fixes no FLOPs, a rate of 0.03 gains 2%, and so does a patch 3%; there is a noise of the
# seed, which both runs of a pair share, and one of their own.
TRAINER = """
import contextlib, json, math, os, random, signal, sys
from pathlib import Path
args = DEFAULTS
for word in sys.argv[1:]:
    name, _, value = word[2:].partition("=")
    name = name.replace("-", "_")
    args[name] = value
    # a tag such as 1e9 is no number
    if name != "model_tag":
        with contextlib.suppress(ValueError):
            args[name] = json.loads(value)
folder = Path(args["out_dir"]) / args["model_tag"]
with open("calls", "a") as calls:
    calls.write(f"{folder}\\n")
behaviour = json.loads(Path("behave.json").read_text())
code = behaviour.get(str(folder), 0)
seed = args["seed"]
PATCHED = 0
TOKENIZER = ""
n = 1000 * args["depth"] ** 2
flops = args["target_flops"] if args["target_flops"] != -1 else 6 * n * 20 * n

def bits_per_byte():
    if TRIAL:
        rate = args["matrix_lr"] if args["matrix_lr"] != -1 else 0.02
        own = random.Random(f"{seed} {rate} {PATCHED}").gauss(0, 0.002)
        of_seed = random.Random(seed).gauss(0, 0.005)
        return 2 * (1 + of_seed + own - 2 * (rate - 0.02) - PATCHED)
    bpb = 1 + 2 * flops**-0.1 + 0.05 * math.log(n / (0.2 * math.sqrt(flops))) ** 2
    bpb += 0.001 * (seed - 42)
    if args["optimizer"] == "adamw":
        bpb += 0.1 * (1 + 0.1 * (seed - 42))
    return bpb

def leave(status, code):
    if status:
        plan = {"parameters": {"total": 2 * n}, "scaling_parameters": n, "flops_per_token": 6 * n,
                "num_iterations": 10}
        config = {"format": 1, "args": args, "seed": seed, "plan": plan,
                  "model": {"width": 64 * args["depth"], "vocab_size": 257},
                  "data": {"fingerprint": args["data"], "tokens_per_epoch": 1e12},
                  "tokenizer": {"fingerprint": TOKENIZER},
                  "git_commit": "c0ffee" if args["run"] == "dummy" else args["run"]}
        tokens = args["num_iterations"] if TRIAL else round(flops / (6 * n))
        summary = {"status": status, "reason": "TrainingFailed: made up" if code == 1 else "",
                   "step": 10, "tokens": tokens if tokens != -1 else 10,
                   "total_training_time": 2.0 * args["depth"],
                   "val_bpb": bits_per_byte() if status == "completed" else None,
                   "min_val_bpb": None, "core_metric": None, "core_metric_n": None}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "summary.json").write_text(json.dumps(summary))
    os._exit(code)

signal.signal(signal.SIGTERM, lambda *_: leave("stopped", 75))
if code == "wait":
    Path("waiting").touch()
    signal.pause()
if code == 2:
    print("train.py: error: --depth=9: made up", file=sys.stderr)
leave({0: "completed", 1: "failed", 75: "stopped"}.get(code), code)
"""
DEFAULTS = {name: row.default for name, row in FLAGS.items()}
OF_SWEEP = f"DEFAULTS = {DEFAULTS}\nTRIAL = False{TRAINER}"
OF_TRIAL = f"DEFAULTS = {DEFAULTS}\nTRIAL = True{TRAINER}"


def behave(folder: Path, codes: dict[str, int | str]) -> None:
    """What trainings in this working folder do, by their folder. The list of calls begins anew."""
    (folder / "behave.json").write_text(json.dumps(codes))
    (folder / "calls").write_text("")


def calls(folder: Path) -> list[str]:
    """The folders of the trainings that were started there, in order."""
    return (folder / "calls").read_text().split()
