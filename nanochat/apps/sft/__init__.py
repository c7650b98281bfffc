"""`nanochat sft RUN --data FILE ...`: teach a trained model to answer."""

from argparse import Namespace

from nanochat.run.exits import exit_code_of
from nanochat.signals import StopSignals
from tasks.exercises import TASKS

DESCRIPTION = (
    "Fine-tune the model of a run on conversations (JSON lines with `messages`, or with prompt and "
    "answer). The loss counts the assistant's tokens alone. The new run folder is like any other: "
    "--resume continues it bit for bit, `nanochat sample --chat`, serve, evaluate, compare and "
    "export take it. On several GPUs: torchrun --standalone --nproc_per_node=N -m -- nanochat sft "
    "RUN ..."
)


def parse_args(argv: list[str]) -> Namespace:
    """The flags; see nanochat/run/tuning_flags.py."""
    from nanochat.run import tuning_flags

    return tuning_flags.parse("sft", DESCRIPTION, flags(), argv)


def flags() -> dict[str, list]:
    """The flags of this command, by group."""
    from nanochat.run import tuning_flags
    from nanochat.run.flags import AT_LEAST_1, Flag

    strict = Flag("strict", False, "refuse a file with a bad line instead of skipping the line")
    groups = tuning_flags.groups_of_flags([strict], [tuning_flags.lr_frac(0.3)])
    asked = Flag(
        "exercises",
        "",
        f"held-out exercises to ask at each evaluation: {', '.join(TASKS)}, separated by commas; "
        "`nanochat data exercises` writes those to learn from",
    )
    n = Flag("exercises_per_task", 100, "exercises to ask of each task", range=AT_LEAST_1)
    groups["evaluation"] += [asked, n]
    return groups


def main(argv: list[str]) -> int:
    """Fine-tune; returns the exit code: 0 completed, 75 stopped on request and resumable, 1 failed,
    2 wrong usage or input."""

    def tune_as_asked(stop: StopSignals) -> int:
        args = parse_args(argv)
        # here, not above: it imports torch
        from nanochat.apps.sft.run import tune

        return tune(args, stop)

    return exit_code_of(tune_as_asked, "nanochat sft")
