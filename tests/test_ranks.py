"""Two gloo processes against one: the optimizer on half a batch each, its state across world
sizes, and ranks.py.

Run as a script, with the environment that torchrun sets, this file is the worker:
python test_ranks.py FOLDER. One launch serves all tests: importing torch twice is most of their
time."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ports import free_port

from nanochat import ranks
from nanochat.common import Unavailable, UsageError
from nanochat.model.build import build
from nanochat.model.config import GPTConfig
from nanochat.model.kernels import cpu_muon
from nanochat.optim.loss_scaler import LossScaler
from nanochat.optim.optimizer import Optimizer
from nanochat.optim.sharding import build_sharded, own_part
from nanochat.ranks import Agreed
from nanochat.signals import Stopped, StopSignals

WORLD = 2
TIMEOUT_SECONDS = 120
STEPS = 10
HALFWAY = 5
# Parts whose exchange had begun after each backward pass.
BEGUN = []
# Odd on purpose: 3 layers give stacks of 3 matrices, a width of 33 and a vocabulary of 61 tables of
# 2,013 elements.
CONFIG = GPTConfig(
    depth=3,
    width=33,
    head_dim=8,
    n_head=2,
    n_kv_head=1,
    vocab_size=61,
    max_seq_len=16,
    window_pattern="SL",
    short_window=5,
)
ADAMW = {"lr": 0.003, "beta1": 0.8, "beta2": 0.95, "eps": 1e-10, "weight_decay": 0.01}
MUON = {"lr": 0.02, "beta2": 0.9, "weight_decay": 0.05}
# native: Muon between its products in C++
MATRICES = {"muon": MUON, "adamw": ADAMW, "native": MUON}


def usable():
    """The keys of MATRICES that run here."""
    return [kind for kind in MATRICES if kind != "native" or not cpu_muon.problem()]


def settings_for(kind):
    # a tiny eps would turn the rounding noise of lambdas with near-zero gradients into full-size
    # steps
    return {
        "matrices": MATRICES[kind],
        "embedding": ADAMW,
        "value_embeddings": ADAMW,
        "unembedding": ADAMW,
        "scalars": ADAMW | {"eps": 1e-6},
    }


def start(kind):
    """(model, optimizer) with noise on every weight, so that no gradient is zero for being
    multiplied by zero."""
    model = build(CONFIG, "cpu", seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    settings = settings_for(kind)
    return model, Optimizer(model.parameter_groups(), settings, torch.float32, kind == "native")


def train(model, optimizer, steps, early=False):
    """Train on this rank's rows of each batch of 4; returns (losses, gradient norms). Clipping acts
    in every step.

    early: gradients travel while others are computed, but on rank 1 in step 2, which as after a
    failure to read has none at first."""
    rows = 4 // ranks.world_size()
    mine = slice(ranks.rank() * rows, (ranks.rank() + 1) * rows)
    losses = []
    norms = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(CONFIG.vocab_size, (4, 14), generator=generator)[mine]
        optimizer.zero_grad()
        late = step == 2 and ranks.rank() == 1
        # in two passes, of which the second is the last
        for micro in range(2):
            optimizer.early = early and micro == 1 and not late
            loss = model(ids[:, :-1], ids[:, 1:]).mean()
            (loss / 2).backward()
            BEGUN.append(optimizer.begun)
        mean_loss, norm = optimizer.reduce(loss.detach(), LossScaler(enabled=False))
        optimizer.clip(norm, 0.3)
        optimizer.step(lr_multiplier=1 - step / (2 * STEPS), mu=0.85 + 0.01 * step)
        losses.append(mean_loss)
        norms.append(norm)
    return losses, norms


def snapshot(model, optimizer):
    """Copies: with one process state() hands out the live tensors."""
    return {
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "state": {
            name: {key: tensor.clone() for key, tensor in tensors.items()}
            for name, tensors in optimizer.state().items()
        },
    }


def whole_run(kind, early=False):
    """All steps from the start, with a snapshot halfway and one at the end."""
    model, optimizer = start(kind)
    BEGUN.clear()
    losses, norms = train(model, optimizer, range(HALFWAY), early)
    halfway = snapshot(model, optimizer)
    more_losses, more_norms = train(model, optimizer, range(HALFWAY, STEPS), early)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        "losses": losses + more_losses,
        "norms": norms + more_norms,
        "halfway": halfway,
        "end": snapshot(model, optimizer),
        "begun": list(BEGUN),
        "order": [names[part.parameters[0]] for part in optimizer.order],
    }


def sharded_run(kind):
    """What this rank holds of a sharded model (--shard) after all steps, by name."""
    model = build_sharded(CONFIG, torch.device("cpu"), torch.float32, "blocked", seed=3).train()
    groups = model.parameter_groups()
    train(
        model, Optimizer(groups, settings_for(kind), torch.float32, kind == "native"), range(STEPS)
    )
    return {name: own_part(p).detach().clone() for name, p in model.named_parameters()}


def resumed_run(kind, halfway):
    """The second half, from a snapshot of any world size."""
    model, optimizer = start(kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(halfway["weights"][name])
    optimizer.load(halfway["state"])
    train(model, optimizer, range(HALFWAY, STEPS))
    return snapshot(model, optimizer)


def what_is_agreed(device, **mine):
    """What ranks.agree() returns, or "stopped"."""
    try:
        return ranks.agree(device, **mine)
    except Stopped:
        return "stopped"


def agreements(device, me):
    """Outcomes of exchanges before a step, one per case."""
    agree = partial(what_is_agreed, device)
    quiet = {"stop": False, "no_data": "", "save": False, "steps": None}
    mine = partial(dict, quiet)
    return {
        "nothing": agree(**quiet),
        "rank 1 is asked to stop": agree(**mine(stop=me == 1)),
        "rank 1 has no data": agree(**mine(no_data="gone" if me == 1 else "")),
        "one stops, the other has no data": agree(
            **mine(stop=me == 0, no_data="gone" if me == 1 else "")
        ),
        "rank 1 waits for its data": agree(**mine(waits=me == 1)),
        "by rank 0's clock": agree(**mine(save=me == 0, steps=10**15 + 1 if me == 0 else 7)),
        "by rank 1's clock": agree(**mine(save=me == 1, steps=7 if me == 1 else None)),
        "orders to rank 0": agree(
            **mine(orders=[{"verb": "save"}, {"verb": "pause"}] if me == 0 else [])
        ),
        "orders to rank 0 as rank 1 stops": agree(
            **mine(orders=[{"verb": "save"}] if me == 0 else [], stop=me == 1)
        ),
        "orders to rank 1": agree(**mine(orders=[{"verb": "save"}] if me == 1 else [])),
    }


def worker(folder):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    device = ranks.setup("cpu")
    me = ranks.rank()
    facts = {
        "device": str(device),
        "rank": me,
        "world_size": ranks.world_size(),
        "sum": ranks.sum_over_ranks(torch.tensor([1.0, me])).tolist(),
        "from_rank0": ranks.from_rank0({"rank": me, "path": folder}),
        "from_all": ranks.from_all(f"rank {me}"),
        "agreed": agreements(device, me),
    }
    ranks.print0("one line")
    results = {"facts": facts}
    for kind in usable():
        results[kind] = whole_run(kind)
        results[f"{kind}, early"] = whole_run(kind, early=True)
        single = torch.load(folder / f"single_{kind}.pt")
        results[kind]["resumed_from_single"] = resumed_run(kind, single["halfway"])
    results["sharded"] = {kind: sharded_run(kind) for kind in usable()}
    torch.save(results, folder / f"rank{me}.pt")
    leave_an_exchange(folder, me)


def leave_an_exchange(folder, me):
    """A signal ends the wait of rank 1 for rank 0, which takes part only after that, or never."""
    store = dist.distributed_c10d._get_default_store()
    if me == 0:
        store.wait(["left"])
        return
    StopSignals(speaks=False)
    # rank 0 waits for what comes after it, so it arrives in the exchange, if not before
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        ranks.from_rank0(None)
    except Stopped:
        (folder / "left").touch()
        store.set("left", "by a signal")


def launch(folder):
    """Run the workers and return what each printed.

    The store they meet at lives here, as with torchrun: no port can be lost between choosing it and
    using it. A worker that hangs or fails takes the other one with it."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    root = Path(__file__).resolve().parents[1]
    common = {
        "WORLD_SIZE": str(WORLD),
        "LOCAL_WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    logs = [(folder / f"rank{rank}.out", folder / f"rank{rank}.err") for rank in range(WORLD)]
    workers = []
    try:
        for rank, (out, err) in enumerate(logs):
            env = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, __file__, str(folder)]
            # not pipes: a full one would stall its worker
            with open(out, "w") as stdout, open(err, "w") as stderr:
                process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=env)
            workers.append(process)
        deadline = time.monotonic() + TIMEOUT_SECONDS
        codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in workers]
    except subprocess.TimeoutExpired:
        codes = [process.poll() for process in workers]
    finally:
        for process in workers:
            process.kill()
            process.wait()
    errors = "\n".join(err.read_text() for _, err in logs)
    assert codes == [0] * WORLD, f"exit codes {codes} (None: hung)\n{errors}"
    return [out.read_text() for out, _ in logs]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{"single": {kind: run}, "ranks": results of each rank, "printed": stdout of each rank,
    "left": whether a signal ended a wait}."""
    folder = tmp_path_factory.mktemp("ranks")
    single = {kind: whole_run(kind) for kind in usable()}
    for kind, run in single.items():
        torch.save(run, folder / f"single_{kind}.pt")
    printed = launch(folder)
    results = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD)]
    left = (folder / "left").exists()
    return {"single": single, "printed": printed, "ranks": results, "left": left}


@pytest.fixture(params=MATRICES)
def kind(request, runs):
    """A key of MATRICES."""
    if request.param not in runs["single"]:
        pytest.skip(cpu_muon.problem())
    return request.param


def assert_close(got, expected, what):
    """Snapshots equal to 1e-5 in the weights, and to 1e-4 of its largest element in every state
    tensor.

    One weight in a thousand may be off by one step's decay: cautious decay is on or off by the sign
    of an update, and rounding decides that of an update near zero."""
    assert got["weights"].keys() == expected["weights"].keys()
    assert got["state"].keys() == expected["state"].keys()
    for name, weight in expected["weights"].items():
        errors = (got["weights"][name] - weight).abs()
        assert (errors > 1e-5).float().mean() <= 1e-3 and errors.max() < 1e-3, f"{what}: {name}"
        assert got["state"][name].keys() == expected["state"][name].keys()
        for key, tensor in expected["state"][name].items():
            assert got["state"][name][key].shape == tensor.shape
            error = (got["state"][name][key] - tensor).abs().max()
            assert error <= 1e-4 * tensor.abs().max(), f"{what}: {key} of {name}"


def test_the_configuration_does_not_divide_evenly():
    """What the tests below rely on: shares that are short on the last rank, and parameters smaller
    than the world."""
    model, _ = start("muon")
    groups = model.parameter_groups()
    stacks = Counter(parameter.shape for parameter in groups["matrices"].values())
    assert [count % WORLD for count in stacks.values()].count(1) >= 3
    sizes = [
        parameter.numel()
        for name in groups
        if name != "matrices"
        for parameter in groups[name].values()
    ]
    assert 61 * 33 in sizes and 1 in sizes and 3 in sizes


def test_two_ranks_equal_one(runs, kind):
    single = runs["single"][kind]
    moved = max(
        (single["end"]["weights"][name] - weight).abs().max()
        for name, weight in single["halfway"]["weights"].items()
    )
    assert moved > 1e-3
    for rank in range(WORLD):
        result = runs["ranks"][rank][kind]
        assert result["losses"] == pytest.approx(single["losses"], rel=1e-5)
        assert result["norms"] == pytest.approx(single["norms"], rel=1e-5)
        # clipping acted
        assert min(single["norms"]) > 0.3
        assert_close(result["halfway"], single["halfway"], "halfway")
        assert_close(result["end"], single["end"], "end")


def test_ranks_agree_bit_for_bit(runs, kind):
    first, second = (result[kind] for result in runs["ranks"])
    assert first["losses"] == second["losses"] and first["norms"] == second["norms"]
    for moment in ("halfway", "end", "resumed_from_single"):
        for name, weight in first[moment]["weights"].items():
            assert torch.equal(weight, second[moment]["weights"][name])
            for key, tensor in first[moment]["state"][name].items():
                assert torch.equal(tensor, second[moment]["state"][name][key])


def test_gradients_that_travel_early_are_the_same(runs, kind):
    """With ==. In the first step their order is learnt; afterwards all are on their way when the
    backward pass ends."""
    for rank, results in enumerate(runs["ranks"]):
        early = results[f"{kind}, early"]
        late = results[kind]
        assert early["norms"] == late["norms"]
        assert all(
            torch.equal(early["end"]["weights"][name], weight)
            for name, weight in late["end"]["weights"].items()
        )
        order = early["order"]
        # as backward passes compute them; a stack when it is whole
        assert order[0] == "head.weight" and order[-1] == "embedding.weight"
        assert order.index("value_embeddings.2.weight") < order.index("blocks.0.mlp.down.weight")
        # late layers before early ones: of three, two travel together
        downs = [name for name in order if name.endswith("mlp.down.weight")]
        assert downs[-1] == "blocks.0.mlp.down.weight"
        assert kind == "adamw" or downs[:-1] == ["blocks.1.mlp.down.weight"]
        travels_late = {0, 2} if rank == 1 else {0}
        expected = []
        for step in range(STEPS):
            expected += [0, 0 if step in travels_late else len(order)]
        assert early["begun"] == expected and not any(late["begun"])


def test_state_of_one_rank_continues_on_two(runs, kind):
    assert_close(
        runs["ranks"][0][kind]["resumed_from_single"], runs["single"][kind]["end"], "1 -> 2 ranks"
    )


def test_state_of_two_ranks_continues_on_one(runs, kind):
    resumed = resumed_run(kind, runs["ranks"][0][kind]["halfway"])
    assert_close(resumed, runs["ranks"][0][kind]["end"], "2 -> 1 rank")


def test_functions_on_two_ranks(runs):
    for rank, result in enumerate(runs["ranks"]):
        facts = result["facts"]
        assert (facts["device"], facts["rank"], facts["world_size"]) == ("cpu", rank, WORLD)
        assert facts["sum"] == [2.0, 1.0]
        assert facts["from_rank0"]["rank"] == 0
        assert facts["from_all"] == ["rank 0", "rank 1"]
    assert runs["printed"] == ["one line\n", ""]


@pytest.mark.parametrize(
    "case, agreed",
    [
        ("nothing", Agreed()),
        ("rank 1 is asked to stop", "stopped"),
        ("rank 1 has no data", Agreed(no_data="gone")),
        ("one stops, the other has no data", "stopped"),
        ("rank 1 waits for its data", Agreed(waits=True)),
        ("by rank 0's clock", Agreed(save=True, steps=10**15 + 1)),
        ("by rank 1's clock", Agreed()),
        ("orders to rank 0", Agreed(orders=[{"verb": "save"}, {"verb": "pause"}])),
        ("orders to rank 0 as rank 1 stops", "stopped"),
        ("orders to rank 1", Agreed()),
    ],
)
def test_all_ranks_hear_the_same_before_a_step(runs, case, agreed):
    assert [result["facts"]["agreed"][case] for result in runs["ranks"]] == [agreed] * WORLD


def test_agreeing_with_oneself():
    device = torch.device("cpu")
    mine = {"no_data": "gone", "waits": True, "save": True, "steps": 12, "orders": [{"verb": "x"}]}
    assert ranks.agree(device, stop=False, **mine) == Agreed(**mine)
    with pytest.raises(Stopped):
        ranks.agree(device, stop=True, **mine)


def test_functions_in_one_process_are_the_identity(capsys):
    assert (ranks.rank(), ranks.world_size()) == (0, 1)
    assert ranks.setup("cpu") == torch.device("cpu") and not dist.is_initialized()
    tensor = torch.tensor([1.0, 2.0])
    assert ranks.sum_over_ranks(tensor) is tensor and tensor.tolist() == [1.0, 2.0]
    # cannot be pickled, so it cannot have travelled
    value = (part for part in "ab")
    assert ranks.from_rank0(value) is value
    assert ranks.from_all(value) == [value]
    ranks.from_rank0(None)
    ranks.close()
    ranks.print0("a", 1, sep="-")
    assert capsys.readouterr().out == "a-1\n"


class Words:
    """A store of last words."""

    def __init__(self, **words):
        self.words = words

    def check(self, keys):
        return keys[0] in self.words

    def get(self, key):
        return self.words[key].encode()

    def set(self, key, word):
        self.words[key] = word


@pytest.mark.parametrize("step_seconds, seconds", [(0.0, 3), (4.0, 8), (60.0, 20)])
def test_the_wait_for_last_words_fits_the_usual_step(monkeypatch, step_seconds, seconds):
    """A rank that takes a whole step to find out has time to say so; rank 3 never does."""
    now = [0.0]
    store = Words(**{"last_word/2": "ValueError: x"})
    monkeypatch.setattr(ranks, "world_size", lambda: 4)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)

    def sleep(duration):
        now[0] += duration
        if now[0] >= seconds - 0.5:
            store.set("last_word/1", ranks.LOST)

    found = ranks.who_is_gone(step_seconds, clock=lambda: now[0], sleep=sleep)
    assert found == f"rank 2 failed (ValueError: x) and rank 3 did not answer within {seconds} s"
    assert store.words["last_word/0"] == ranks.LOST


def test_a_signal_ends_the_wait_for_another_rank(runs):
    """Also while that rank is busy for hours, as rank 0 is with a large text."""
    assert runs["left"]


TWO = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def started(monkeypatch):
    """started(variables): this process with these variables instead of those of torchrun; alone
    again afterwards."""

    def start_with(variables):
        for name in ranks.VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    # undone afterwards
    monkeypatch.setattr(ranks, "_launch", ranks.ALONE)
    return start_with


@pytest.mark.parametrize(
    "variables, reasons",
    [
        ({"RANK": "1"}, ["RANK has to be below WORLD_SIZE, which is not set"]),
        ({"RANK": "x"}, ["RANK is not a whole number"]),
        ({"RANK": "-1", "WORLD_SIZE": "2.0"}, ["RANK is not a", "WORLD_SIZE is not a"]),
        ({"WORLD_SIZE": "2"}, ["RANK is not set", "MASTER_ADDR is not", "MASTER_PORT is not set"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE must be at least 1"]),
        ({"LOCAL_RANK": "1"}, ["LOCAL_RANK has to be below WORLD_SIZE"]),
        (TWO | {"RANK": "2"}, ["RANK has to be below WORLD_SIZE=2"]),
        (TWO | {"MASTER_ADDR": ""}, ["MASTER_ADDR is not set"]),
        (TWO | {"MASTER_PORT": "x"}, ["MASTER_PORT is not a port"]),
        (TWO | {"MASTER_PORT": "65536"}, ["MASTER_PORT is not a port"]),
        (TWO | {"LOCAL_RANK": "2"}, ["LOCAL_RANK has to be below WORLD_SIZE=2"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("check", [ranks.check_environment, lambda: ranks.setup("cpu")])
def test_variables_that_do_not_fit_together(started, variables, reasons, check):
    """Every reason is named, with the values, and the remedy that fits them."""
    started(variables)
    with pytest.raises(UsageError) as caught:
        check()
    message = str(caught.value)
    assert [reason for reason in reasons if reason not in message] == []
    for name, value in variables.items():
        if value:
            assert f"{name}={value}" in message
            assert name in message.split("unset ")[1].split(".")[0].split()
    # so that the message itself is printed
    assert ranks.rank() == 0


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, (0, 1, 0)),
        ({"RANK": "0"}, (0, 1, 0)),
        ({"RANK": "", "WORLD_SIZE": ""}, (0, 1, 0)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "x"}, (0, 1, 0)),
        (TWO, (1, 2, 0)),
        (TWO | {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}, (9, 16, 1)),
    ],
)
def test_variables_that_fit_together(started, variables, expected):
    started(variables)
    ranks.check_environment()
    assert (ranks.rank(), ranks.world_size(), ranks.local_rank()) == expected


def test_commands_without_ranks_work_with_variables_left_over(started, capsys):
    started(TWO)
    assert (ranks.rank(), ranks.world_size(), ranks.local_rank()) == (0, 1, 0)
    ranks.print0("printed")
    assert ranks.from_rank0("mine") == "mine"
    assert capsys.readouterr().out == "printed\n"


@pytest.fixture
def impatient(monkeypatch):
    """The wait for other ranks is reported after a second, which a first attempt never takes, and
    ends soon after; so do the threads that are left behind, before the next test."""
    monkeypatch.setattr(ranks, "FIRST_WORD", 1.0)
    monkeypatch.setattr(ranks, "WORD_FACTOR", 100.0)
    monkeypatch.setattr(ranks, "JOIN_LIMIT", 1.5)
    monkeypatch.setattr(ranks, "ATTEMPT", 1.0)
    yield
    for thread in threading.enumerate():
        if thread.name == "join ranks":
            thread.join(30)


@pytest.fixture
def listener():
    """A port on which somebody listens who never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def silent():
    """A port that is taken, so that no other test gets it, and on which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def no_such_host(*_, **__):
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_waiting_for_a_rank_that_never_comes(started, impatient, capsys):
    port = free_port()
    started(TWO | {"RANK": "0", "WORLD_SIZE": "3", "MASTER_PORT": str(port)})
    with pytest.raises(Unavailable, match=r"rank 0 of 3 waited .* for 2 ranks \(1, 2\) to come to"):
        ranks.setup("cpu")
    (line,) = capsys.readouterr().err.splitlines()
    assert f"waiting for 2 ranks (1, 2) to come to 127.0.0.1:{port}" in line
    assert "unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT" in line


@pytest.mark.parametrize("case", ["nobody listens", "nobody answers", "no such host"])
def test_waiting_for_a_master_that_does_not_answer(
    started, impatient, listener, silent, monkeypatch, capfd, case
):
    """One line, without torch's warnings; under torchrun with another remedy."""
    port = listener if case == "nobody answers" else silent
    started(TWO | {"MASTER_PORT": str(port)})
    if case == "no such host":
        monkeypatch.setattr(socket, "create_connection", no_such_host)
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(Unavailable, match=f"127.0.0.1:{port}"):
        ranks.setup("cpu")
    (line,) = capfd.readouterr().err.splitlines()
    reason = {"nobody listens": "refused", "no such host": "not known"}.get(case, "for an answer")
    assert line.startswith("rank 1 of 2: waiting for ") and reason in line
    remedy = "--local-addr" if case == "no such host" else "unset RANK"
    assert remedy in line


def test_a_signal_ends_the_wait_for_the_master(started, monkeypatch):
    """The first attempt to reach it brings the signal."""
    attempts = []

    def refused(*_, **__):
        attempts.append(1)
        if len(attempts) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        raise ConnectionRefusedError

    started(TWO)
    monkeypatch.setattr(socket, "create_connection", refused)
    stop = StopSignals(speaks=False)
    try:
        with pytest.raises(Stopped):
            ranks.setup("cpu")
    finally:
        stop.restore()


@pytest.mark.parametrize(
    "error",
    [RuntimeError("[gloo/transport/tcp/pair.cc:152] timed out"), dist.DistNetworkError("reset")],
)
def test_ranks_that_are_lost_while_they_join(started, monkeypatch, error):
    """Other exceptions are faults of the program, and stay what they are."""

    def fails(*_):
        raise error

    started(TWO)
    monkeypatch.setattr(ranks, "_join", fails)
    with pytest.raises(
        Unavailable, match=r"rank 1 could not join .* 127.0.0.1:29500 \(.*unset RANK"
    ):
        ranks.setup("cpu")
    error = RuntimeError("else")
    with pytest.raises(RuntimeError, match="else"):
        ranks.setup("cpu")


def test_a_port_that_is_taken(started, listener):
    started(TWO | {"RANK": "0", "MASTER_PORT": str(listener)})
    with pytest.raises(UsageError, match=f"MASTER_PORT={listener}: .*another port.*--standalone"):
        ranks.setup("cpu")


def test_more_ranks_than_gpus_is_a_usage_error(started, monkeypatch):
    started(TWO | {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="local rank 3.*2 GPUs.*--nproc_per_node"):
        ranks.setup("cuda")


def test_several_ranks_on_mps_are_a_usage_error(started):
    started(TWO)
    with pytest.raises(UsageError, match="--device-type=mps"):
        ranks.setup("mps")


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
    sys.stdout.flush()
    # as train.py ends: gloo's threads may abort an interpreter that is on its way out
    os._exit(0)


def test_sharded_muon_in_cpp_equals_the_plain_one(runs):
    """On each of two ranks, with rows that they do not share evenly; and it has learned."""
    for rank, results in enumerate(runs["ranks"]):
        if "native" not in results["sharded"]:
            pytest.skip(cpu_muon.problem())
        plain, native = (results["sharded"][kind] for kind in ("muon", "native"))
        other = results["sharded"]["adamw"]
        for name, weight in plain.items():
            errors = (native[name] - weight).abs()
            assert (errors > 1e-5).sum() <= 1e-3 * errors.numel(), f"rank {rank}: {name}"
        matrix = "blocks.1.mlp.up.weight"
        assert (other[matrix] - plain[matrix]).abs().max() > 1e-2
