"""`nanochat jobs cleanup`: remove what announced processes that are gone."""

import contextlib
import json
from argparse import Namespace
from pathlib import Path

from nanochat.common import EXIT_COMPLETED, counted, printable
from nanochat.run.records import find
from nanochat.run.registry import JOB_FILE, entries, forget, read_job, socket_folder, sweep_sockets

# folders below an --out-dir that are searched, as `nanochat runs` does
LEVELS = 2


def clean_up(args: Namespace) -> int:
    """Remove sockets on which nobody listens, entries of processes that are gone, and their
    job.json files. Runs, and what belongs to processes elsewhere, stay as they are."""
    left: list[Path] = []
    files: list[Path] = []
    problems: list[str] = []
    for entry in entries():
        # None: its process is elsewhere, and may be running
        if entry.job.leader.exists() is False:
            left += forget(entry.job)
            with contextlib.suppress(OSError):
                entry.file.unlink()
                files.append(entry.file)
    for text in args.folders:
        for folder in find(Path(text), LEVELS, problems):
            left += _stale(folder.resolve())
    # those that no entry names
    with contextlib.suppress(OSError):
        left += sweep_sockets(socket_folder())
    removed = {
        "sockets": [path for path in left if path.name != JOB_FILE],
        "entries": files,
        "job_files": [path for path in left if path.name == JOB_FILE],
    }
    if args.json:
        shown = {kind: list(map(str, paths)) for kind, paths in removed.items()}
        print(json.dumps({**shown, "problems": problems}, indent=2))
        return EXIT_COMPLETED
    for path in (*left, *files):
        print(printable(f"removed {path}"))
    for problem in problems:
        print(printable(problem))
    sockets, gone, job_files = (len(paths) for paths in removed.values())
    print(
        f"removed {counted(sockets, 'dead socket')}, the records of {counted(gone, 'start')} whose "
        f"process is gone, {counted(job_files, f'stale {JOB_FILE} file')}"
    )
    return EXIT_COMPLETED


def _stale(folder: Path) -> list[Path]:
    """Remove the job.json of a run folder, unless its process may exist; returns what was
    removed."""
    job = read_job(folder / JOB_FILE)
    if job is None:
        return []
    # copied with the folder: it is about another one
    if Path(job.path) != folder:
        with contextlib.suppress(OSError):
            (folder / JOB_FILE).unlink()
            return [folder / JOB_FILE]
    return forget(job) if job.leader.exists() is False else []
