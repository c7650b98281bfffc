"""nanochat jobs fork: a run that continues from a checkpoint of another one, with other flags."""

import fcntl
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import small
from test_rows import documents, make_rows

import train
from nanochat.apps import compare, jobs
from nanochat.common import Unavailable, UsageError
from nanochat.data.rows import Rows
from nanochat.model.config import GPTConfig
from nanochat.run import checkpoint, flags
from nanochat.run.folder import write_summary
from nanochat.run.identity import compare_runs
from nanochat.run.metrics import read_lines
from nanochat.run.plan import Machine, Plan, fork_plan
from nanochat.run.records import read_summary

MACHINE = Machine("cpu", 1, 1e12, "assumed")


@pytest.fixture
def parent(tmp_path):
    """A completed run of 12 steps, with checkpoints at 4, 6 (before the warm-down), 8 and 12."""
    return small.copy_run(small.finished(), tmp_path, "parent")


def fork(parent, *words, tag="child"):
    """nanochat jobs fork; returns the folder of the new run."""
    assert jobs.main(["fork", str(parent), f"--tag={tag}", *words]) == 0
    return parent.parent / tag


def resume(path, *words):
    """Train a run to its end."""
    argv = [f"--out-dir={path.parent}", f"--model-tag={path.name}", "--resume", *words]
    assert train.run(argv) == 0


def config_of(path):
    return json.loads((path / "config.json").read_text())


def change_config(path, change):
    config = config_of(path)
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def differences(one, other):
    return compare_runs(one, other).different


# ----- what comes out


def test_without_changes_it_is_its_parent(parent, capsys):
    """Bit for bit: records, weights, state of the optimizer."""
    child = fork(parent, "--step=4")
    shown = capsys.readouterr().out
    assert f"{child} continues {parent} from step 4 and ends at step 12; changed: nothing" in shown
    assert f"python train.py --resume --model-tag=child --out-dir={parent.parent}\n" in shown
    before = {p: p.stat().st_mtime_ns for p in parent.rglob("*") if p.is_file()}
    # it needs nothing of its parent
    hidden = parent.rename(parent.with_name("elsewhere"))
    resume(child)
    hidden.rename(parent)
    assert differences(parent, child) == []
    assert before == {p: p.stat().st_mtime_ns for p in parent.rglob("*") if p.is_file()}
    # the times of what both have done are those of the parent
    lines = [[x for x in read_lines(p / "metrics.jsonl") if x["step"] < 4] for p in (parent, child)]
    assert lines[0] == lines[1] != []


def test_a_longer_horizon_is_that_of_an_extended_run(parent, tmp_path):
    child = fork(parent, "--step=6", "--num-iterations=16")
    other = small.copy_run(small.finished(), tmp_path, "extended")
    resume(child)
    resume(other, "--num-iterations=16")
    assert differences(other, child) == []


def test_two_forks_differ_from_where_their_flags_do(parent):
    same = fork(parent, "--step=4", tag="same")
    hot = fork(parent, "--step=4", "--matrix-lr=0.06", tag="hot")
    resume(same)
    resume(hot)
    losses = [
        [line["train/loss"] for line in read_lines(path / "metrics.jsonl") if "train/loss" in line]
        for path in (parent, same, hot)
    ]
    assert losses[0] == losses[1] and losses[0][:5] == losses[2][:5], "the update of step 4 counts"
    assert losses[0][5] != losses[2][5]
    rates = [
        {
            line["step"]: line["train/lr"]
            for line in read_lines(p / "metrics.jsonl")
            if "train/lr" in line
        }
        for p in (same, hot)
    ]
    assert rates[0][3] == rates[1][3] and rates[1][4] == pytest.approx(3 * rates[0][4])


def test_lineage(parent):
    child = fork(parent, "--step=8", "--grad-clip=0.5", "--eval-every=3")
    found = config_of(child)["forked_from"]
    identity = found.pop("checkpoint")
    changed = {"grad_clip": [0.0, 0.5], "eval_every": [5, 3]}
    assert found == {"run": str(parent), "step": 8, "changed": changed}
    grandchild = fork(child, "--seed=7", "--num-iterations=20", tag="grandchild")
    config = config_of(grandchild)
    found = config["forked_from"]
    assert found["changed"] == {"seed": [42, 7], "num_iterations": [12, 20]}
    # the same checkpoint, in another folder
    assert found["checkpoint"] == identity == found["forked_from"]["checkpoint"]
    assert found["forked_from"]["changed"] == changed
    assert config["args"]["grad_clip"] == 0.5 and config["seed"] == config["args"]["seed"] == 7
    assert "wandb_id" not in config, "a curve of its own"


def test_a_fork_waits_to_be_resumed(parent):
    child = fork(parent, "--step=12", "--num-iterations=14")
    found = read_summary(child)
    assert (found.status, found.step, found.steps) == ("stopped", 12, 14)
    assert "not started yet" in found.reason
    assert found.val_bpb == read_summary(parent).val_bpb
    assert found.total_training_time > 0
    # the parent's final checkpoint is not the end of the fork
    resume(child)
    assert read_summary(child).status == "completed"
    assert checkpoint.steps_of(child) == [12, 14]


@pytest.mark.parametrize("marked, has", [(8, 8), (4, None)])
def test_the_best_checkpoint(parent, marked, has):
    """It is named only where it exists."""
    checkpoint.mark_best(parent, marked)
    child = fork(parent, "--step=8")
    assert checkpoint.best_step(child) == has
    if has is None:
        assert config_of(fork(parent, "--step=best", tag="best"))["forked_from"]["step"] == 4


# ----- text and seed


def test_another_text_is_read_from_its_beginning(parent, tmp_path):
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "text.txt"
    other.write_text("\n<|endoftext|>\n".join(f"number {i} and {i + 1}" for i in range(500)))
    child = fork(parent, "--step=8", f"--data={other}")
    assert config_of(child)["data"]["fingerprint"] is None
    lines = read_lines(child / "metrics.jsonl")
    assert not any("val/bpb" in line for line in lines), "of another held-out text"
    assert checkpoint.best_step(child) is None
    resume(child)
    data = config_of(child)["data"]
    assert data["first_row"] == 8 * 8
    assert data["fingerprint"] != config_of(parent)["data"]["fingerprint"]
    epochs = {
        line["step"]: line["train/epoch"]
        for line in read_lines(child / "metrics.jsonl")
        if "train/epoch" in line
    }
    assert epochs[8] == 0 and epochs[9] == 256 / data["tokens_per_epoch"]
    # it is frozen now, as in any run
    other.write_text("something else\n" * 500)
    argv = [f"--out-dir={tmp_path}", "--model-tag=child", "--resume", "--num-iterations=30"]
    assert train.run(argv) == 2


def test_the_first_row_of_another_order(tmp_path):
    rows = make_rows(tmp_path, [documents(40, 1), [], documents(60, 2)], T=32)
    shifted = Rows(rows.corpus, rows.cache, rows.T, rows.seed, first_row=1000)
    n = rows.tokens_per_epoch() // rows.T
    for row in (0, 1, n - 1, n, 3 * n):
        assert np.array_equal(shifted.row(1000 + row), rows.row(row))


def test_another_seed_reads_in_another_order(parent):
    child = fork(parent, "--step=8", "--seed=1")
    config = config_of(child)
    assert config["data"]["first_row"] == 64
    assert config["data"]["fingerprint"] == config_of(parent)["data"]["fingerprint"]
    resume(child)
    losses = [read_lines(path / "metrics.jsonl")[-2]["train/loss"] for path in (parent, child)]
    assert losses[0] != losses[1]


# ----- what follows from the flags


def plan_of(*words, batch=256):
    """(args, plan, config) of a run with these flags, derived by the dial."""
    args = flags.parse([*small.FLAGS, f"--total-batch-size={batch}", *words])
    config = GPTConfig(
        depth=2, width=32, head_dim=16, n_head=2, n_kv_head=2, vocab_size=257, max_seq_len=32
    )
    return args, train.derive_plan(args, config, 1e5, MACHINE), config


def forked(before, after, step=4, parents_plan=None):
    """The plan of a fork. before, after: flags of the two runs."""
    was, plan, config = plan_of(*before)
    now = plan_of(*after)[0]
    plan = parents_plan or plan
    fork_plan(
        plan,
        was,
        now,
        step=step,
        config=config,
        new_horizon=any(getattr(was, name) != getattr(now, name) for name in flags.HORIZONS),
        tokens_per_epoch=1e5,
        machine=MACHINE,
    )
    return plan


@pytest.mark.parametrize(
    "changed",
    [
        ["--matrix-lr=0.1"],
        ["--embedding-lr=0", "--unembedding-lr=0.5"],
        ["--scalar-lr=0.1", "--adam-beta1=0.5"],
        ["--weight-decay=0.05", "--adam-beta2=0.5"],
        ["--warmdown-ratio=0.25"],
        ["--final-lr-frac=0.5"],
        ["--lr-schedule=cosine"],
        ["--warmup-steps=6"],
        ["--warmup-ratio=0.5"],
        ["--num-iterations=40"],
        ["--target-tokens=9000"],
        ["--target-flops=1e10"],
        ["--target-epochs=2"],
        ["--target-minutes=60"],
        ["--grad-clip=1"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("common", [[], ["--optimizer=adamw", "--weight-decay=0"]])
def test_changed_flags_are_derived_as_by_the_dial(changed, common):
    """But for weight decay, whose factor stays that of the parent's horizon."""
    if "--num-iterations" not in changed[0] and "--target" in changed[0]:
        changed = ["--num-iterations=-1", *changed]
    plan = forked(common, common + changed)
    fresh = plan_of(*common, *changed)[1]
    for step in range(4, 12):
        assert plan.lr_multiplier(step) == fresh.lr_multiplier(step)
    assert plan.num_iterations == fresh.num_iterations
    assert plan.horizon_value == fresh.horizon_value and plan.horizon == fresh.horizon
    for group, settings in fresh.groups.items():
        expected = dict(settings)
        if "--num-iterations" in changed[0] and group == "matrices":
            expected["weight_decay"] = plan_of(*common)[1].groups[group]["weight_decay"]
        assert plan.groups[group] == expected


def test_rates_keep_the_factors_that_the_parent_had():
    """Those of a run that was extended, for example, are of its first horizon."""
    _, parents, _ = plan_of()
    for settings in parents.groups.values():
        settings["lr"] *= 2
    parents.groups["matrices"]["weight_decay"] *= 8
    expected = {name: dict(settings) for name, settings in parents.groups.items()}
    expected["matrices"]["weight_decay"] *= 0.5
    plan = forked([], ["--weight-decay=0.1"], parents_plan=parents)
    assert plan.groups == expected


def test_a_shorter_horizon_begins_its_warmdown_no_earlier_than_the_fork():
    plan = forked([], ["--num-iterations=8"], step=6)
    assert [plan.lr_multiplier(step) for step in (6, 7)] == [1.0, 0.5]
    assert plan.warmdown_begins == 6 and plan.is_last(8)


def test_landings_are_repeated_unless_a_horizon_is_given(parent):
    def land(config):
        config["plan"] |= {"landings": [[8, 10]], "num_iterations": 10, "tokens": 2560}

    change_config(parent, land)
    assert Plan.from_config(config_of(fork(parent, "--step=4"))).num_iterations == 10
    child = fork(parent, "--step=4", "--num-iterations=12", tag="on")
    plan = Plan.from_config(config_of(child))
    assert plan.num_iterations == 12 and plan.landings == []


def test_a_fork_that_lands_is_its_parent_landed_there(parent, capsys):
    """In its warm-down: 15% of 8 steps are one, at the rate that the parent has."""
    child = fork(parent, "--step=8", "--land")
    assert "note:" not in capsys.readouterr().out

    def land(config):
        config["plan"] |= {"landings": [[8, 9]], "num_iterations": 9, "tokens": 9 * 256}

    change_config(parent, land)
    landed = config_of(fork(parent, "--step=8", tag="landed"))
    assert config_of(child)["plan"] == landed["plan"]
    assert config_of(child)["args"] == landed["args"]
    resume(child)
    assert read_summary(child).status == "completed" and checkpoint.steps_of(child) == [8, 9]
    rates = {
        x["step"]: x["train/lrm"] for x in read_lines(child / "metrics.jsonl") if "train/lrm" in x
    }
    assert rates[8] == pytest.approx(2 / 3)


def test_flags_that_were_set_while_the_parent_trained(parent):
    changes = [[2, {"eval_every": 7, "patience": 3}], [9, {"eval_every": 2, "save_every": 3}]]
    change_config(parent, lambda config: config.update(changes=changes))
    config = config_of(fork(parent, "--step=8", "--save-every=5"))
    assert config["args"]["eval_every"] == 7 and config["args"]["patience"] == 3
    assert config["changes"] == [[9, {"eval_every": 2}]]
    assert config["forked_from"]["changed"] == {"save_every": [4, 5]}


def test_a_time_budget_counts_from_the_first_step(parent):
    seconds = checkpoint.read_state(parent, 8)["training_seconds"]
    config = config_of(fork(parent, "--step=8", f"--target-minutes={seconds / 60 + 1}"))
    assert config["plan"]["num_iterations"] is None
    assert config["args"]["num_iterations"] == -1
    with pytest.raises(UsageError, match="--target-minutes=.*of training, which count; give more"):
        fork(parent, "--step=8", f"--target-minutes={seconds / 120}", tag="late")


def test_a_jump_of_the_learning_rate_is_noted(parent, capsys):
    fork(parent, "--step=8", "--num-iterations=24")
    shown = capsys.readouterr().out
    assert "note: at step 8 the learning rate jumps from 0.667 to 1 of its peak" in shown


# ----- what is refused


@pytest.mark.parametrize(
    "words, message",
    [
        (["--depth=3"], r"--depth=3 \(was 2\): the weights of the checkpoint have another shape"),
        (["--n-kv-head=1"], "--n-kv-head=1"),
        (["--max-seq-len=64"], "--max-seq-len=64 .*counted in rows.*--init-from=RUN"),
        (["--total-batch-size=512"], "--total-batch-size=512 .*--init-from=RUN"),
        (["--optimizer=adamw"], "--optimizer=adamw .*the state of the other optimizer"),
        (["--tokenizer=char"], "--tokenizer=char .*other tokens"),
        (["--short-window=4"], "--short-window=4"),
        (["--init-from=x"], "--init-from=x .*leave it out"),
        (["--depth=3", "--eval-every=0"], "(?s)--depth=3.*--eval-every=0"),
        (["--matrix-lr=nan"], "--matrix-lr=nan: not a finite number"),
        (["--data=nowhere.txt"], "--data=nowhere.txt: no such file"),
        (["--step=5"], r"--step=5: .*it has: 4, 6, 8, 12"),
        ([], "ends at step 12, so nothing is left .*--num-iterations=24, or an earlier --step"),
        (["--num-iterations=12", "--step=12"], "nothing is left"),
        (["--num-iterations=7", "--step=8"], "ends at step 7, and the fork begins at step 8"),
        (["--warmup-steps=3", "--step=8"], "--warmup-steps=3: no effect, since the warm-up is"),
        (["--warmup-steps=9", "--step=8"], "--warmup-steps=9: together with 4 steps of warm-down"),
        (["--land", "--num-iterations=10", "--step=8"], "--num-iterations: a fork that lands ends"),
        (["--land", "--step=12"], "--land: the run ends at step 12 anyway"),
        (["--tag=a/b", "--step=8"], "--tag=a/b: a path, not a name"),
        (["--data={text}", "--target-epochs=1", "--step=8"], "--target-epochs=1.0: how many"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_forked(parent, tmp_path, words, message):
    (tmp_path / "new.txt").write_text("new\n" * 100)
    words = [word.format(text=tmp_path / "new.txt") for word in words]
    with pytest.raises(UsageError, match=message):
        fork(parent, *words)
    assert not (parent.parent / "child").exists()


def test_flags_of_one_start_are_none_of_a_fork(parent, capsys):
    with pytest.raises(SystemExit):
        fork(parent, "--step=8", "--resume")
    assert "unrecognized arguments: --resume" in capsys.readouterr().err


def test_every_fixed_flag_says_whether_a_fork_changes_it():
    changed_by_a_fork = {
        *("seed", "dropout", "fp8", "fp8_recipe", "grad_clip"),
        *("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay"),
        *("adam_beta1", "adam_beta2", "lr_schedule", "final_lr_frac"),
        *("warmup_ratio", "warmup_steps", "warmdown_ratio"),
    }
    rows = flags.FLAGS.items()
    fixed = {name for name, row in rows if row.on_resume == flags.FIXED}
    assert {name for name in fixed if not flags.FLAGS[name].no_fork} == changed_by_a_fork
    assert {name for name, row in rows if row.no_fork} <= fixed
    assert {name for name, row in rows if row.shapes_model and not row.no_fork} == set()


def test_the_new_folder_is_never_one_that_exists(parent):
    fork(parent, "--step=8")
    with pytest.raises(UsageError, match="child exists and is not an empty folder"):
        fork(parent, "--step=8")


@pytest.mark.parametrize("entry, message", [("imported_from", "imported"), ("tuning", "fine-tun")])
def test_runs_that_train_py_does_not_continue(parent, entry, message):
    change_config(parent, lambda config: config.update({entry: {}}))
    with pytest.raises(UsageError, match=message):
        fork(parent, "--step=8")


# ----- disks and other processes


def test_a_disk_that_is_too_small(parent, monkeypatch):
    monkeypatch.setattr(checkpoint, "free_bytes", lambda path: 1000)
    with pytest.raises(Unavailable, match="and only 1000 B are free; free some, or name a folder"):
        fork(parent, "--step=8")
    assert not list(parent.parent.glob("*child*"))


def test_a_copy_that_is_damaged(parent, monkeypatch):
    def copy(source, target, **links):
        Path(target).write_bytes(Path(source).read_bytes()[:-1] + b"?")

    monkeypatch.setattr(shutil, "copyfile", copy)
    with pytest.raises(Unavailable, match="copy of .* is damaged"):
        fork(parent, "--step=8")
    assert not list(parent.parent.glob("*child*"))


def test_a_checkpoint_that_training_removes_meanwhile(parent, monkeypatch):
    """The newest of a run that is training may be replaced by a newer one."""
    older = checkpoint.folder_of(parent, 8)
    newer = checkpoint.folder_of(parent, 12)
    hidden = newer.rename(newer.with_name("hidden"))
    original = shutil.copyfile

    def copy(source, target, **links):
        if older.exists():
            shutil.rmtree(older)
            hidden.rename(newer)
        return original(source, target, **links)

    monkeypatch.setattr(shutil, "copyfile", copy)
    child = fork(parent, "--num-iterations=20")
    assert checkpoint.steps_of(child) == [12]


def test_a_given_checkpoint_that_training_removes_meanwhile(parent, monkeypatch):
    def copy(source, target, **links):
        shutil.rmtree(checkpoint.folder_of(parent, 8), ignore_errors=True)
        raise FileNotFoundError(2, "No such file", str(source))

    monkeypatch.setattr(shutil, "copyfile", copy)
    with pytest.raises(UsageError, match="--step=8: .* a training process removed it"):
        fork(parent, "--step=8")


def test_every_flag_is_taken_as_train_py_takes_it():
    words = ["--no-compile", "--tensorboard", "--core-metric-every=auto", "--run", "name"]
    args = jobs.build_parser().parse_args(["fork", "--matrix-lr", "0.5", *words, "x", "--tag=y"])
    assert args.parent == "x" and args.tag == "y"
    found = {name: vars(args)[name] for name in flags.FLAGS if name in vars(args)}
    # those of the command itself
    assert found.pop("json") is False and found.pop("out_dir") is None
    assert found == {
        "matrix_lr": 0.5,
        "compile": False,
        "tensorboard": True,
        "core_metric_every": "auto",
        "run": "name",
    }


def test_a_parent_that_is_training(parent, monkeypatch, capsys):
    """Its newest checkpoint is taken, and whoever wants more is told how."""
    write_summary(parent, status="running", step=12)
    with open(parent / ".lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        shutil.rmtree(checkpoint.folder_of(parent, 12))
        fork(parent)
    shown = capsys.readouterr().out
    assert "its newest checkpoint is step 8; to fork from later, save first: nanochat jobs" in shown


# ----- starting it, and looking at it


@pytest.mark.parametrize("ranks", [1, 2])
def test_start_becomes_the_training_process(parent, monkeypatch, ranks):
    change_config(parent, lambda config: config["runtime"].update(world_size=ranks))
    started = []
    monkeypatch.setattr(os, "execv", lambda path, words: started.append((path, words)))
    fork(parent, "--step=8", "--start")
    [(path, words)] = started
    assert path == words[0] == sys.executable
    own = [str(small.ROOT / "train.py"), "--resume", "--model-tag=child"]
    assert words[-4:] == [*own, f"--out-dir={parent.parent}"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    assert words[1:-4] == (launcher if ranks == 2 else [])


def test_json(parent, capsys, monkeypatch):
    monkeypatch.chdir(parent.parent)
    (parent.parent / "out").symlink_to(".")
    child = fork(parent, "--step=8", "--json", "--out-dir=out")
    found = json.loads(capsys.readouterr().out)
    assert found["forked_from"] == config_of(child)["forked_from"]
    assert found["command"] == "python train.py --resume --model-tag=child"
    assert found["num_iterations"] == 12 and found["notes"] == []


def test_compare_joins_what_is_shared(parent, tmp_path, capsys):
    """Two forks that differ in the seed are a group, whose spread is of what follows the fork; a
    fork is no second seed of its parent."""
    forks = [fork(parent, "--step=8", f"--seed={seed}", tag=f"s{seed}") for seed in (1, 2)]
    for path in forks:
        resume(path)
    capsys.readouterr()
    words = [str(parent), *map(str, forks)]
    assert compare.main([*words, "--no-plots", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sorted(len(group["runs"]) for group in found["groups"]) == [1, 2]
    assert found["lineage"] == [
        f"s1: forked from {parent} at step 8, with --seed=1 (was 42); its beginning is shared: "
        "8 steps with parent, 8 steps with s2",
        f"s2: forked from {parent} at step 8, with --seed=2 (was 42); its beginning is shared: "
        "8 steps with parent, 8 steps with s1",
    ]
    assert any("begin with the same 8 steps" in line for line in found["warnings"])
    # the parent's curve is part of its own
    steps = [line["step"] for line in read_lines(forks[0] / "metrics.jsonl") if "train/dt" in line]
    assert steps == list(range(12))


def test_runs_of_earlier_versions(parent):
    """Runs saved by earlier versions lack flags, which count with their defaults."""
    change_config(parent, lambda config: config["args"].pop("patience"))
    config = config_of(fork(parent, "--step=8", "--patience=4"))
    assert config["forked_from"]["changed"] == {"patience": [-1, 4]}
    assert config["args"]["patience"] == 4
