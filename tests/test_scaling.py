"""How long a step takes on many devices, and what travels: against bytes counted on two ranks, and
by hand."""

import json
from dataclasses import replace

import pytest
import small

import train
from nanochat import hardware
from nanochat.model.build import meta_model
from nanochat.model.config import GPTConfig
from nanochat.optim.muon import muon_flops
from nanochat.run.memory import StepMemory
from nanochat.run.scaling import (
    COUNTS,
    PARTS,
    SUMS,
    Piece,
    Scaled,
    Speeds,
    StepTime,
    Work,
    limit_of,
    listed_speeds,
    pieces_of,
    stacked_elements,
    step_time,
    travelling_bytes,
)
from nanochat.run.scaling_text import REASONS
from nanochat.run.sharded_scaling import (
    Unit,
    sent_in_passes,
    sent_in_update,
    sharded_step_time,
    units_of,
)
from nanochat.run.workload import ADAMW, MATRICES

# Three layers: stacks of 3 and 12 matrices, which no even number of ranks divides.
SHAPE = {
    "depth": 3,
    "width": 32,
    "head_dim": 16,
    "n_head": 2,
    "n_kv_head": 2,
    "vocab_size": 61,
    "max_seq_len": 16,
    "short_window": 5,
}
CONFIG = GPTConfig(**SHAPE)
# A step on two ranks that adds up the bytes of all tensors that hold every rank's share.
COUNTED = """
import json, sys
import torch
import torch.distributed as dist
from nanochat import ranks
from nanochat.model.build import build
from nanochat.model.config import GPTConfig
from nanochat.optim.loss_scaler import LossScaler
from nanochat.optim.optimizer import Optimizer
from nanochat.run.workload import ADAMW, MATRICES

counted = {{"reduced": 0, "gathered": 0}}
def count(name, kind, whole):
    function = getattr(dist, name, None)
    def counting(*tensors, **options):
        counted[kind] += tensors[whole].nbytes
        return function(*tensors, **options)
    if function:
        setattr(dist, name, counting)
# the newer name where there is one
new = hasattr(dist, "reduce_scatter_single")
count("reduce_scatter_single" if new else "reduce_scatter_tensor", "reduced", 1)
count("all_gather_single" if new else "all_gather_into_tensor", "gathered", 0)
ranks.setup("cpu")
model = build(GPTConfig(**{shape}), "cpu", seed=1)
groups = model.parameter_groups()
settings = dict.fromkeys(groups, ADAMW) | {{"matrices": {matrices}}}
optimizer = Optimizer(groups, settings, torch.float32)
ids = torch.randint(61, (1, 17), generator=torch.Generator().manual_seed(ranks.rank()))
loss = model(ids[:, :-1], ids[:, 1:], reduction="mean")
loss.backward()
optimizer.reduce(loss.detach(), LossScaler(enabled=False))
optimizer.step(1.0, 0.9)
if ranks.rank() == 0:
    open(sys.argv[1], "w").write(json.dumps(counted))
ranks.close()
"""

# The same of a sharded model, in two passes and an update: what rank 0 sends of each kind.
COUNTED_SHARDED = """
import json, sys
import torch
import torch.distributed as dist
from nanochat import ranks
from nanochat.model.config import GPTConfig
from nanochat.optim.loss_scaler import LossScaler
from nanochat.optim.optimizer import Optimizer
from nanochat.optim.sharding import build_sharded
from nanochat.run.workload import ADAMW, MATRICES

counted = {{"passes": 0, "update": 0, "factors": 0}}
kind = ["passes"]
def count(name):
    function = getattr(dist, name, None)
    def counting(*args, **options):
        tensors = [each for each in (*args, *options.values()) if torch.is_tensor(each)]
        is_factor = kind[0] == "update" and "all_to_all" not in name
        whole = max(tensor.nbytes for tensor in tensors)
        counted["factors" if is_factor else kind[0]] += whole // ranks.world_size()
        return function(*args, **options)
    if function:
        setattr(dist, name, counting)
for each in ("reduce_scatter", "all_gather"):
    new = f"{{each}}_single"
    old = "all_gather_into_tensor" if each == "all_gather" else "reduce_scatter_tensor"
    count(new if hasattr(dist, new) else old)
count("all_to_all_single")
ranks.setup("cpu")
torch.manual_seed(1)
dtype = torch.bfloat16
config = GPTConfig(**{shape})
model = build_sharded(config, torch.device("cpu"), dtype, "blocked", 1).train()
groups = model.parameter_groups()
settings = dict.fromkeys(groups, ADAMW) | {{"matrices": MATRICES}}
optimizer = Optimizer(groups, settings, dtype)
ids = torch.randint(61, (1, 17))
for _ in range(2):
    loss = model(ids[:, :-1], ids[:, 1:], reduction="mean")
    loss.backward()
kind[0] = "update"
optimizer.reduce(loss.detach(), LossScaler(enabled=False))
optimizer.step(1.0, 0.9)
if ranks.rank() == 0:
    open(sys.argv[1], "w").write(json.dumps(counted))
ranks.close()
"""


def pieces(matrices=MATRICES, config=CONFIG):
    groups = dict.fromkeys(meta_model(config).parameter_groups(), ADAMW)
    return pieces_of(config, groups | {"matrices": matrices})


# ---- what travels ----


@pytest.mark.parametrize("matrices", ["MATRICES", "ADAMW"])
def test_the_volume_is_what_two_ranks_exchange(tmp_path, matrices):
    script = COUNTED.format(shape=SHAPE, matrices=matrices)
    done = small.ranks_of(tmp_path, 2, [str(tmp_path / "counted.json")], script)
    assert done.returncode == 0, done.stderr
    counted = json.loads((tmp_path / "counted.json").read_text())
    expected = travelling_bytes(pieces({"MATRICES": MATRICES, "ADAMW": ADAMW}[matrices]), 2)
    # of two ranks each keeps its half
    assert counted == {"reduced": 2 * expected, "gathered": 2 * expected}


def test_the_volume_of_a_sharded_step_is_what_two_ranks_exchange(tmp_path):
    done = small.ranks_of(
        tmp_path, 2, [str(tmp_path / "counted.json")], COUNTED_SHARDED.format(shape=SHAPE)
    )
    assert done.returncode == 0, done.stderr
    counted = json.loads((tmp_path / "counted.json").read_text())
    units = units_of(CONFIG, 2)
    assert counted["passes"] == 2 * sent_in_passes(units, 2)
    assert counted["update"] == sent_in_update(pieces(), 2, 2)
    # what is left out of 2 x 3 x (4 x 32 + 128 + 128) numbers of fp32, and padding
    assert 0 < counted["factors"] < 0.1 * counted["update"]


def test_units_are_all_parameters():
    units = units_of(CONFIG, 2)
    total = meta_model(CONFIG).count_parameters()["total"]
    assert sum(unit.elements(1) for layer in units for unit in layer) == total
    # what all share, then three layers, of which the first and the last have a table
    assert [len(layer) for layer in units] == [1, 2, 1, 2]
    # 61 rows on 4 ranks: 16 each
    assert units[1][1].elements(4) == 64 * 32


def test_pieces_are_all_parameters():
    found = pieces()
    total = meta_model(CONFIG).count_parameters()["total"]
    assert sum(piece.count * piece.elements for piece in found) == total
    assert travelling_bytes(found, 1) == 0
    stacks = [piece for piece in found if piece.shape]
    assert sorted(piece.count for piece in stacks) == [3, 3, 12]
    # the first block is the last of the backward pass
    assert {piece.made_at for piece in stacks} == {1.0}
    tables = {piece.made_at for piece in found if piece.count == 61 * 32}
    # head, the tables of layers 2 and 0, embedding
    assert tables == {0.0, 1 / 3, 1.0}


def test_stacks_are_padded_to_a_multiple_of_the_ranks():
    stack = Piece(3, (4, 8), 1.0)
    assert [stack.padded(n) for n in (1, 2, 3, 4, 8)] == [96, 128, 96, 128, 256]
    assert travelling_bytes([stack, Piece(10, None, 0.0)], 4) == 4 * (128 + 12) * 3 / 4
    assert stacked_elements([stack, Piece(10, None, 0.0)], 4) == 128


def test_pieces_of_a_stack_are_made_as_the_backward_pass_reaches_their_first_layer():
    stack = Piece(12, (4, 8), 1.0)
    assert stack.cut(1) == [stack] and Piece(10, None, 0.5).cut(8) == [Piece(10, None, 0.5)]
    found = [(piece.count, piece.made_at) for piece in stack.cut(8)]
    # the first layer's among the last 8 matrices is a third from the beginning
    assert found == [(8, pytest.approx(2 / 3)), (4, 1.0)]
    assert [piece.padded(8) for piece in stack.cut(8)] == [8 * 32, 8 * 32]


def test_flops_of_one_matrix():
    # five iterations of: 2x2 of 2x3, its square, and 2x3 of it
    assert muon_flops(2, 3) == muon_flops(3, 2) == 5 * 2 * (2 * 2 * 3 + 2 * 2 * 2 + 2 * 2 * 3)


# ---- how long ----


def speeds(ranks=2, **changes):
    values = {"pass_flops": 1e9, "update_flops": 1e9, "memory": 1e9, "reduce": 1e6, "gather": 1e6}
    return Speeds(ranks, **(values | {"delay": 0.0, "overlaps": True} | changes))


def work(**changes):
    values = {"flops_per_token": 1000, "parameters": 100, "tokens": 1000, "passes": 1}
    values["pieces"] = [Piece(500, None, 0.0), Piece(500, None, 1.0)]
    return Work(CONFIG, **(values | changes))


def test_a_step_by_hand():
    """Of 1 ms of passes two thirds are backward, besides 2 us of weights. Each piece travels for
    1 ms: the first begins with the backward pass, the second waits for it."""
    step = step_time(work(), speeds())
    backward = 2 / 3 * (1e-3 + 2e-6)
    assert step.passes == pytest.approx(1e-3) and step.weights == pytest.approx(2e-6)
    assert step.gradients == pytest.approx(2e-3 - backward)
    # the first piece's update of 9 us is over before anything can travel
    assert step.update == pytest.approx(2 * 9e-6)
    assert step.parameters == pytest.approx(9e-6 + 2e-3 - 18e-6)
    assert step.sent_bytes == 4000 and step.travel == pytest.approx(4e-3)
    assert step.seconds == pytest.approx(sum(step.parts.values()))
    assert step.bound_by == "parameters"


def test_what_is_not_hidden():
    together = step_time(work(), speeds(overlaps=False))
    assert together.gradients == pytest.approx(2e-3) and together.parameters == pytest.approx(2e-3)
    # of exchanges without volume the last ones' delays remain, and the sums
    quick = step_time(work(), speeds(reduce=1e30, gather=1e30, delay=1e-7))
    assert quick.gradients == pytest.approx((1 + 2 * SUMS) * 1e-7)
    # in the last of several passes
    several = step_time(work(passes=10), speeds())
    assert several.gradients > step_time(work(), speeds()).gradients
    assert step_time(work(), speeds(ranks=1)).sent_bytes == 0


def test_a_sharded_step_by_hand():
    """Three layers of 1,000 fp32 elements and 2,000 that they share, on 2 ranks at 1 MB/s: each
    gather and each reduction of a layer takes 2 ms, of what is shared 4. A layer computes for 9 ms,
    a third of it forward."""
    units = [[Unit(((2000,),), 4, 1)], *[[Unit(((10, 100),), 4, 2)]] * 3]
    parts = {"pieces": [], "flops_per_token": 27000, "parameters": 0}
    step = sharded_step_time(work(**parts), units, 4, speeds())
    # the shared ones and the first layer; then the last layer, on the way back
    assert step.parameters == pytest.approx(4e-3 + 2e-3 + 2e-3)
    # of the first layer, and the shared ones
    assert step.gradients == pytest.approx(2e-3 + 4e-3)
    assert step.sent_bytes == 3 * 3 * 2000 + 2 * 4000 and step.zeros == 0
    assert step.travel == pytest.approx(26e-3)
    # three times as slow a network: gathers of 6 ms behind 3, and with reductions 12 behind 6
    slow = sharded_step_time(work(**parts), units, 4, speeds(reduce=1e6 / 3, gather=1e6 / 3))
    assert slow.parameters == pytest.approx(12e-3 + 6e-3 + 2 * 3e-3 + 6e-3)
    assert slow.gradients == pytest.approx(2 * 6e-3 + 6e-3 + 12e-3)
    together = sharded_step_time(work(**parts), units, 4, speeds(overlaps=False))
    assert together.parameters + together.gradients == pytest.approx(together.travel)
    twice = sharded_step_time(work(**parts, passes=2, tokens=2000), units, 4, speeds())
    assert twice.sent_bytes == 2 * step.sent_bytes
    assert twice.parameters == pytest.approx(2 * step.parameters)


def test_a_sharded_update_by_hand():
    """Two stacks of two matrices of 10 x 100 in bf16 on 2 ranks: each sends half of its rows, 1,000
    bytes, in 1 ms, and then half of what it made whole."""
    stack = Piece(2, (10, 100), 1.0)
    shared = [[Unit(((2,),), 4, 1)], [Unit(((2,),), 4, 2)]]
    flops = stack.update_flops(2)
    config = replace(CONFIG, depth=1)
    job = replace(work(pieces=[stack, stack], parameters=0), config=config)
    fast = {"memory": 1e30, "update_flops": flops / 5e-3}
    update = sharded_step_time(job, shared, 2, speeds(**fast))
    alone = sharded_step_time(replace(job, pieces=[]), shared, 2, speeds(**fast))
    assert update.update == pytest.approx(10e-3)
    assert update.sent_bytes - alone.sent_bytes == 4 * 1000
    # waited for until the first has come, and while the last goes back
    assert update.parameters - alone.parameters == pytest.approx(2e-3)


def test_nodes_are_slower_than_what_is_in_them():
    gpu = hardware.GPUS["H100"]
    one, two, slow = (
        listed_speeds(gpu, *arguments) for arguments in ((8, 400), (16, 400), (16, 100))
    )
    # 450 GB/s of NVLink in one direction; eight cards of 50 GB/s
    assert (one.reduce, two.reduce, slow.reduce) == (0.8 * 450e9, 0.8 * 400e9, 0.8 * 100e9)
    assert one.delay < two.delay == slow.delay
    assert listed_speeds(hardware.GPUS["L4"], 16, 400).gather == 0.8 * 32e9


def scaled(devices, batch_tokens=1000, **parts):
    seconds = dict.fromkeys(PARTS, 0.0) | parts
    return Scaled(devices, batch_tokens, StepTime(**seconds))


def test_where_scaling_stops():
    rows = [scaled(1, passes=8.0), scaled(2, passes=4.0, gradients=0.5)]
    assert limit_of(rows) == (2, "")
    rows.append(scaled(4, passes=2.0, gradients=1.0, parameters=0.6))
    assert limit_of(rows) == (2, "gradients")
    rows[-1] = scaled(4, batch_tokens=2000, passes=2.0)
    assert limit_of(rows) == (2, "batch")


# ---- memory ----


def memory_on(n, shard=False):
    # 128 matrices of one shape and 32 of two others
    config = replace(CONFIG, depth=32, vocab_size=1000)
    parameters = meta_model(config).count_parameters()
    stacked = stacked_elements(pieces(config=config), n)
    memory = StepMemory(
        config,
        parameters,
        hardware.DTYPES["bfloat16"],
        "sdpa",
        world_size=n,
        stacked=stacked,
        shard=shard,
    )
    return memory.tensor_bytes(1)


def test_more_ranks_need_less_memory_each():
    # as long as no stack is padded
    needs = [memory_on(n) for n in (2, 4, 8, 16, 32)]
    assert needs == sorted(needs, reverse=True) and needs[0] > needs[-1]
    assert memory_on(64) > memory_on(32)
    sharded = [memory_on(n, shard=True) for n in (2, 4, 8, 16, 32)]
    assert sharded == sorted(sharded, reverse=True)
    assert all(less < more for less, more in zip(sharded, needs, strict=True))
    assert sharded[-1] < 0.4 * memory_on(1)


# ---- plans ----


def planned(capsys, *flags):
    assert train.run(["--dry-run", "--depth=24", "--gpu=H100", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_plans_for_1_to_1024_gpus(capsys):
    table = planned(capsys, "--gpus=all", "--gpu-price=2")
    rows = {row["devices"]: row for row in table["rows"]}
    assert tuple(rows) == COUNTS
    fitting = [row for row in table["rows"] if "problem" not in row]
    for row in fitting:
        estimates, step = row["estimates"], row["step"]
        assert step["seconds"] == pytest.approx(sum(step[part] for part in PARTS))
        seconds = step["seconds"] * row["plan"]["num_iterations"]
        assert estimates["seconds"] == pytest.approx(seconds)
        assert estimates["cost"] == pytest.approx(2 * row["devices"] * seconds / 3600)
        assert step["travel"] >= step["sent_bytes"] / 450e9
        # the batch stays the horizon's
        assert row["plan"]["total_batch_tokens"] == 2**20
    hours = [row["estimates"]["device_hours"] for row in fitting]
    assert hours == sorted(hours)
    # gradients and parameters in fp32, (N-1)/N of each
    assert rows[1]["step"]["sent_bytes"] == 0
    total = rows[8]["plan"]["parameters"]["total"]
    assert rows[8]["step"]["sent_bytes"] == pytest.approx(8 * total * 7 / 8, rel=1e-3)
    # 24 matrices of two shapes each for 64 ranks
    assert rows[64]["step"]["zeros"] > 0.3
    # whole stacks of 1024 matrices do not fit
    assert "estimated to need" in rows[1024]["problem"]
    assert 8 <= table["scales_to"] <= 256 and table["stopped_by"] in REASONS
    assert planned(capsys, "--gpus=64", "--gpu-price=2") == rows[64]


def test_a_plan_says_what_it_assumes_and_a_table_where_it_ends(capsys):
    assert train.run(["--dry-run", "--depth=24", "--gpu=H100", "--gpus=8", "--gpu-price=2"]) == 0
    shown = capsys.readouterr().out
    for words in ("a step      time", "each device sends 9.0 GiB", "at $2 a device-hour"):
        assert words in shown
    assert "400 Gbit/s from each GPU to other nodes (--gpu-network)" in shown
    flags = ["--dry-run", "--depth=24", "--gpu=H200", "--gpus=all", "--gpu-network=100"]
    assert train.run(flags) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[2:13]] == [str(n) for n in COUNTS]
    assert "scales to " in shown and "100 Gbit/s" in shown


def test_sharded_plans(capsys):
    """Depth 40 fits 8 GPUs only if they share the weights, and more of them need less each."""
    same = ["--gpus=8", "--depth=24", "--device-batch-size=4"]
    whole, sharded = (planned(capsys, *same, *more) for more in ([], ["--shard"]))
    needs = [plan["estimates"]["memory_bytes"] for plan in (sharded, whole)]
    assert needs[0] < 0.9 * needs[1]
    assert sharded["step"]["sent_bytes"] > whole["step"]["sent_bytes"]
    assert any("gathers the weights" in line for line in sharded["assumptions"])
    deep = ["--depth=40", "--gpus=all"]
    table, other = planned(capsys, *deep, "--shard"), planned(capsys, *deep)
    problems = {row["devices"]: row.get("problem") for row in table["rows"]}
    assert problems[1] and not problems[8] and not problems[512]
    assert all("problem" in row for row in other["rows"] if row["devices"] >= 512)


def test_plans_that_do_not_exist(capsys):
    """No depth fits a T4 that does not fit one; a batch that can only be dealt out to few."""
    assert train.run(["--dry-run", "--depth=32", "--gpu=T4", "--gpus=all"]) == 2
    assert "estimated to need" in capsys.readouterr().err
    rows = planned(capsys, "--gpus=all", f"--total-batch-size={6 * 2048}")["rows"]
    problems = {row["devices"]: row["problem"] for row in rows if "problem" in row}
    assert list(problems) == list(COUNTS[2:]) and "start with 1 or 2 or 3 or 6" in problems[4]


def test_without_a_listed_gpu_there_is_a_cost_but_no_step(tmp_path, capsys):
    assert small.run(tmp_path, "--dry-run", "--json", "--gpus=2", "--gpu-price=3") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["step"] is None
    hours = shown["estimates"]["device_hours"]
    assert shown["estimates"]["cost"] == pytest.approx(3 * hours) and hours > 0
