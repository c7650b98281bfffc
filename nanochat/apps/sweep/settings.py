"""What a sweep is asked for: its kind, its folder, the flags of every run, and the environment."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import UsageError
from nanochat.run.checks import MAX_DEPTH

# bytes of Python source need neither a download nor a tokenizer; 256 tokens are 8 rows of 32
TOY_FLAGS = [
    "--device-type=cpu",
    "--dtype=float32",
    "--no-compile",
    "--aspect-ratio=16",
    "--head-dim=16",
    "--max-seq-len=32",
    "--tokenizer=byte",
    "--total-batch-size=256",
    "--data=python",
    "--eval-tokens=2000",
    "--sample-every=-1",
]
# as --core-metric-every: after the last step only
AT_THE_END = 10**9
# train.py is next to the package, in a checkout as in site-packages
TRAIN_PY = Path(__file__).resolve().parents[3] / "train.py"


@dataclass(frozen=True)
class Settings:
    """One sweep.

    kind: one of KINDS. folder: parent of the run folders. given: the flags for every run that the
    user gave; common: these and those that the environment stands for. processes: of each run.
    retry: train failed runs again. predict: PREDICT, "" for none. pause: seconds between looks at
    runs that another process holds. train_py: the script that trains."""

    kind: str
    folder: Path
    given: list[str]
    common: list[str]
    processes: int = 1
    retry: bool = False
    predict: str = ""
    pause: float = 2.0
    train_py: Path = TRAIN_PY

    @classmethod
    def read(
        cls, kind: str, folder: str, given: list[str], environ: Mapping[str, str]
    ) -> "Settings":
        """From the command line and NPROC, RETRY, TOY, CORE_BUNDLE, PREDICT. UsageError for
        variables with other values than they take."""
        processes = environ.get("NPROC", "1")
        if not processes.isdigit() or processes == "0":
            raise UsageError(f"NPROC={processes}: give the number of processes of a run")
        for name in ("RETRY", "TOY"):
            if environ.get(name, "") not in ("", "0", "1"):
                raise UsageError(f"{name}={environ[name]}: give 1, or leave it out")
        common = list(TOY_FLAGS) if environ.get("TOY") == "1" else []
        if bundle := environ.get("CORE_BUNDLE", ""):
            common += [f"--core-bundle={bundle}", f"--core-metric-every={AT_THE_END}"]
        predict = environ.get("PREDICT", "")
        # refused now, not after hours of training
        if predict:
            is_depth(predict)
        return cls(
            kind=kind,
            folder=Path(folder),
            given=given,
            # what comes later on a command line wins
            common=[*common, *given],
            processes=int(processes),
            retry=environ.get("RETRY") == "1",
            predict=predict,
        )


def is_depth(wanted: str) -> bool:
    """Whether PREDICT names a depth; False for a budget in FLOPs. UsageError if it is neither.

    No model is deeper than MAX_DEPTH, and no budget is that small."""
    if wanted.isdigit() and 0 < int(wanted) <= MAX_DEPTH:
        return True
    try:
        # the text becomes the name of a folder
        if MAX_DEPTH < float(wanted) < math.inf and re.fullmatch(r"[\w.+-]+", wanted):
            return False
    except ValueError:
        pass
    raise UsageError(
        f"PREDICT={wanted}: neither a depth, such as 10, nor a budget in FLOPs, such as 2e13"
    )
