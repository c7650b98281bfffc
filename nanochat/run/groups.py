"""Groups of runs: the same experiment with several seeds.

Runs whose settings differ in nothing but the seed are a group, and its numbers are means over the
seeds that were completed. Imports no torch."""

import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat.run.flags import FLAGS
from nanochat.run.folder import weights_alone
from nanochat.run.records import CoreResult, RunRecord, dig, finite_number

# up to so many seeds are named in the name of a group
NAMED_SEEDS = 5


@dataclass(frozen=True)
class Group:
    """Runs of one experiment, one for each seed, in the order given.

    members: the runs whose numbers are those of the group: the completed ones, or the run itself if
    it is alone."""

    name: str
    runs: list[RunRecord]
    members: list[RunRecord]

    def bpb_values(self) -> list[float]:
        """val_bpb of the members that have one."""
        return [run.val_bpb for run in self.members if run.val_bpb is not None]

    def core_values(self) -> list[float]:
        """CORE of the members that have it; none if they were measured on different examples."""
        with_core = [run for run in self.members if run.core_metric is not None]
        if len({examples_of(run.core) for run in with_core}) > 1:
            return []
        return [run.core_metric for run in with_core]


def examples_of(core: CoreResult | None) -> tuple | None:
    """What two CORE results share if they were measured on the same examples from the same chance
    levels; None without a result."""
    if core is None or not core.tasks:
        return None
    return tuple(
        (label, task.fingerprint, task.n, task.chance) for label, task in core.tasks.items()
    )


def settings_of(run: RunRecord, with_commit: bool = True) -> str:
    """All that decides what a run becomes except its seed, as text to compare.

    "" where config.json does not tell. with_commit: count the version of the code as a setting."""
    config = run.config
    args = config.get("args")
    # nothing is known of how an imported model was trained, and an average is no run of its seed
    if not args or weights_alone(config) or run.seed is None:
        return ""
    plan = config.get("plan")
    # how many steps fit into a time is measured, and differs from run to run
    if finite_number(args.get("target_minutes")) not in (-1, None):
        plan = None
    # text and tokenizer are compared by content, the compute dtype by what was used in the end
    deciding = {
        name: value
        for name, value in args.items()
        # a flag of another version that is not known here may decide as well
        if name not in FLAGS or not FLAGS[name].bookkeeping
    }
    settings = [
        deciding,
        plan,
        config.get("model"),
        config.get("init_from"),
        config.get("extended"),
        _forks(config),
        config.get("git_commit") if with_commit else None,
        dig(config, "data", "fingerprint"),
        dig(config, "tokenizer", "fingerprint"),
        dig(config, "runtime", "dtype"),
    ]
    return json.dumps(settings, sort_keys=True)


def _forks(config: dict) -> list:
    """At which steps a run was forked, and which settings it had before, the latest fork first:
    runs that end with the same settings may have begun with others."""
    found = []
    while fork := dig(config, "forked_from"):
        before = {
            name: values[0]
            for name, values in (dig(fork, "changed") or {}).items()
            if name not in FLAGS or not FLAGS[name].bookkeeping
        }
        found.append([dig(fork, "step"), before])
        config = fork
    return found


def shared_steps(a: RunRecord, b: RunRecord) -> int:
    """Training steps that are the same computation in both runs, because one was forked from the
    other, or both from a third: these have the same lines, times included."""
    if not (dig(a.config, "forked_from") or dig(b.config, "forked_from")):
        return 0
    # of training alone: the fork may have been evaluated at other steps
    trained = [[line for line in run.lines if "train/loss" in line] for run in (a, b)]
    pairs = zip(*trained, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _shared_notes(groups: Sequence[Group]) -> list[str]:
    """A sentence on each group whose seeds are not independent of each other."""
    notes = []
    for group in groups:
        pairs = itertools.combinations(group.members, 2)
        steps = max((shared_steps(a, b) for a, b in pairs), default=0)
        if steps:
            notes.append(
                f"{group.name}: some of these runs begin with the same {steps:,} steps, so their "
                f"spread is only that of the steps after"
            )
    return notes


def group_runs(runs: Sequence[RunRecord]) -> tuple[list[Group], list[str]]:
    """(groups, notes on how they were formed) of runs with distinct names.

    Of runs with the same settings and the same seed only the first is in a group: what they differ
    in, if in anything, is not in config.json."""
    repeats: list[str] = []
    left_out: list[str] = []
    groups = []
    for alike in _by_settings(runs):
        first_of_seed: dict[int | float | None, RunRecord] = {}
        for run in alike:
            first_of_seed.setdefault(run.seed, run)
        groups.append(_group(list(first_of_seed.values()), left_out))
        # a repeated seed in a mean would count the same noise twice
        for run in alike:
            first = first_of_seed[run.seed]
            if run is not first:
                repeats.append(
                    f"{run.name}: has the settings and the seed of {first.name}. If they differ, "
                    f"it is in something that config.json does not record (uncommitted code, the "
                    f"machine), so this run stands alone"
                )
                groups.append(_group([run], left_out))
    return groups, repeats + left_out + _shared_notes(groups) + _commit_notes(groups)


def _by_settings(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Runs with the same settings together; a run whose settings are unknown is alone."""
    found: dict[str | int, list[RunRecord]] = {}
    for i, run in enumerate(runs):
        found.setdefault(settings_of(run) or i, []).append(run)
    return list(found.values())


def _group(runs: list[RunRecord], notes: list[str]) -> Group:
    """A group of runs; a note names those that do not count in its mean."""
    name = name_of(runs)
    if len(runs) == 1:
        return Group(name, runs, members=runs)
    # a run that was cut short has a worse score for a reason that is not noise
    done = [run for run in runs if run.status == "completed"]
    if left := [run for run in runs if run.status != "completed"]:
        notes.append(f"{name}: its mean leaves out {names(left)}, which did not complete")
    return Group(name, runs, members=done)


def _commit_notes(groups: Sequence[Group]) -> list[str]:
    """A sentence on each set of groups that differ in nothing but the version of the code."""
    by_settings: dict[str, list[Group]] = {}
    for group in groups:
        if settings := settings_of(group.runs[0], with_commit=False):
            by_settings.setdefault(settings, []).append(group)
    notes = []
    for alike in by_settings.values():
        commits = {str(group.runs[0].config.get("git_commit"))[:8] for group in alike}
        if len(commits) > 1:
            notes.append(
                f"{' and '.join(group.name for group in alike)}: the same settings, with code of "
                f"different commits ({', '.join(sorted(commits))})"
            )
    return notes


def names(runs: Sequence[RunRecord]) -> str:
    """The names of runs in a sentence."""
    return ", ".join(run.name for run in runs)


def name_of(runs: Sequence[RunRecord]) -> str:
    """The name of a group: what the names of its runs begin with, and its seeds."""
    if len(runs) == 1:
        return runs[0].name
    # d4_seed42 and d4_seed43 begin alike with d4_seed4, of which d4 is the name
    common = os.path.commonprefix([run.name for run in runs])
    common = re.sub(r"(^|[\W_]+)(seeds?\d*|s\d*)?$", "", common)
    common = common or Path(runs[0].path).parent.name or runs[0].name
    seeds = sorted(run.seed for run in runs)
    if len(seeds) <= NAMED_SEEDS:
        return f"{common} (seeds {', '.join(map(str, seeds))})"
    return f"{common} ({len(seeds)} seeds)"
