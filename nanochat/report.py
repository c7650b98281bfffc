"""`nanochat report RUN`: a run's curves as a picture in its folder, and its summary in words. Only reads the run folder."""

import argparse
from pathlib import Path

from nanochat.common import UsageError, human_bytes, human_time, read_json
from nanochat.runlog import read_lines

SMOOTHING = 0.95  # weight of the past in the smoothed training loss


def main(argv):
    """Write RUN/loss.png and print the summary. Returns 0; UsageError if RUN is no run folder or has no steps."""
    parser = argparse.ArgumentParser(prog="nanochat report", description="Plot a run's curves into its folder.", allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="run folder: <out-dir>/<model-tag>")
    run = Path(parser.parse_args(argv).run)
    config, summary = read_json(run / "config.json", "run folder"), read_json(run / "summary.json", "run folder")
    lines = read_lines(run / "metrics.jsonl")
    path = plot_loss(run, config, lines)
    bpb = "none" if summary["val_bpb"] is None else f"{summary['val_bpb']:.4f} (best {summary['min_val_bpb']:.4f})"
    speed = f"{summary['tok_per_sec']:,.0f} tokens/s, {summary['mfu']:.1f}% MFU" if summary["tok_per_sec"] else "no steps yet"
    for name, value in {
        "status": summary["status"] + (f" ({summary['reason']})" if summary["reason"] else ""),
        "steps": f"{summary['step']} of {config['plan']['num_iterations']}, {summary['tokens']:,} tokens",
        "training time": f"{human_time(summary['total_training_time'])}, {speed}, peak memory {human_bytes(summary['peak_memory_bytes'])}",
        "val_bpb": bpb,
        "compressors on the same text": ", ".join(f"{k} {v:.3f}" for k, v in config["data"]["compressed_bpb"].items()),
        "plot": path,
    }.items():
        print(f"{name:<29} {value}")
    return 0


def plot_loss(run, config, lines):
    """Draw training loss and validation bits per byte against the step to RUN/loss.png. Returns its path."""
    train = [(line["step"], line["train/loss"]) for line in lines if line.get("train/loss") is not None]
    val = [(line["step"], line["val/bpb"]) for line in lines if line.get("val/bpb") is not None]
    if not train:
        raise UsageError(f"{run}/metrics.jsonl has no training step to plot yet")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    steps, losses = zip(*train, strict=True)
    smooth, value = [], 0.0
    for i, loss in enumerate(losses, 1):
        value = SMOOTHING * value + (1 - SMOOTHING) * loss
        smooth.append(value / (1 - SMOOTHING**i))  # the mean of what there is, not of an imagined past
    left.plot(steps, losses, color="#9db7d5", linewidth=0.7, label="each step")
    left.plot(steps, smooth, color="#1f4e8c", linewidth=1.6, label="smoothed")
    left.set(xlabel="step", ylabel="training loss, nats a token", title=f"{run.name}: training")
    left.legend(frameon=False)
    if val:
        right.plot(*zip(*val, strict=True), color="#b4541a", marker="o", markersize=3.5, linewidth=1.6, label="this run")
        right.annotate(f"{val[-1][1]:.3f}", val[-1], textcoords="offset points", xytext=(0, 12), ha="right", color="#b4541a")
        for (name, bpb), style in zip(config["data"]["compressed_bpb"].items(), ("--", ":"), strict=False):
            right.axhline(bpb, color="#777777", linestyle=style, linewidth=1, label=f"{name}: {bpb:.2f}")
        right.legend(frameon=False)
    right.set_xlim(left.get_xlim())
    right.set(xlabel="step", ylabel="bits per byte of held-out text", title=f"{run.name}: validation")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    path = run / "loss.png"
    figure.savefig(path, dpi=120)
    return path
