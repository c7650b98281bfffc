"""`nanochat dpo RUN --data FILE ...`: teach a trained model which of two answers is preferred."""

from argparse import Namespace

from nanochat.run.exits import exit_code_of
from nanochat.signals import StopSignals

DESCRIPTION = (
    "Fine-tune the model of a run on preference pairs (JSON lines with prompt, chosen and "
    "rejected) by direct preference optimization, without a reward model (arXiv 2305.18290). The "
    "reference is RUN's own model: its log-probabilities are computed once and kept on disk. On "
    "several GPUs: torchrun --standalone --nproc_per_node=N -m -- nanochat dpo RUN ..."
)


def parse_args(argv: list[str]) -> Namespace:
    """The flags; see nanochat/run/tuning_flags.py."""
    from nanochat.run import tuning_flags

    return tuning_flags.parse("dpo", DESCRIPTION, flags(), argv)


def flags() -> dict[str, list]:
    """The flags of this command, by group."""
    from nanochat.run import tuning_flags
    from nanochat.run.flags import Flag, Range

    strict = Flag("strict", False, "refuse a file with a bad line instead of skipping the line")
    positive = Range(lambda v: v > 0, "must be above 0", "give a positive number")
    below_half = Range(lambda v: 0 <= v < 0.5, "must be from 0 to below 0.5", "give such a number")
    learning = [
        Flag(
            "beta",
            0.1,
            "how much the model may leave the reference: smaller leaves it more room",
            range=positive,
        ),
        Flag("loss", "sigmoid", "sigmoid, or ipo (arXiv 2310.12036)", choices=("sigmoid", "ipo")),
        Flag(
            "label_smoothing",
            0.0,
            "share of the pairs that is taken to be labelled the wrong way round (sigmoid)",
            range=below_half,
        ),
        tuning_flags.lr_frac(0.004),
    ]
    groups = tuning_flags.groups_of_flags([strict], learning)
    once = {"target_epochs": 1.0}
    # an early end looks at bits per byte, of which these pairs have none
    return {
        title: [
            tuning_flags.shared(row.name, once[row.name]) if row.name in once else row
            for row in rows
            if row.name != "patience"
        ]
        for title, rows in groups.items()
    }


def main(argv: list[str]) -> int:
    """Fine-tune; returns the exit code: 0 completed, 75 stopped on request and resumable, 1 failed,
    2 wrong usage or input."""

    def tune_as_asked(stop: StopSignals) -> int:
        args = parse_args(argv)
        # here, not above: it imports torch
        from nanochat.apps.dpo.run import tune

        return tune(args, stop)

    return exit_code_of(tune_as_asked, "nanochat dpo")
