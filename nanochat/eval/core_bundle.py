"""Where the files of the CORE benchmark are: in a given folder, in the cache, or published."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from nanochat import locks
from nanochat.common import Unavailable, UsageError, cached, in_a_line, new_folder
from nanochat.data.download import RemoteFile, content_length, wait_for
from tasks.core import published_yaml

# The published files at a fixed commit: git's name of each and its size (None: asked for).
EXAMPLES_URL = (
    "https://raw.githubusercontent.com/mosaicml/llm-foundry/"
    "8c8dd48f72168c5d51e2f7b151595892a8fba43d/scripts/eval/local_data/"
)
CHANCES_URL = (
    "https://raw.githubusercontent.com/mlfoundations/dclm/"
    "361714bdd60bb9b7f4b2d8354cebbf0dec0c329e/eval/eval_meta_data_v1.csv"
)
CHANCES = ("faa195a36e398845f6afeca9d5a58eed86db8e89", 16_612)
EXAMPLES = {
    "commonsense_reasoning/commonsense_qa.jsonl": (
        "f1cc16a88b05ab0934aab2ec2d02a6869e6e5520",
        258_861,
    ),
    "commonsense_reasoning/copa.jsonl": ("b22f96e08ae9d0e97e1ae58f67b6425c77ef200a", 14_627),
    "commonsense_reasoning/openbook_qa.jsonl": ("a8aff255a64cbc72a85252acf00df25a315686c2", 88_043),
    "commonsense_reasoning/piqa.jsonl": ("a9992adfdefde366fe7ccff871f5aa62449a09cf", 533_992),
    "language_understanding/bigbench_language_identification.jsonl": (
        "1f132fbbb12a67ce267b7b92b458175632c265f3",
        3_940_808,
    ),
    "language_understanding/hellaswag.jsonl": ("448321079fdc140bd8566b16b24eda9ceacd3501", None),
    "language_understanding/lambada_openai.jsonl": (
        "4da02dd53b9e7385871d06ab855471d77b2f7dda",
        1_895_241,
    ),
    "language_understanding/winograd_wsc.jsonl": (
        "762fe030ac6938ecba438c47a04057247c6ab891",
        60_523,
    ),
    "language_understanding/winogrande.jsonl": (
        "316e87ae4659f0c402b0f00551fdec83ab0a0986",
        312_369,
    ),
    "reading_comprehension/boolq.jsonl": ("f42083a58713d00ef4600118cfdf79618c269190", 2_210_395),
    "reading_comprehension/coqa.jsonl": ("028bd4e51326cc43f8394987ae47fbb271aeba9d", 18_588_497),
    "reading_comprehension/squad.jsonl": ("dc733b8f58ec666c53fd946198c434b819a00680", 9_810_616),
    "symbolic_problem_solving/agi_eval_lsat_ar.jsonl": (
        "d663b427ba310d3f877f09a6830198ca7c856189",
        219_517,
    ),
    "symbolic_problem_solving/bigbench_cs_algorithms.jsonl": (
        "7ecee0f270f3de8b6558da14ae02181f3d950a40",
        235_435,
    ),
    "symbolic_problem_solving/bigbench_dyck_languages.jsonl": (
        "27a4ac2b3b18716add92f4ecd62475c4f8d77768",
        198_916,
    ),
    "symbolic_problem_solving/bigbench_operators.jsonl": (
        "a982dc4f962725c9dc4abb07d3cc333c99959290",
        35_375,
    ),
    "symbolic_problem_solving/bigbench_repeat_copy_logic.jsonl": (
        "86621f10e7124ed6f3a61fb91493c1256c008f60",
        7_158,
    ),
    "world_knowledge/arc_challenge.jsonl": ("ce66b8dcfb4bac892a404a0dda8b4e8ed0f84b89", 365_606),
    "world_knowledge/arc_easy.jsonl": ("b5fd1bf87a24246a6be67230b721541688f5c349", 636_665),
    "world_knowledge/bigbench_qa_wikidata.jsonl": (
        "5e1be72797ba082fd4f6efa42f7d759d2d23339a",
        1_639_702,
    ),
    "world_knowledge/jeopardy_all.jsonl": ("2f771918dbc8b68550df204171b14d2648b5d494", 364_582),
}


def find_bundle(
    given: str, report: Callable[[str], None] = print, download: bool = True
) -> Path | None:
    """The folder of the CORE bundle: `given`, or if that is "" the cached one.

    If none is cached, it is downloaded and cached, whole or not at all; with download=False the
    result is then None. report: called with lines about the download.
    Raises UsageError if `given` is not a bundle, Unavailable if the download fails."""
    if given:
        return _given_bundle(given)
    # a folder with this name is complete
    folder = cached("core")
    if folder.is_dir():
        return folder
    if not download:
        return None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locks.open_lock(folder.with_suffix(".lock")) as lock:
            wait_for(lock, "the CORE bundle", folder.parent, report)
            # another process may have finished the download while this one waited for the lock
            if not folder.is_dir():
                _download(folder, report)
    except OSError as error:
        raise Unavailable(
            f"{folder}: the CORE bundle cannot be stored there ({in_a_line(error)})"
        ) from None
    return folder


def _given_bundle(given: str) -> Path:
    """The folder that holds core.yaml: --core-bundle, or eval_bundle/ inside it."""
    folder = Path(given)
    if folder.is_file():
        raise UsageError(f"--core-bundle={given}: this is a file; unpack it and name the folder")
    # the published archive unpacks into a folder eval_bundle/
    for candidate in (folder, folder / "eval_bundle"):
        if (candidate / "core.yaml").is_file():
            return candidate
    raise UsageError(
        f"--core-bundle={given}: no core.yaml in this folder; name the one with core.yaml, "
        f"eval_meta_data.csv and eval_data/, or omit the flag to download the bundle"
    )


def _download(folder: Path, report: Callable[[str], None]) -> None:
    """Create the bundle's folder from the published files; raises Unavailable and leaves none."""
    report("CORE: downloading its bundle of 22 tasks (about 50 MB), once")
    files = {"eval_meta_data.csv": RemoteFile("", "", CHANCES_URL, CHANCES[1], "", CHANCES[0])}
    for uri, (blob, n_bytes) in EXAMPLES.items():
        # the table lacks the size of one file
        n_bytes = n_bytes or content_length(EXAMPLES_URL + uri, report)
        files[f"eval_data/{uri}"] = RemoteFile("", "", EXAMPLES_URL + uri, n_bytes, "", blob)
    paths = {name: file.fetch(report) for name, file in files.items()}
    # it gets its name when it is complete
    with new_folder(folder) as partial:
        for name, path in paths.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(path.read_bytes())
        (partial / "core.yaml").write_text(published_yaml(), encoding="utf-8")
    # the downloads would otherwise take the space a second time; another user's have to stay
    for path in paths.values():
        with contextlib.suppress(OSError):
            path.unlink()
