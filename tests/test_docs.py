"""The documents keep their word: commands parse, the file map is the tree, imports flow down and do
no work."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import small
from torch.distributed.run import get_args_parser

import train
from nanochat.__main__ import APPS
from nanochat.run import flags
from nanochat.run.checks import check_flags

ROOT = Path(__file__).resolve().parent.parent
# pages whose commands are tested as those of README
PAGES = ("COMING_FROM.md", "CURVES.md", "MACHINES.md", "README.md", "SERVING.md")
README = (ROOT / "README.md").read_text(encoding="utf-8")
# From the lowest to the highest: a module imports from its own layer and from those before it.
FLOOR = {
    "common",
    "hardware",
    "limits",
    "locks",
    "machines",
    "native",
    "output",
    "ranks",
    "signals",
}
LAYERS = ["floor", "model", "optim", "data", "run", "eval", "apps"]
HEAVY = (
    "datasets",
    "matplotlib",
    "pyarrow",
    "rustbpe",
    "tensorboard",
    "torchao",
    "transformers",
    "triton",
    "wandb",
)


def shell_blocks(text):
    return "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL))


def commands(text):
    """Argument lists of the commands in a shell text: comments cut, continuation lines joined,
    variables left as they are."""
    for line in text.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            # a line of a multi-line construct
            continue
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        # what follows a pipe or names a file for the output is no argument
        ends = (i for i, word in enumerate(words) if re.match(r"\||\d?>", word))
        words = words[: next(ends, len(words))]
        if words:
            yield words


def sources():
    yield "README.md", shell_blocks(README)
    for path in sorted((ROOT / "runs").glob("*.sh")):
        yield path.name, path.read_text(encoding="utf-8")
    for name in PAGES:
        yield name, shell_blocks((ROOT / "runs" / name).read_text(encoding="utf-8"))
    cells = json.loads((ROOT / "runs" / "t4.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    yield "t4.ipynb", "\n".join(re.findall(r"^!((?:.*\\\n)*.*)$", code, re.MULTILINE))


COMMANDS = [
    pytest.param(words, id=f"{name}: {' '.join(words)[:60]}")
    for name, text in sources()
    for words in commands(text)
    if "train.py" in words or words[0] == "nanochat" or "nanochat" in words[1:3]
]


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_parse(words, tmp_path, monkeypatch):
    """Every train.py command passes its flag checks, every nanochat command names an app whose
    parser takes the flags."""
    monkeypatch.chdir(tmp_path)
    # files of the reader's
    for name in re.findall(r"[\w./]+\.(?:txt|jsonl?)\b", " ".join(words)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    for run in {"out/d4", *re.findall(r"out/\w+", " ".join(words))}:
        (tmp_path / run).mkdir(parents=True)
    words = [word for word in words if not re.fullmatch(r"\$@|\$\{\w+\[@\]\}", word)]
    if "train.py" in words:
        if {"--help", "--help-json"} & set(words):
            return
        given = words[words.index("train.py") + 1 :]
        # numbers that a script has in variables
        args = train.parse_args([re.sub(r"\$\w+", "1", word) for word in given])
        assert check_flags(args) == []
        return
    rest = words[words.index("nanochat") + 1 :]
    assert rest[0] in APPS
    if "--help" in rest:
        return
    # these take flags of train.py, more than the help of all commands of the app names
    app = rest[:2] if rest[:2] in (["jobs", "fork"], ["sweep", "try"]) else rest[:1]
    help_text = subprocess.run(
        [sys.executable, "-m", "nanochat", *app, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert all(word.split("=")[0] in help_text for word in rest[1:] if word.startswith("--"))


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 6
    assert "bash runs/quickstart.sh" in README and "bash runs/test.sh" in README


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "runs").glob("*.sh")))
def test_scripts_are_valid_shell(name):
    subprocess.run(["bash", "-n", ROOT / "runs" / name], check=True)


def test_run_scripts_end_with_a_result():
    for path in (ROOT / "runs").glob("*.sh"):
        if path.name not in ("setup.sh", "test.sh", "restart.sh"):
            assert "RESULT" in path.read_text().rstrip().splitlines()[-2], path.name


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout: git lists the files")
def test_file_map_is_the_tree():
    """README lists exactly the files of the product that git would track, by folder."""
    table = README.split("## Files")[1].split("\n## ")[0]
    listed = set()
    for row in re.findall(r"^\| `(.*?)` \|.*\| (.*) \|$", table, re.MULTILINE):
        folder, files = row
        listed |= {folder.removeprefix("./") + name for name in re.findall(r"`(.*?)`", files)}
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    git = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    product = ("nanochat/", "tasks/", "runs/")
    shown = set()
    for path in git.stdout.split():
        at_the_top = "/" not in path and not path.startswith(".")
        if (at_the_top or path.startswith(product)) and (ROOT / path).exists():
            shown.add(path)
    assert listed == shown


def test_the_index_of_runs_is_complete():
    index = (ROOT / "runs" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+\.\w+|Dockerfile)`|\]\((\w+\.\w+)\)", index))
    named = {name for names in named for name in names if name}
    files = {path.name for path in (ROOT / "runs").iterdir() if path.is_file()}
    assert named == files - {"README.md"}


def test_python_example_runs(tmp_path):
    """README's lines for Python, on a run made here in place of the one they name."""
    assert small.run(tmp_path) == 0
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len(example.strip().splitlines()) <= 10
    exec(compile(example.replace("out/quickstart", str(tmp_path / "run")), "README.md", "exec"), {})


def parsed_by_torchrun(words):
    """What torchrun's own parser makes of the words after `torchrun`: (script, its arguments,
    whether the script is a module)."""
    args = get_args_parser().parse_args(words)
    return args.training_script, args.training_script_args, args.module


def options_of_train():
    """Every spelling of every flag of train.py, `--no-` forms and -h included."""
    return sorted(flags.build_parser()._option_string_actions)


@pytest.mark.parametrize("spelling", [["{}=x"], ["{}", "x"], ["{}"]], ids=" ".join)
def test_torchrun_leaves_every_flag_of_train_alone(spelling):
    """In the form that is shown everywhere; on several machines, and for an app, too."""
    options = options_of_train()
    assert {"--run", "--depth", "--no-compile"} <= set(options)
    several = ["--nnodes=2", "--nproc_per_node=8", "--rdzv-backend=c10d", "--rdzv-endpoint=a:29500"]
    for option in options:
        words = [word.format(option) for word in spelling]
        for start in (["--standalone", "--nproc_per_node=8"], several):
            found = parsed_by_torchrun([*start, "--", "train.py", *words])
            assert found == ("train.py", words, False)
            found = parsed_by_torchrun([*start, "-m", "--", "nanochat", "evaluate", *words])
            assert found == ("nanochat", ["evaluate", *words], True)


def test_readme_has_the_error_of_a_torchrun_command_without_dashes(capsys):
    with pytest.raises(SystemExit):
        parsed_by_torchrun(["--standalone", "--nproc_per_node=8", "train.py", "--run=NAME"])
    message = capsys.readouterr().err.splitlines()[-1].split("error: ")[1]
    (row,) = [line for line in README.splitlines() if f"error: {message}`" in line]
    assert "`torchrun --standalone --nproc_per_node=8 -- train.py --run=NAME`" in row


def torchrun_commands():
    """(file, command) for each torchrun command with options that is shown or run anywhere: in
    documents, scripts, docstrings, messages."""
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        path = ROOT / name
        if path.suffix in (".md", ".py", ".sh", ".slurm", ".yml", ".yaml", ".toml", "") and (
            path.is_file() and not name.startswith("tests/")
        ):
            # a command goes on behind a backslash, and from one string of Python to the next
            text = re.sub(r'\\\n|"\s*\n\s*f?"', " ", path.read_text(encoding="utf-8"))
            for command in re.findall(r"\btorchrun +-[^\n`;]*", text):
                yield name, command


@pytest.mark.parametrize(
    "name, command", [pytest.param(*found, id=found[0]) for found in torchrun_commands()]
)
def test_torchrun_is_told_where_its_flags_end(name, command):
    """Its own parser also reads what stands behind the script, and refuses --run; without
    --standalone, two runs on one machine would want the same port."""
    first_file = re.search(r"train\.py|COMMAND|\bnanochat\b|\)$", command)
    # without one it is prose about torchrun itself
    if first_file:
        options = command[: first_file.start()].split()
        assert "--" in options, f"{name}: {command}"
        assert "--standalone" in options or "--rdzv-backend=c10d" in options


def test_torchrun_commands_are_found():
    found = {name for name, _ in torchrun_commands()}
    assert found >= {
        "README.md",
        "train.py",
        "nanochat/ranks.py",
        *(f"runs/{name}" for name in ("chaos.sh", "restart.sh", "speedrun.sh")),
    }


def test_torchrun_is_told_where_its_flags_end_by_apps():
    """Apps start it as a module, with a list of words."""
    starts = [
        text.split("torch.distributed.run", 1)[1][:200]
        for text in (path.read_text() for path in (ROOT / "nanochat").rglob("*.py"))
        if "torch.distributed.run" in text
    ]
    assert len(starts) == 1
    assert all('"--"]' in start and "--standalone" in start for start in starts)


def modules():
    """{dotted name: path} of the product's modules."""
    paths = [path for folder in ("nanochat", "tasks") for path in (ROOT / folder).rglob("*.py")]
    names = {}
    for path in paths:
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts).removesuffix(".__init__")] = path
    return names


MODULES = modules()


def imports_of(path):
    """Names of this project's modules that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name for name in names if name in MODULES or name == "train"}
    return found - {"nanochat", "tasks", *(f"nanochat.{layer}" for layer in LAYERS)}


def layer_of(module):
    """Index in LAYERS; -1 for tasks, which the floor may not import."""
    top = module.split(".")[1]
    if module.startswith("tasks."):
        return -1
    return LAYERS.index("floor" if top in FLOOR else top)


def app_of(module):
    """The command that a module under nanochat/apps belongs to."""
    return module.split(".")[2]


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"nanochat", "nanochat.__main__"}))
def test_imports_flow_down(module):
    if module in ("tasks", *(f"nanochat.{layer}" for layer in LAYERS)):
        assert MODULES[module].read_text().count("import ") == 0, "a layer's folder holds no code"
        return
    imported = imports_of(MODULES[module])
    assert "train" not in imported
    if module.startswith("tasks."):
        allowed = {name for name in imported if layer_of(name) in (-1, 0)}
    else:
        mine = layer_of(module)
        allowed = {name for name in imported if layer_of(name) <= mine}
    assert imported == allowed
    if module.startswith("nanochat.apps."):
        apps = {app_of(name) for name in imported if name.startswith("nanochat.apps.")}
        assert apps <= {app_of(module)}, "an app imports no other app"


def test_every_app_is_a_module_named_like_it():
    named = {app_of(name) for name in MODULES if name.startswith("nanochat.apps.")}
    assert named == set(APPS)


def test_importing_does_no_work_and_help_needs_no_torch():
    """Light modules leave torch alone, so that --help is instant; no module imports what is heavy
    or optional."""
    light = ["train", "nanochat", "nanochat.__main__", "nanochat.run.flags"]
    light += [f"nanochat.apps.{name}" for name in APPS]
    no_torch = f"import sys, {', '.join(light)}; assert 'torch' not in sys.modules"
    # kernels are Triton's, and an exported model's code belongs to transformers
    every = [name for name in sorted(MODULES) if ".kernels." not in name and "modeling" not in name]
    nothing_heavy = (
        f"import sys, {', '.join(every)}\n"
        f"assert not set(sys.modules) & {set(HEAVY)}, set(sys.modules) & {set(HEAVY)}"
    )
    for code in (no_torch, nothing_heavy):
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_no_python_in_runs():
    assert not list((ROOT / "runs").rglob("*.py"))
    for path in (ROOT / "runs").glob("*.sh"):
        # a program on the command line or on standard input
        assert not re.search(r"python\S* (-c|-) ", path.read_text(encoding="utf-8")), path.name
