"""What saving costs at depth 4: the stall of a save against a plain copy of the same memory, and the steps beside which it is
written against the others. usage: python runs/save_cost.py [STEPS]     (600 steps of 2,048 tokens, a save every 50)"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from nanochat import hardware
from nanochat.model import gpt as models
from nanochat.optim import optimizer as optim
from nanochat.optim import schedules
from nanochat.run import checkpoint
from nanochat.run import log as runlog
from nanochat.run.plan import make_plan, model_config
from train import parse_args

n_steps, every = int(sys.argv[1]) if len(sys.argv) > 1 else 600, 50
hardware.prepare("cpu")
args = parse_args(
    ["--depth=4", "--max-seq-len=512", f"--num-iterations={n_steps}", "--total-batch-size=2048"]
)
config = model_config(args, vocab_size=4096)
plan = make_plan(args, config, 1e9, 1e12, 1)
model = models.build(config, torch.device("cpu"), torch.bfloat16, seed=1).train()
model.compile_parts()
optimizer = optim.Optimizer(model.parameter_groups(), plan.groups, torch.bfloat16)
ids = torch.randint(4096, (4, 513), generator=torch.Generator().manual_seed(1))
stalls, copies, beside, alone = [], [], [], []
with tempfile.TemporaryDirectory() as folder:
    saver = checkpoint.Saver(
        folder,
        1,
        print,
        [runlog.Metrics(Path(folder) / f"{name}.jsonl") for name in ("metrics", "samples")],
    )
    for step in range(n_steps):
        if step % every == 0 and step:
            tensors = [
                t
                for part in checkpoint._tensors(model, optimizer.state()).values()
                for t in part.values()
            ]
            targets = [torch.empty_like(t) for t in tensors]
            for _ in range(2):  # the first also finds the pages
                started = time.perf_counter()
                for target, tensor in zip(targets, tensors, strict=True):
                    target.copy_(tensor)
                copied = time.perf_counter() - started
            copies.append(copied)
            del targets
            started = time.perf_counter()
            saver.save(step, "permanent", model, optimizer.state(), {"tokenizer": "x"})
            stalls.append(time.perf_counter() - started)
        busy = saver.busy()
        started = time.perf_counter()
        optimizer.zero_grad()
        model(ids[:, :-1], ids[:, 1:], reduction="mean").backward()
        optimizer.reduce()
        optimizer.step(1.0, schedules.muon_momentum(step))
        if step > 20:
            (beside if busy else alone).append(time.perf_counter() - started)
    saver.wait()
state_bytes = sum(t.nbytes for t in tensors)
usual, extra = statistics.median(alone), sum(beside) - len(beside) * statistics.median(alone)
print(
    f"state {state_bytes / 1e6:.1f} MB, {len(stalls)} saves; first stall {1e3 * stalls[0]:.1f} ms (it also makes the copy's memory)"
)
print(
    f"stall {1e3 * statistics.median(stalls[1:]):.1f} ms (median; {1e3 * min(stalls[1:]):.1f} to {1e3 * max(stalls[1:]):.1f}), "
    f"copy {1e3 * statistics.median(copies):.1f} ms ({1e3 * min(copies):.1f} to {1e3 * max(copies):.1f}), ratio of medians "
    f"{statistics.median(stalls[1:]) / statistics.median(copies):.2f}"
)
print(
    f"step {1e3 * usual:.1f} ms (median of {len(alone)}), beside a save {1e3 * statistics.median(beside):.1f} ms ({len(beside)}); "
    f"cost of a save every {every} steps: {100 * (extra + sum(stalls[1:])) / (usual * n_steps):.2f}% of the time"
)
