"""Everything that `nanochat doctor` found out, and its JSON. Imports no torch."""

import dataclasses
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nanochat.apps.doctor.packages import installed, missing, nvidia_gpu_present
from nanochat.apps.doctor.surroundings import Hub, Place, ask_hub, disk, wandb_account
from nanochat.common import base_dir, in_a_line

if TYPE_CHECKING:
    from nanochat.apps.doctor.machine import Machine


class Remark(NamedTuple):
    """Something that will be slow or cramped, why, and what to do about it."""

    what: str
    why: str
    remedy: str


@dataclass
class Facts:
    """missing: uninstalled packages that would be of use here. machine: None without a working
    torch, and torch_error then says what it raised. disk: of the caches and of the run folders.
    wandb: where a key is configured. needed: what keeps training from working. has_nvidia_gpu: as
    the system sees it."""

    python: str
    system: str
    packages: dict[str, str | None]
    missing: list[str]
    torch_error: str | None
    machine: "Machine | None"
    disk: dict[str, Place]
    dataset_hub: Hub
    wandb: str | None
    has_nvidia_gpu: bool
    needed: list[str] = field(default_factory=list)
    slow: list[Remark] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """What --json prints; nothing is rounded."""
        content = {
            "python": self.python,
            "system": self.system,
            "packages": self.packages,
            "torch_error": self.torch_error,
            "device": None,
            "missing": self.missing,
        }
        # Scripts can tell from `device` alone whether the keys of the machine are there. Its value
        # keeps its place when they are added.
        if self.machine is not None:
            content |= dataclasses.asdict(self.machine)
        return content | {
            "disk": {what: place._asdict() for what, place in self.disk.items()},
            "dataset_hub": self.dataset_hub._asdict(),
            "wandb": self.wandb,
            "needed": self.needed,
            "slow": [remark._asdict() for remark in self.slow],
        }


def gather(out_dir: str, quick: bool) -> Facts:
    """All facts but the conclusions from them (nanochat.apps.doctor.advice).

    out_dir: folder of run folders. quick: as for examine_machine()."""
    # Asked first, so that the answer travels while the machine is measured.
    hub = ask_hub()
    packages, has_nvidia_gpu = installed(), nvidia_gpu_present()
    machine = torch_error = None
    if packages["torch"] is not None:
        try:
            # Importing it imports torch, which fails first in a broken installation.
            from nanochat.apps.doctor.machine import examine_machine

            machine = examine_machine(quick)
        except Exception as error:
            # A broken installation can raise anything.
            torch_error = in_a_line(error)
    return Facts(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        packages=packages,
        missing=missing(packages, has_nvidia_gpu),
        torch_error=torch_error,
        machine=machine,
        disk={
            # Not created: a check changes nothing.
            "caches": disk(lambda: base_dir(make=False)),
            "runs": disk(lambda: Path(out_dir)),
        },
        dataset_hub=hub(),
        wandb=wandb_account(),
        has_nvidia_gpu=has_nvidia_gpu,
    )
