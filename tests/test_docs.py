"""The documents keep their word: commands parse, the file map is the tree, imports flow down and do nothing."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import train
from nanochat.__main__ import APPS
from nanochat.run import plan as plans

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# each module may import those of lower layers and of its own, never of a higher one
LAYERS = [
    {"common", "signals", "hardware", "ranks"},
    {"attention", "loss", "fp8", "fp16", "tokenizer", "runlog", "hub", "track"},
    {"corpus"},
    {"model", "hf_model", "optim", "schedules", "data", "fit"},
    {"checkpoint", "evaluate", "engine", "core", "plan"},
    {"start", "faults", "profiling"},
    {
        "sample",
        "report",
        "compare",
        "plots",
        "runs",
        "doctor",
        "bench",
        "export",
        "tokenizer_app",
        "data_app",
        "evaluate_app",
    },
]


def shell_blocks(text):
    return "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL))


def commands(text):
    """Argument lists of the commands in a shell text: comments cut, continuation lines joined, variables left as they are."""
    for line in text.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue  # a line of a multi-line construct
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


def sources():
    yield "README.md", shell_blocks(README)
    for path in sorted((ROOT / "runs").glob("*.sh")):
        yield path.name, path.read_text(encoding="utf-8")


COMMANDS = [
    pytest.param(words, id=f"{name}: {' '.join(words)[:60]}")
    for name, text in sources()
    for words in commands(text)
    if "train.py" in words or words[0] == "nanochat" or "nanochat" in words[1:3]
]


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_parse(words, tmp_path, monkeypatch):
    """Every train.py command passes its flag checks, every nanochat command names an app whose parser takes the flags."""
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"[\w./]+\.(?:txt|json)", " ".join(words)):  # text of the reader's
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "out" / "d4").mkdir(parents=True)
    words = [word for word in words if not re.fullmatch(r"\$@|\$\{\w+\[@\]\}", word)]
    if "train.py" in words:
        if "--help" in words:
            return
        args = train.parse_args(words[words.index("train.py") + 1 :])
        assert plans.check_flags(args) == []
        return
    rest = words[words.index("nanochat") + 1 :]
    assert rest[0] in APPS
    if "--help" in rest:
        return
    help_text = subprocess.run(
        [sys.executable, "-m", "nanochat", rest[0], "--help"],
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


def test_file_map_is_the_tree():
    """README lists exactly the files of the product that git would track."""
    block = README.split("## Files")[1].split("```")[1]
    listed = {line.split()[0] for line in block.strip().splitlines() if line.strip()}
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    shown = {
        path
        for path in tracked
        if path.startswith(("nanochat/", "tasks/", "runs/"))
        or "/" not in path
        and not path.startswith(".")
    }
    assert listed == shown


def test_python_example_runs(tmp_path):
    """README's lines for Python, on a run made here in place of the one they name."""
    import small

    assert small.run(tmp_path) == 0
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len(example.strip().splitlines()) <= 10
    exec(compile(example.replace("out/quickstart", str(tmp_path / "run")), "README.md", "exec"), {})


def imports_of(path):
    """Names of this project's modules that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module + "." + alias.name for alias in node.names] + [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        inside = {name.split(".")[1] for name in names if name.startswith("nanochat.")}
        found |= {name for name in inside if (ROOT / "nanochat" / f"{name}.py").exists()}
        found |= {"train"} & {name.split(".")[0] for name in names}
    return found


def test_imports_flow_down():
    modules = {path.stem for path in (ROOT / "nanochat").glob("*.py")} - {
        "__init__",
        "__main__",
        "export_modeling",
    }
    assert modules == set().union(*LAYERS), "put a new module in its layer"
    for i, layer in enumerate(LAYERS):
        allowed = set().union(*LAYERS[: i + 1])
        for module in layer:
            wrong = imports_of(ROOT / "nanochat" / f"{module}.py") - allowed
            assert not wrong, f"{module} imports {wrong}"
    for path in (ROOT / "tasks").glob("*.py"):
        assert imports_of(path) <= {"common"}


def test_importing_does_no_work_and_help_needs_no_torch():
    """Light modules leave torch alone, so that --help is instant; nothing heavy or optional is imported by any module."""
    apps = ", ".join(f"nanochat.{module}" for module in sorted(LAYERS[-1]))
    light = (
        f"import sys, train, nanochat, nanochat.__main__, {apps}; assert 'torch' not in sys.modules"
    )
    modules = ", ".join(f"nanochat.{module}" for layer in LAYERS for module in sorted(layer))
    heavy = (
        f"import sys, {modules}\n"
        "for name in ('wandb', 'datasets', 'torchao', 'matplotlib', 'triton', 'pyarrow', 'rustbpe', 'transformers',"
        " 'tensorboard'):\n"
        "    assert name not in sys.modules, name"
    )
    for code in (light, heavy):
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_loop_is_readable():
    lines = (ROOT / "train.py").read_text().splitlines()
    assert len(lines) <= 600


def test_no_line_is_too_long():
    for path in [
        ROOT / "train.py",
        *(ROOT / "nanochat").rglob("*.py"),
        *(ROOT / "tests").glob("*.py"),
        *(ROOT / "tasks").glob("*.py"),
    ]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 140, f"{path.name}:{number}"
