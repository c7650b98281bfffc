"""`nanochat bench`: how long each part of training takes on this machine, and what share that is of its matrix products' peak."""

import argparse
import contextlib
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nanochat.common import (
    EXIT_COMPLETED,
    UsageError,
    human_bytes,
    human_time,
    read_json,
    write_json,
)
from nanochat.data.tokenizer import MIN_BPE_VOCAB

PARTS = (
    "step",
    "forward",
    "backward",
    "optimizer",
    "attention",
    "loss",
    "data",
    "decode",
    "core",
    "start-up",
)
RATES = {
    "matrices": {"lr": 0.02, "beta2": 0.9, "weight_decay": 0.1}
}  # values do not change the speed
ADAMW = {"lr": 1e-4, "beta1": 0.8, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0}
TEXT_BYTES = 8 << 20  # of Python source, for the data path
DECODE_ROWS, DECODE_TOKENS = (1, 8), 32
START_UP_SECONDS = 900
CORE_EXAMPLES, CORE_LONGEST, CORE_REPEATS = (
    25,
    10,
    3,
)  # of each task, the longest of all among them; timings, at most
SETTINGS = (
    "arch",
    "depth",
    "aspect_ratio",
    "head_dim",
    "n_kv_head",
    "max_seq_len",
    "window_pattern",
    "short_window",
    "vocab_size",
    "device_batch_size",
    "activation_checkpointing",
    "fp8",
    "fp8_recipe",
)  # that make times comparable
NOT_IN_OLD_FILES = {
    "fp8": False,
    "fp8_recipe": "tensorwise",
}  # what was measured before there were these settings


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="nanochat bench",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Time the parts of training: median of several, with the fastest and the slowest.",
    )
    parser.add_argument(
        "--only", default="", help=f"parts, separated by commas, of {', '.join(PARTS)}; empty: all"
    )
    parser.add_argument("--repeats", type=int, default=7, help="timings of each part")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--out", default="", help="also write the JSON to this file")
    parser.add_argument(
        "--compare",
        default="",
        metavar="OTHER.json",
        help="results of an earlier run, to stand beside these",
    )
    parser.add_argument(
        "--core-bundle",
        default="",
        metavar="FOLDER",
        help="for core; empty: the cached one, if there is one",
    )
    group = parser.add_argument_group("as in train.py")
    group.add_argument("--device-type", default="", choices=["", "cuda", "mps", "cpu"])
    group.add_argument(
        "--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"]
    )
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument("--attention", default="auto")
    group.add_argument("--activation-checkpointing", action="store_true")
    group.add_argument("--fp8", action="store_true")
    group.add_argument("--fp8-recipe", default="tensorwise", choices=["tensorwise", "rowwise"])
    group.add_argument("--depth", type=int, default=4)
    group.add_argument("--aspect-ratio", type=int, default=64)
    group.add_argument("--head-dim", type=int, default=128)
    group.add_argument("--n-kv-head", type=int, default=-1)
    group.add_argument("--max-seq-len", type=int, default=512)
    group.add_argument("--window-pattern", default="SSSL")
    group.add_argument("--short-window", type=int, default=-1)
    group.add_argument("--arch", default="speedrun", choices=["speedrun", "llama"])
    group.add_argument("--vocab-size", type=int, default=4096)
    group.add_argument("--device-batch-size", type=int, default=16)
    args = parser.parse_args(argv)
    args.tie_embeddings, args.dropout = False, 0.0
    args.only = args.only.split(",") if args.only else list(PARTS)
    if unknown := set(args.only) - set(PARTS):
        raise UsageError(
            f"--only={','.join(sorted(unknown))}: no such part; choose of {', '.join(PARTS)}"
        )
    if args.core_bundle and "core" not in args.only:
        raise UsageError(
            f"--core-bundle={args.core_bundle}: core is not among --only; add it there, or leave this out"
        )
    if args.json and args.compare:
        raise UsageError(
            f"--compare={args.compare}: belongs to the table; leave --json out, or write the JSON with --out"
        )
    if args.fp8_recipe != "tensorwise" and not args.fp8:
        raise UsageError(
            f"--fp8-recipe={args.fp8_recipe}: belongs to --fp8; add that, or leave it out"
        )
    if args.n_kv_head < 1 and args.n_kv_head != -1:
        raise UsageError(
            f"--n-kv-head={args.n_kv_head}: must be at least 1, or -1 for as many as query heads; give one of these"
        )
    if args.out and (
        os.path.isdir(args.out) or not os.path.isdir(os.path.dirname(os.path.abspath(args.out)))
    ):
        raise UsageError(f"--out={args.out}: a folder, or in no folder that there is; name a file")
    if args.vocab_size < MIN_BPE_VOCAB and {"data", "core", "start-up"} & set(args.only):
        raise UsageError(
            f"--vocab-size={args.vocab_size}: too small for a tokenizer; give at least {MIN_BPE_VOCAB}, or leave data, core "
            f"and start-up out with --only"
        )
    for name in (
        "repeats",
        "depth",
        "aspect_ratio",
        "head_dim",
        "max_seq_len",
        "vocab_size",
        "device_batch_size",
    ):
        if getattr(args, name) < 1:
            raise UsageError(
                f"--{name.replace('_', '-')}={getattr(args, name)}: must be at least 1; give a positive number"
            )
    return args


def main(argv):
    """Measure, print a table or JSON. Returns 0; UsageError for flags that name no model, or an unreadable --compare."""
    args = parse_args(argv)
    other, settings_of_other = read_results(args.compare) if args.compare else (None, None)
    say = (lambda text: None) if args.json else (lambda text: print(text, flush=True))
    bench, settings = make_bench(args, say)
    say(bench.describe())
    if other is not None and (
        differ := [
            name
            for name in settings
            if settings[name] != settings_of_other.get(name, NOT_IN_OLD_FILES.get(name))
        ]
    ):
        say(
            "the earlier run is no measure of this one where it had other settings: "
            + ", ".join(
                f"{name} {settings_of_other.get(name, NOT_IN_OLD_FILES.get(name))} (now {settings[name]})"
                for name in differ
            )
        )
    for part in args.only:
        for entry in getattr(bench, "part_" + part.replace("-", "_"))():
            bench.results.append(entry)
            say(line(entry, bench.peak, other))
    results = bench.as_json(settings)
    if args.out:
        write_json(Path(args.out), results)
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        say(
            f"peak of matrix products in {settings['dtype']}: {bench.peak / 1e12:.3g} TFLOP/s, the better of before and "
            f"after; shares above are of what was measured before"
        )
    return EXIT_COMPLETED


def make_bench(args, say):
    """(a Bench for these flags, the settings that make its times comparable). Raises UsageError for flags that name no model."""
    os.environ.setdefault(
        "TORCH_CPP_LOG_LEVEL", "ERROR"
    )  # the profiler, which counts memory, says that it is one
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    import torch

    from nanochat import hardware
    from nanochat.eval import core
    from nanochat.model import attention, fp8
    from nanochat.model.gpt import meta_model
    from nanochat.run import plan

    if args.attention not in ("auto", *attention.BACKENDS):
        raise UsageError(
            f"--attention={args.attention}: unknown backend; choose auto, {' or '.join(attention.BACKENDS)}"
        )
    device_type = hardware.pick_device_type(args.device_type)
    hardware.prepare(device_type)
    device = torch.device(device_type)
    dtype, _ = hardware.pick_dtype(args.dtype, device_type, training=True)
    try:
        config = plan.model_config(args, args.vocab_size)
    except ValueError as error:
        raise UsageError(f"these flags describe no model: {error}") from error
    no_compiler = hardware.compiler_missing(device_type) if args.compile else "--no-compile"
    backend, _ = attention.pick_backend(
        args.attention, device_type, dtype, args.head_dim, no_compiler=no_compiler
    )
    if args.fp8:
        fp8.require(meta_model(config), device_type, dtype, no_compiler)
    bundle = None
    if "core" in args.only:
        bundle = core.find_bundle(args.core_bundle, say, download=args.only == ["core"])
        if bundle is None:
            say(
                "core: left out, as its bundle is not here; --core-bundle names one, --only=core downloads it"
            )
    settings = {
        "dtype": str(dtype).removeprefix("torch."),
        "attention": backend,
        "compiled": not no_compiler,
        **{name: getattr(args, name) for name in SETTINGS},
    }
    return Bench(args, config, device, dtype, backend, not no_compiler, bundle), settings


def read_results(path):
    """({name: result}, settings) of an earlier run's JSON. Raises UsageError."""
    content = read_json(Path(path), "results of nanochat bench")
    try:
        return {
            entry["name"]: entry for entry in content["results"] if 1 / entry["seconds"] > 0
        }, dict(content["settings"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UsageError(
            f"--compare={path}: not the JSON that nanochat bench writes; give a file from --out"
        ) from error


def summary(entry, peak):
    """An entry with its derived numbers, for JSON."""
    seconds = statistics.median(entry["seconds"])
    rate = lambda value: None if value is None else value / seconds
    flops = rate(entry["flops"])
    return {
        "name": entry["name"],
        "n": len(entry["seconds"]),
        "seconds": seconds,
        "fastest": min(entry["seconds"]),
        "slowest": max(entry["seconds"]),
        "tokens_per_sec": rate(entry["tokens"]),
        "flops_per_sec": flops,
        "share_of_peak": None if flops is None else flops / peak,
        "peak_memory_bytes": entry["memory"],
        "note": entry["note"],
    }


def short_time(seconds):
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def line(entry, peak, other):
    """An entry as a line of the table; other: {name: result} of an earlier run, or None."""
    result = summary(entry, peak)
    cells = [
        f"{result['name']:<28}",
        f"{short_time(result['seconds']):>8}",
        f"({short_time(result['fastest'])} to {short_time(result['slowest'])}, n = {result['n']})".ljust(
            32
        ),
        f"{result['tokens_per_sec']:>12,.0f} tokens/s" if result["tokens_per_sec"] else " " * 21,
        f"{result['flops_per_sec'] / 1e12:>7.3f} TFLOP/s {result['share_of_peak']:>4.0%}"
        if result["flops_per_sec"]
        else " " * 20,
        f"{human_bytes(result['peak_memory_bytes']):>10}"
        if result["peak_memory_bytes"]
        else " " * 10,
        result["note"],
    ]
    if other is not None:
        was = other.get(result["name"])
        cells.append(
            f"{was['seconds'] / result['seconds']:.2f} times as fast as before"
            if was
            else "not measured before"
        )
    return "  ".join(cells).rstrip()


def timed(function, device, repeats, before=lambda: None):
    """Seconds of each of so many calls of function(), after one that warms up. before() is not timed."""
    from nanochat import hardware

    seconds = []
    for _ in range(repeats + 1):
        before()
        hardware.synchronize(device.type)
        started = time.perf_counter()
        function()
        hardware.synchronize(device.type)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


class Bench:
    """A model on a device, and a method for each part, which yields entries: name, tokens, flops (or None), seconds of each
    repetition, memory (peak bytes above what was there before, or None), note."""

    def __init__(self, args, config, device, dtype, backend, compiled, core_bundle=None):
        import torch

        from nanochat import hardware
        from nanochat.model import fp8
        from nanochat.model import gpt as models
        from nanochat.optim import optimizer as optim

        self.args, self.config, self.device, self.dtype, self.backend, self.compiled = (
            args,
            config,
            device,
            dtype,
            backend,
            compiled,
        )
        self.core_bundle, self.results, self.peak = (
            core_bundle,
            [],
            hardware.measured_peak(device, dtype),
        )
        model = models.meta_model(config)
        self.flops_per_token = model.flops_per_token()
        self.head_flops = (
            6 * config.width * config.vocab_size
        )  # of the head's three products a token
        if not {"step", "forward", "backward", "optimizer", "decode", "core"} & set(args.only):
            return
        self.model = models.build(config, device, dtype, backend, seed=1).train()
        self.model.checkpointing = args.activation_checkpointing
        if args.fp8:
            fp8.convert(self.model, args.fp8_recipe)
        if compiled:
            self.model.compile_parts()
        groups = self.model.parameter_groups()
        self.optimizer = optim.Optimizer(
            groups,
            {name: RATES.get(name, ADAMW) for name in groups},
            torch.float32 if dtype == torch.float16 else dtype,
        )
        ids = torch.randint(
            config.vocab_size,
            (args.device_batch_size, config.max_seq_len + 1),
            generator=torch.Generator().manual_seed(1),
        ).to(device)
        self.inputs, self.targets = ids[:, :-1], ids[:, 1:]
        self.tokens = self.inputs.numel()
        started = time.perf_counter()
        for _ in range(2):
            self._step()
        hardware.synchronize(device.type)
        self.warm_up_seconds = time.perf_counter() - started

    def describe(self):
        """What is measured, in a line or two."""
        config, args = self.config, self.args
        text = (
            f"{config.arch}, depth {config.depth}, {config.width} wide, context {config.max_seq_len}, vocabulary "
            f"{config.vocab_size:,}, {args.device_batch_size} rows; {self.device.type}, {str(self.dtype).removeprefix('torch.')}, "
            f"attention {self.backend}, "
            f"{'compiled' if self.compiled else 'eager'}; matrix products {self.peak / 1e12:.3g} TFLOP/s"
        )
        return text + (
            f"\nfirst two steps (compilation): {human_time(self.warm_up_seconds)}"
            if hasattr(self, "model")
            else ""
        )

    def as_json(self, settings):
        """All that was measured, with what it was measured on; the peak is measured again, since others may have used the machine."""
        from nanochat import hardware

        self.peak = max(self.peak, hardware.measured_peak(self.device, self.dtype))
        return {
            "settings": settings,
            "hardware": hardware.describe(self.device),
            "peak_flops": self.peak,
            "flops_per_token": self.flops_per_token,
            "results": [summary(entry, self.peak) for entry in self.results],
        }

    def _timed(self, function, before=lambda: None):
        """Seconds of each repetition of function(), and its peak memory. before() is not timed."""
        from nanochat import hardware

        seconds = timed(function, self.device, self.args.repeats, before)
        before()
        return {"seconds": seconds, "memory": hardware.allocated_peak(function, self.device)}

    def _entry(self, name, measured, tokens=None, flops=None, note=""):
        return {"name": name, "tokens": tokens, "flops": flops, "note": note, **measured}

    def _loss(self):
        return self.model(self.inputs, self.targets, reduction="mean")

    def _step(self):
        self.optimizer.zero_grad()
        self._loss().backward()
        self._update()

    def _update(self):
        self.optimizer.reduce()
        self.optimizer.step(1.0, 0.95)

    def part_step(self):
        yield self._entry(
            "step",
            self._timed(self._step, self.optimizer.zero_grad),
            self.tokens,
            self.flops_per_token * self.tokens,
        )

    def part_forward(self):
        flops = (
            self.flops_per_token + 2 * self.head_flops
        ) / 3  # the gradients of the head's products are made here
        yield self._entry(
            "forward",
            self._timed(self._loss),
            self.tokens,
            flops * self.tokens,
            "with the head's gradients",
        )

    def part_backward(self):
        kept = []

        def before():
            kept[:] = [self._loss()]
            self.optimizer.zero_grad()

        yield self._entry(
            "backward",
            self._timed(lambda: kept.pop().backward(), before),
            self.tokens,
            2 / 3 * (self.flops_per_token - self.head_flops) * self.tokens,
        )

    def part_optimizer(self):
        from nanochat.optim import optimizer as optim

        self.optimizer.zero_grad()
        self._loss().backward()
        gradients = [p.grad for p in self.optimizer.parameters]

        def before():
            for parameter, gradient in zip(self.optimizer.parameters, gradients, strict=True):
                parameter.grad = gradient

        yield self._entry("optimizer", self._timed(self._update, before), flops=self._muon_flops())
        if self.device.type == "cuda":  # where it may be chosen
            was, optim.SYMMETRIC_KERNEL = optim.SYMMETRIC_KERNEL, not optim.SYMMETRIC_KERNEL
            try:
                measured = self._timed(self._update, before)
            finally:
                optim.SYMMETRIC_KERNEL = was
            yield self._entry(
                f"optimizer, {'plain products' if was else 'symmetric kernel'}",
                measured,
                flops=self._muon_flops(),
            )

    def _muon_flops(self):
        """Of the products of orthogonalisation: three in each of its iterations."""
        from nanochat.optim.optimizer import POLAR_EXPRESS

        shapes = [sorted(p.shape) for p in self.model.parameter_groups()["matrices"].values()]
        return len(POLAR_EXPRESS) * sum(
            2 * small * small * (2 * large + small) for small, large in shapes
        )

    def part_attention(self):
        for window in self.windows():
            for name, function in self.attention_ways().items():
                yield self.attention_entry(name, window, function)

    def attention_ways(self):
        """{name: function(q, k, v, window=...)} of the backends that run here, and of plain PyTorch."""
        import torch

        from nanochat.model.attention import attention, usable_backends

        function = torch.compile(attention, dynamic=False) if self.compiled else attention
        backends = usable_backends(
            self.device.type,
            dtype=self.dtype,
            head_dim=self.config.head_dim,
            no_compiler=None if self.compiled else "--no-compile",
        )
        # blocked is made for CPUs: for a GPU every block of queries would be compiled for itself
        ways = {
            f"attention {name}": functools.partial(function, backend=name)
            for name in backends
            if name != "blocked" or self.device.type != "cuda"
        }
        return {**ways, "attention, plain PyTorch": plain_attention}

    def windows(self):
        """The windows of the model's layers, none larger than the context."""
        return sorted({min(window, self.config.max_seq_len) for window in self.config.windows()})

    def attention_entry(self, name, window, function):
        """The entry of function(q, k, v, window=...), forward and backward, on tensors of the model's shape."""
        import torch

        config, rows, T = self.config, self.args.device_batch_size, self.config.max_seq_len
        generator = torch.Generator().manual_seed(2)
        q, k, v, upstream = (
            torch.randn(rows, T, heads, config.head_dim, generator=generator)
            .to(self.device, self.dtype)
            .requires_grad_()
            for heads in (config.n_head, config.n_kv_head, config.n_kv_head, config.n_head)
        )

        def before():
            q.grad = k.grad = v.grad = None

        return self._entry(
            f"{name}, window {window}",
            self._timed(lambda: function(q, k, v, window=window).backward(upstream), before),
            rows * T,
            12 * config.n_head * config.head_dim * window * rows * T,
            "forward and backward",
        )

    def part_loss(self):
        from nanochat.model.loss import pick_loss

        yield self.loss_entry("loss", pick_loss(self.device.type, self.compiled)[0])
        yield self.loss_entry("loss, plain PyTorch", None)

    def loss_entry(self, name, backend):
        """The entry of the head's loss with its gradients. backend: of nanochat.loss; None: plain PyTorch, all logits at once."""
        import torch
        import torch.nn.functional as F

        from nanochat.model.loss import linear_cross_entropy

        V, C, N = (
            self.config.vocab_size,
            self.config.width,
            self.args.device_batch_size * self.config.max_seq_len,
        )
        generator = torch.Generator().manual_seed(3)
        hidden = torch.randn(N, C, generator=generator).to(self.device, self.dtype).requires_grad_()
        weight = (torch.randn(V, C, generator=generator) * C**-0.5).to(self.device).requires_grad_()
        targets = torch.randint(V, (N,), generator=generator).to(self.device)

        def both():
            if backend:
                linear_cross_entropy(hidden, weight, targets, 15.0, backend=backend).backward()
            else:
                logits = F.linear(hidden, weight.to(hidden.dtype)).float()
                F.cross_entropy(15 * torch.tanh(logits / 15), targets).backward()

        def before():
            hidden.grad = weight.grad = None

        measured = self._timed(both, before)
        if measured["memory"] is not None:
            measured["memory"] -= hidden.nbytes + weight.nbytes
        return self._entry(
            name,
            measured,
            N,
            self.head_flops * N,
            "forward and backward; memory beyond the gradients",
        )

    def part_data(self):
        from nanochat.data import rows as data
        from nanochat.data import sources as corpora

        T, rows = self.config.max_seq_len, self.args.device_batch_size
        with throw_away_base_dir() as folder:
            corpus = corpora.open_corpus(str(python_text(folder)))
            tokenizer = data.fit_tokenizer(corpus, "bpe", max(self.config.vocab_size, 300))
            seconds = []
            for _ in range(self.args.repeats):
                cache = data.TokenCache(tokenizer, os.cpu_count())
                started = time.perf_counter()
                tokens = cache.length(corpus.train[0])
                seconds.append(time.perf_counter() - started)
                cache.path(corpus.train[0]).unlink()
            yield self._entry(
                "tokenize",
                {"seconds": seconds, "memory": None},
                tokens,
                note="and write to the cache",
            )
            reader, numbers = (
                data.Rows(corpus, data.TokenCache(tokenizer, os.cpu_count()), T, 1),
                iter(range(10**9)),
            )
            yield self._entry(
                "rows",
                {
                    **self._timed(lambda: reader.batch(next(numbers), rows, 0, rows, 0, 1)),
                    "memory": None,
                },
                rows * T,
            )

    def part_decode(self):
        from nanochat.eval import generation as engine

        for rows in DECODE_ROWS:
            prompt = self.inputs[0, : self.config.max_seq_len // 2].tolist()

            def run():
                for _ in engine.generate_ids(self.model, prompt, DECODE_TOKENS, num_samples=rows):
                    pass

            self.model.eval()
            yield self._entry(
                f"decode, {rows} samples",
                self._timed(run),
                rows * DECODE_TOKENS,
                note=f"after {len(prompt)} of a prompt",
            )
            self.model.train()

    def part_core(self):
        """Answers to CORE prompts: ours, and one example at a time with its choices in a batch and the logits of all its tokens."""
        import torch
        import torch.nn.functional as F

        from nanochat import hardware
        from nanochat.data import rows as data
        from nanochat.data import sources as corpora
        from nanochat.eval import core
        from nanochat.model import gpt as models
        from tasks.core import prompts_of, read_bundle, read_examples

        folder = self.core_bundle
        if folder is None:
            return
        with throw_away_base_dir() as base:
            tokenizer = data.fit_tokenizer(
                corpora.open_corpus(str(python_text(base))), "bpe", self.config.vocab_size
            )
        (tasks, _, _), limit = read_bundle(folder), core.len_limit(self.config)
        prompts = {}
        for label, task in tasks.items():
            examples, _, _ = read_examples(task)
            indices = longest_and_others(task, examples)
            prompts[label] = prompts_of(task, examples, tokenizer, limit, indices)

        def naive():
            for of_task in prompts.values():
                for prompt in of_task:
                    longest = max(map(len, prompt.rows))
                    ids = core.padded(prompt.rows).to(self.device)
                    logits = self.model(ids)
                    nats = F.cross_entropy(
                        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
                    ).view(-1, longest - 1)
                    hits = logits.argmax(-1)[:, :-1] == ids[:, 1:]
                    for row, start, of_row, hits_of_row in zip(
                        prompt.rows, prompt.starts, nats, hits, strict=True
                    ):
                        of_row[start - 1 : len(row) - 1].mean().item()
                        hits_of_row[start - 1 : len(row) - 1].all().item()

        def ours():
            model = models.for_inference(self.model)
            for label, of_task in prompts.items():
                for batch in core.batches(of_task, core.BATCH_TOKENS[self.device.type]):
                    core.answers_of(model, batch, tasks[label].kind, self.device)

        seconds = {naive: [], ours: []}
        self.model.eval()
        with torch.no_grad():
            for repetition in range(min(self.args.repeats, CORE_REPEATS) + 1):  # the first warms up
                for function, times in seconds.items():
                    started = time.perf_counter()
                    function()
                    hardware.synchronize(self.device.type)
                    times += [time.perf_counter() - started] if repetition else []
        self.model.train()
        n_tokens = sum(
            len(row) for of_task in prompts.values() for prompt in of_task for row in prompt.rows
        )
        ratio = statistics.median(seconds[naive]) / statistics.median(seconds[ours])
        n_prompts = sum(map(len, prompts.values()))
        yield self._entry(
            "core, naive",
            {"seconds": seconds[naive], "memory": None},
            n_tokens,
            note=f"{n_prompts} prompts one by one",
        )
        yield self._entry(
            "core",
            {"seconds": seconds[ours], "memory": None},
            n_tokens,
            note=f"{ratio:.1f} times as fast as naive",
        )

    def part_start_up(self):
        """`train.py --help`, and one training step from nothing, with an empty and then with a filled cache of kernels."""
        args = self.args
        flags = [
            f"--{name.replace('_', '-')}={getattr(args, name)}"
            for name in (
                "depth",
                "aspect_ratio",
                "head_dim",
                "n_kv_head",
                "max_seq_len",
                "arch",
                "vocab_size",
                "device_batch_size",
                "dtype",
                "attention",
            )
        ]
        flags += (
            []
            if args.arch == "llama"
            else [f"--window-pattern={args.window_pattern}", f"--short-window={args.short_window}"]
        )
        flags += ["--activation-checkpointing"] * args.activation_checkpointing + [
            "--no-compile"
        ] * (not args.compile)
        flags += ["--fp8", f"--fp8-recipe={args.fp8_recipe}"] * args.fp8
        flags += [
            f"--total-batch-size={args.device_batch_size * args.max_seq_len}",
            f"--device-type={self.device.type}",
        ]
        flags += [
            "--num-iterations=1",
            "--eval-every=-1",
            "--sample-every=-1",
            "--no-save",
            "--overwrite",
        ]
        with throw_away_base_dir() as folder:
            text = python_text(folder)
            help_seconds = [self._process(["--help"], folder) for _ in range(3)]
            yield self._entry("start-up, --help", {"seconds": help_seconds, "memory": None})
            for name, n in (("start-up, first step, cold", 1), ("start-up, first step, warm", 2)):
                seconds = [
                    self._process([f"--data={text}", f"--out-dir={folder}", *flags], folder)
                    for _ in range(n)
                ]
                yield self._entry(
                    name,
                    {"seconds": seconds, "memory": None},
                    note="from the command to the end of step 1",
                )

    def _process(self, flags, folder):
        """Seconds that train.py takes with these flags. Raises UsageError with its last line if it fails."""
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "kernels")}
        started = time.perf_counter()
        process = subprocess.run(
            [sys.executable, "-m", "train", *flags],
            env=environment,
            capture_output=True,
            text=True,
            timeout=START_UP_SECONDS,
        )
        if process.returncode:
            raise UsageError(
                f"start-up: train.py ended with exit code {process.returncode}: "
                f"{(process.stderr.strip().splitlines() or ['no message'])[-1]}; leave it out with --only"
            )
        return time.perf_counter() - started


def plain_attention(q, k, v, window):
    """nanochat.model.attention.attention() as plain PyTorch: all scores at once."""
    from nanochat.model.attention import visible

    (T, H, D), S = q.shape[1:], k.size(1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(H // x.size(1), dim=1) for x in (k, v))
    scores = (
        (q @ k.mT * D**-0.5).float().masked_fill(~visible(T, S, window, q.device), float("-inf"))
    )
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def longest_and_others(task, examples):
    """Places of CORE_EXAMPLES examples of a CORE task: of the longest prompts, by characters, and of others of all lengths."""
    from tasks.core import shots_of

    sizes = [len(json.dumps(example)) for example in examples]
    sizes = [
        size + sum(sizes[shot] for shot in shots_of(task, i, len(sizes)))
        for i, size in enumerate(sizes)
    ]
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    others = order[CORE_LONGEST:]
    n_others = CORE_EXAMPLES - CORE_LONGEST
    return order[:CORE_LONGEST] + [
        others[i * len(others) // n_others]
        for i in range(n_others if len(others) >= n_others else 0)
    ]


@contextlib.contextmanager
def throw_away_base_dir():
    """A temporary folder that is the base folder meanwhile."""
    before = os.environ.get("NANOCHAT_BASE_DIR")
    with tempfile.TemporaryDirectory(prefix="nanochat-bench-") as folder:
        os.environ["NANOCHAT_BASE_DIR"] = folder
        try:
            yield Path(folder)
        finally:
            gc.collect()  # memory maps of token files
            os.environ.pop("NANOCHAT_BASE_DIR")
            os.environ.update({"NANOCHAT_BASE_DIR": before} if before is not None else {})


def python_text(folder):
    """A file with about TEXT_BYTES of the Python standard library's source, one document a file."""
    texts, size = [], 0
    for path in sorted(Path(os.__file__).parent.glob("*.py")) + sorted(
        Path(os.__file__).parent.glob("*/*.py")
    ):
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
        size += len(texts[-1])
        if size >= TEXT_BYTES:
            break
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    return folder / "text.txt"
