"""The table of train.py's flags: parsing, --config, ranges, and what each flag decides."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.__main__ import APPS
from nanochat.common import UsageError
from nanochat.run import flags
from nanochat.run.flags import FLAGS, flag, parse, range_problems

ROOT = Path(__file__).resolve().parent.parent
FREE_ON_RESUME = {
    "data",
    "val_data",
    "run",
    "tensorboard",
    "device_type",
    "dtype",
    "compile",
    "attention",
    "activation_checkpointing",
    "shard",
    "device_batch_size",
    "eval_every",
    "eval_tokens",
    "core_metric_every",
    "core_metric_max_per_task",
    "core_bundle",
    "sample_every",
    "sample_prompts",
    "save_every",
    "save_at",
    "save_every_minutes",
    "keep_last",
    "stop_at_bpb",
    "patience",
    "max_skipped",
    "debug_nans",
    "profile",
}
OF_ONE_START = {
    "resume",
    "resume_from_step",
    "overwrite",
    "out_dir",
    "model_tag",
    "config",
    "notify",
    "no_save",
    "dry_run",
    "json",
    "gpus",
    "gpu",
    "gpu_network",
    "gpu_price",
}
FIXED = {
    "seed",
    "fp8",
    "fp8_recipe",
    "depth",
    "aspect_ratio",
    "head_dim",
    "n_kv_head",
    "max_seq_len",
    "window_pattern",
    "short_window",
    "arch",
    "tie_embeddings",
    "dropout",
    "tokenizer",
    "vocab_size",
    "init_from",
    "total_batch_size",
    "optimizer",
    "embedding_lr",
    "unembedding_lr",
    "weight_decay",
    "matrix_lr",
    "scalar_lr",
    "adam_beta1",
    "adam_beta2",
    "lr_schedule",
    "warmup_ratio",
    "warmup_steps",
    "warmdown_ratio",
    "final_lr_frac",
    "grad_clip",
}
HORIZONS = (
    "num_iterations",
    "target_flops",
    "target_tokens",
    "target_epochs",
    "target_minutes",
    "target_param_data_ratio",
)
SHAPE_THE_MODEL = {
    "depth",
    "aspect_ratio",
    "head_dim",
    "n_kv_head",
    "window_pattern",
    "arch",
    "tie_embeddings",
}
BOOKKEEPING = {
    "notify",
    "seed",
    "resume",
    "resume_from_step",
    "overwrite",
    "out_dir",
    "model_tag",
    "config",
    "dry_run",
    "json",
    "gpus",
    "gpu",
    "gpu_network",
    "gpu_price",
    "data",
    "val_data",
    "run",
    "tensorboard",
    "device_type",
    "dtype",
    "compile",
    "attention",
    "activation_checkpointing",
    "shard",
    "device_batch_size",
    "eval_every",
    "core_metric_every",
    "core_metric_max_per_task",
    "core_bundle",
    "sample_every",
    "sample_prompts",
    "save_every",
    "save_at",
    "save_every_minutes",
    "keep_last",
    "no_save",
    "max_skipped",
    "debug_nans",
    "profile",
    "tokenizer",
    "init_from",
}


# ---- the table ----


def of_scope(scope):
    return {name for name, row in FLAGS.items() if row.on_resume == scope}


def test_what_a_resumed_run_may_change():
    assert of_scope(flags.FREE) == FREE_ON_RESUME
    assert of_scope(flags.START) == OF_ONE_START
    assert of_scope(flags.FIXED) == FIXED


def test_horizons_in_their_order():
    """The first one given wins, so the order is part of the interface."""
    assert flags.HORIZONS == HORIZONS


def test_every_flag_has_one_scope():
    scopes = [FREE_ON_RESUME, OF_ONE_START, FIXED, set(HORIZONS)]
    assert sum(map(len, scopes)) == len(FLAGS)
    assert set.union(*scopes) == set(FLAGS)


def test_what_shapes_the_model():
    assert {name for name, row in FLAGS.items() if row.shapes_model} == SHAPE_THE_MODEL


def test_bookkeeping():
    """Two runs that differ only in these are the same experiment."""
    assert {name for name, row in FLAGS.items() if row.bookkeeping} == BOOKKEEPING


def test_every_flag_has_a_help_text():
    shown = flags.build_parser().format_help()
    for name, row in FLAGS.items():
        assert row.help.strip() and "\n" not in row.help, name
        assert flag(name) in shown
    assert "usage: train.py --depth=N [options]; --help lists them all" in shown
    # a percent sign or a brace in a help text is no placeholder
    words = " ".join(shown.split())
    assert "name of the run folder; empty: d{depth} (default: )" in words


def test_numbers_have_a_range():
    """All but those that are not one number: every value of another type is a choice or a text;
    and a list of steps."""
    numbers = {
        name
        for name, row in FLAGS.items()
        if not isinstance(row.default, (bool, str)) or row.default == "auto" and row.type
    }
    assert {name for name, row in FLAGS.items() if row.range} == numbers | {"save_at"}


def test_defaults_are_in_their_ranges():
    assert range_problems(parse([])) == []


@pytest.mark.parametrize("title, rows", flags.GROUPS.items(), ids=list(flags.GROUPS))
def test_help_is_grouped(title, rows):
    assert rows
    assert f"\n{title}:\n" in flags.build_parser().format_help()


# ---- ranges ----


@pytest.mark.parametrize(
    "name, value, accepted",
    [
        ("depth", 1, True),
        ("depth", 0, False),
        ("gpus", 0, False),
        ("max_skipped", 0, False),
        ("seed", 0, True),
        ("seed", 2**63 - 1, True),
        ("seed", 2**63, False),
        ("seed", -1, False),
        ("n_kv_head", -1, True),
        ("n_kv_head", 0, False),
        ("eval_every", -1, True),
        ("eval_every", 1, True),
        ("eval_every", 0, False),
        ("eval_every", -2, False),
        ("core_metric_every", "auto", True),
        ("core_metric_every", -1, True),
        ("core_metric_every", 0, False),
        ("save_every_minutes", 0.001, True),
        ("save_every_minutes", 0, False),
        ("warmup_steps", 0, True),
        ("warmup_steps", -1, True),
        ("warmup_steps", -2, False),
        ("resume_from_step", 0, True),
        ("embedding_lr", 0, True),
        ("embedding_lr", -1, True),
        ("embedding_lr", -0.5, False),
        ("matrix_lr", 0, False),
        ("matrix_lr", -1, True),
        ("scalar_lr", 0, True),
        ("scalar_lr", -1, False),
        ("weight_decay", 0, True),
        ("weight_decay", -0.1, False),
        ("grad_clip", 0, True),
        ("grad_clip", -1, False),
        ("adam_beta1", 0, True),
        ("adam_beta1", 0.999, True),
        ("adam_beta1", 1, False),
        ("dropout", 0, True),
        ("dropout", 1, False),
        ("warmdown_ratio", 0, True),
        ("warmdown_ratio", 1, True),
        ("warmdown_ratio", 1.01, False),
        ("final_lr_frac", 1, True),
        ("final_lr_frac", -0.01, False),
        ("target_flops", 1e18, True),
        ("target_flops", 0, False),
        ("target_param_data_ratio", 0.01, True),
        ("target_param_data_ratio", 0, False),
        ("target_param_data_ratio", -1, True),
        ("stop_at_bpb", 0, False),
    ],
)
def test_ranges(name, value, accepted):
    found = range_problems(parse([f"{flag(name)}={value}"]))
    if accepted:
        assert found == []
        return
    (sentence,) = found
    shown = getattr(parse([f"{flag(name)}={value}"]), name)
    # reason and remedy
    assert sentence.startswith(f"{flag(name)}={shown}: ") and sentence.count("; ") == 1


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_what_is_not_finite_is_one_problem(value):
    found = range_problems(parse([f"--grad-clip={value}"]))
    assert found == [f"--grad-clip={value}: not a finite number; give a number"]


# ---- parsing ----


def test_nothing_given():
    args = parse([])
    assert args.given == set()
    assert vars(args) == {name: row.default for name, row in FLAGS.items()} | {"given": set()}


def test_what_was_given_is_noted_also_if_it_is_the_default():
    args = parse(["--depth=20", "--no-compile", "--warmup-steps=-1", "--debug-nans"])
    assert args.given == {"depth", "compile", "warmup_steps", "debug_nans"}
    assert (args.depth, args.compile, args.warmup_steps) == (20, False, -1)
    assert args.debug_nans is True


@pytest.mark.parametrize(
    "word, name, value",
    [
        ("--target-tokens=1e9", "target_tokens", 1e9),
        ("--target-flops=3", "target_flops", 3.0),
        ("--core-metric-every=auto", "core_metric_every", "auto"),
        ("--core-metric-every=12", "core_metric_every", 12),
        ("--model-tag=7", "model_tag", "7"),
        ("--weight-decay=1", "weight_decay", 1.0),
        ("--compile", "compile", True),
    ],
)
def test_types(word, name, value):
    found = getattr(parse([word]), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "words, named",
    [
        (["--dept=4"], ["unrecognized argument --dept=4; did you mean --depth?"]),
        (["--depth=four"], ["--depth", "'four'"]),
        (["--depth=4.5"], ["--depth", "'4.5'"]),
        (["--optimizer=sgd"], ["--optimizer", "'sgd'", "muon", "adamw"]),
        (["--core-metric-every=often"], ["--core-metric-every", "'often'"]),
        (["--resume=yes"], ["--resume"]),
        (["--no-resume"], ["--no-resume"]),
        (["more"], ["unrecognized argument more; --help lists all flags"]),
    ],
)
def test_what_argparse_refuses(words, named, capsys):
    with pytest.raises(SystemExit) as end:
        parse(words)
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert [word for word in named if word not in error] == []


# ---- --config ----


def write(folder, content, name="flags.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_file_of_flags(tmp_path):
    """Names in both spellings; values equal to the default do not count as given."""
    content = {"depth": 3, "--target-tokens": 5e6, "debug_nans": True, "seed": 42, "resume": True}
    path = write(tmp_path, content)
    args = parse([f"--config={path}"])
    assert (args.depth, args.target_tokens, args.debug_nans) == (3, 5e6, True)
    assert args.resume is True
    assert args.given == {"depth", "target_tokens", "debug_nans", "resume", "config"}


@pytest.mark.parametrize("first", [True, False])
def test_the_command_line_wins(tmp_path, first):
    path = write(tmp_path, {"depth": 3, "compile": False, "seed": 5})
    words = ["--depth=7", "--compile"]
    at = 0 if first else 2
    words.insert(at, f"--config={path}")
    args = parse(words)
    assert (args.depth, args.compile, args.seed) == (7, True, 5)


@pytest.mark.parametrize("by_folder", [True, False])
def test_the_config_of_a_run(tmp_path, by_folder):
    """Without what belonged to its start; also by its folder."""
    run_args = vars(parse(["--depth=3", "--overwrite", "--model-tag=first", "--no-compile"]))
    run_args.pop("given")
    path = write(tmp_path, {"format": 1, "args": run_args}, "config.json")
    args = parse([f"--config={tmp_path if by_folder else path}", "--seed=9"])
    assert (args.depth, args.compile, args.seed) == (3, False, 9)
    assert (args.overwrite, args.model_tag) == (False, "")
    assert args.given == {"depth", "compile", "seed", "config"}


@pytest.mark.parametrize(
    "content, words",
    [
        ({"dept": 3}, ["flags.json", "no such flag: --dept"]),
        ({"config": "other.json"}, ["no such flag: --config"]),
        ("depth: 3", ["--config", "flags.json", "JSON"]),
        ([3], ["neither a run's config.json nor an object of flags"]),
        ({"args": [3]}, ["neither a run's config.json nor an object of flags"]),
        ({"depth": [3]}, ["--depth is [3]", "give a number or a string"]),
        ({"depth": None}, ["--depth is null", "give a number or a string"]),
        ({"depth": True}, ["--depth is true", "give a number or a string"]),
        ({"resume": 1.5}, ["--resume is 1.5", "give true or false"]),
        ({"compile": "no"}, ["--compile is 'no'", "give true or false"]),
    ],
)
def test_a_config_that_is_refused(tmp_path, content, words):
    path = write(tmp_path, content)
    with pytest.raises(UsageError) as caught:
        parse([f"--config={path}"])
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_config_that_does_not_exist():
    with pytest.raises(UsageError, match="--config: /no/such.json does not exist"):
        parse(["--config=/no/such.json"])


def test_a_wrong_value_in_a_config(tmp_path, capsys):
    path = write(tmp_path, {"depth": "three"})
    with pytest.raises(SystemExit) as end:
        parse([f"--config={path}"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "--depth" in error and "'three'" in error


PATHS = (
    "out_dir",
    "config",
    "data",
    "val_data",
    "tokenizer",
    "init_from",
    "core_bundle",
    "sample_prompts",
)


def test_paths_are_expanded_on_the_command_line_and_in_a_config(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "flags.json").write_text("{}")
    words = [f"{flag(name)}=~/flags.json" for name in PATHS]
    args = parse(words)
    assert {getattr(args, name) for name in PATHS} == {str(tmp_path / "flags.json")}
    values = {name: "~/x" for name in PATHS if name != "config"}
    (tmp_path / "flags.json").write_text(json.dumps(values))
    args = parse(["--config=~/flags.json"])
    assert {getattr(args, name) for name in values} == {str(tmp_path / "x")}


def test_all_flags_as_data(capsys):
    """--help-json has every flag with what the table knows of it, and ends as --help does."""
    with pytest.raises(SystemExit, match="0"):
        flags.parse(["--depth=4", "--help-json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["program"] == "train.py" and shown["commands"] == {}
    options = {option["name"]: option for option in shown["options"]}
    assert list(options) == ["help_json", *flags.FLAGS]
    depth = options["depth"]
    assert (depth["words"], depth["type"], depth["default"]) == (["--depth"], "int", 20)
    assert depth["range"] == "must be at least 1" and depth["group"] == "model"
    assert depth["shapes_model"] and not depth["same_experiment"] and not depth["live"]
    assert options["seed"]["same_experiment"] and options["eval_every"]["live"]
    assert options["compile"]["words"] == ["--compile", "--no-compile"]
    assert options["compile"]["type"] == "switch" and options["data"]["type"] == "path"
    assert options["optimizer"]["choices"] == ["muon", "adamw"]
    # a percent sign is one again
    assert "%%" not in json.dumps(shown)


def test_the_apps_options_as_data():
    """One implementation for all apps, those with commands included."""
    code = (
        "import sys; from nanochat.__main__ import main\n"
        "for app in sys.argv[1:]:\n"
        "    try:\n"
        "        main([*app.split(), '--help-json'])\n"
        "    except SystemExit as ended:\n"
        "        assert ended.code == 0\n"
        "    print('----')\n"
        "assert 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code, *APPS, "sweep try", "jobs list"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    shown = [json.loads(text) for text in done.stdout.split("----\n")[:-1]]
    programs = [f"nanochat {app}" for app in (*APPS, "sweep try", "jobs list")]
    assert [described["program"] for described in shown] == programs
    by_name = dict(zip((*APPS, "sweep try"), shown, strict=False))
    runs = {option["name"]: option for option in by_name["runs"]["options"]}
    assert runs["sort"]["choices"] and runs["sort"]["default"] == "name"
    compare = by_name["tokenizer"]["commands"]["compare"]
    assert [option["name"] for option in compare["options"] if not option["words"]] == [
        "data",
        "tokenizers",
    ]
    gain = next(one for one in by_name["sweep try"]["options"] if one["name"] == "gain")
    assert (gain["words"], gain["type"], gain["default"]) == (["--gain"], "float", 0.01)
