"""The Triton kernels of the tables of embeddings, against fp64 sums and against F.embedding.

They run on the GPU where there is one, otherwise in Triton's interpreter."""

import re
from collections import Counter

import pytest
import small
import torch
import torch.nn.functional as F
from test_kernels import DEVICE, compile_kernels, interpreter, randn  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat.model import gpt
from nanochat.model.build import build
from nanochat.model.config import GPTConfig

with pytest.MonkeyPatch.context() as environment:
    # read where kernels are defined, as in test_kernels
    if DEVICE == "cpu":
        environment.setenv("TRITON_INTERPRET", "1")
    from nanochat.model.kernels import embedding
    from nanochat.model.kernels.embedding import look_up, places_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float32).eps


def zipf(n, V, seed=0):
    """Ids as in a text: the commonest is about a twentieth of them, and of a large table most never
    occur."""
    generator = torch.Generator().manual_seed(seed)
    share = 1 / (torch.arange(V) + 1.0)
    share[0] = 0.05 * share.sum()
    ids = torch.multinomial(share, n, replacement=True, generator=generator)
    # the commonest is not the first of the table
    return torch.randperm(V, generator=generator)[ids].to(DEVICE)


def exact_sums(upstream, ids, V):
    """(fp64 sums of the upstream gradients by id, sums of their magnitudes)."""
    wide = upstream.double().flatten(0, -2)
    sums = torch.zeros(2, V, wide.size(-1), dtype=torch.float64, device=ids.device)
    sums[0].index_add_(0, ids.flatten(), wide)
    sums[1].index_add_(0, ids.flatten(), wide.abs())
    return sums


def gradients(table, ids, upstream):
    leaf = table.clone().requires_grad_()
    look_up(leaf, places_of(ids, len(table)), upstream.dtype).backward(upstream)
    return leaf.grad


def check(ids, V, C, dtype):
    """Bits of the rows; gradients as near to fp64 as sums in fp32 are, and the same bits again."""
    table = randn(V, C, seed=1)
    rows = look_up(table, places_of(ids, V), dtype)
    assert rows.dtype == dtype and torch.equal(rows, F.embedding(ids, table).to(dtype))
    # with a mean of one the sum of many is large; that of a bf16 total would stop growing
    upstream = (randn(*ids.shape, C, seed=2) + 1).to(dtype)
    ours = gradients(table, ids, upstream)
    assert ours.dtype == torch.float32 and ours.is_contiguous()
    exact, magnitudes = exact_sums(upstream, ids, V)
    assert ((ours - exact).abs() <= 20 * EPS * magnitudes).all()
    assert torch.equal(ours, gradients(table, ids, upstream))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V, C", [(1, 1), (77, 40), (13, 300)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 43), (2, 511)])
def test_rows_and_their_gradients(shape, V, C, dtype):
    """Widths below and above the columns of a program; ids that never occur."""
    ids = zipf(shape[0] * shape[1], V).view(shape)
    check(ids, V, C, dtype)


@pytest.mark.parametrize("n", [embedding.PIECE - 1, embedding.PIECE, 1000])
def test_one_id_for_all_tokens(n):
    check(torch.full((1, n), 3, device=DEVICE), 5, 24, torch.bfloat16)


def test_pieces_begin_and_end_anywhere():
    """Segments of every length up to three pieces, behind one of every length."""
    piece = embedding.PIECE
    generator = torch.Generator().manual_seed(3)
    for before, length in [(0, piece), (1, piece), (1, 2 * piece - 1), (piece - 1, 2 * piece + 1)]:
        ids = torch.tensor([0] * before + [1] * length + [2] * 5)
        ids = ids[torch.randperm(len(ids), generator=generator)]
        check(ids.to(DEVICE)[None], 4, 8, torch.bfloat16)
    check(zipf(3000, 5)[None], 5, 8, torch.bfloat16)


def test_no_tokens():
    check(torch.empty(2, 0, dtype=torch.int64, device=DEVICE), 5, 8, torch.bfloat16)


def test_rounds_as_torch_does():
    """Halves between two numbers of bf16, infinities, the smallest and the largest of fp32."""
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 1, 0x7F800000])
    table = bits.int().view(torch.float32).view(1, -1).to(DEVICE)
    table = torch.cat((table, -table))
    ids = torch.tensor([[1, 0]], device=DEVICE)
    rows = look_up(table, places_of(ids, 2), torch.bfloat16)
    assert torch.equal(rows, F.embedding(ids, table).bfloat16())


def test_tokens_of_an_id_are_added_in_their_order():
    """Wherever they stand among the others."""
    ids = torch.tensor([[2, 0, 2, 1, 2]], device=DEVICE)
    upstream = randn(1, 5, 16)
    ours = gradients(torch.zeros(3, 16, device=DEVICE), ids, upstream)
    moved = torch.tensor([[0, 2, 2, 2, 1]], device=DEVICE)
    again = gradients(torch.zeros(3, 16, device=DEVICE), moved, upstream[:, [1, 0, 2, 4, 3]])
    assert torch.equal(ours, again)


def test_upstream_gradients_of_any_strides():
    ids, table = zipf(70, 9)[None], randn(9, 12)
    upstream = randn(1, 12, 70).mT
    assert torch.equal(
        gradients(table, ids, upstream), gradients(table, ids, upstream.contiguous())
    )
    one = torch.ones(1, 1, 1, device=DEVICE).expand(1, 70, 12)
    counts = torch.bincount(ids.flatten().cpu(), minlength=9).to(DEVICE)
    assert torch.equal(gradients(table, ids, one), counts[:, None].float().expand(9, 12))


def test_shows_what_is_wrong():
    """An id outside of the table gives NaN, and no gradient to another; a view is refused, as are
    places in another table, and second derivatives."""
    table = randn(4, 6).requires_grad_()
    ids = torch.tensor([[0, -1, 4, 3]], device=DEVICE)
    rows = look_up(table, places_of(ids, 4), torch.bfloat16)
    assert rows[0, :, 0].isnan().tolist() == [False, True, True, False]
    rows.backward(torch.ones_like(rows))
    assert table.grad[:, 0].tolist() == [1, 0, 0, 1]
    with pytest.raises(ValueError, match="contiguous one of 4 rows"):
        look_up(table.mT, places_of(ids, 4), torch.bfloat16)
    with pytest.raises(ValueError, match="4 rows .* one of 5 rows"):
        look_up(table, places_of(ids, 5), torch.bfloat16)
    rows = look_up(table, places_of(ids, 4), torch.float32)
    (first,) = torch.autograd.grad(rows.square()[0, 0].sum(), table, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_accumulation_and_hooks():
    """Two micro-batches add up in .grad, and a hook sees each of them there."""
    table = randn(30, 10).requires_grad_()
    seen = []
    table.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
    expected = []
    for seed in range(2):
        ids, upstream = zipf(200, 30, seed)[None], randn(1, 200, 10, seed=seed).bfloat16()
        expected.append(gradients(table.detach(), ids, upstream))
        look_up(table, places_of(ids, 30), torch.bfloat16).backward(upstream)
    assert torch.equal(seen[0], expected[0]) and torch.equal(seen[1], expected[0] + expected[1])


# ---- in the model ----

CONFIG = GPTConfig(
    depth=5, width=32, head_dim=16, n_head=2, n_kv_head=1, vocab_size=31, max_seq_len=16
)


class Operations(TorchDispatchMode):
    """Counts what torch runs, by name."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function.__name__] += 1
        return function(*args, **(kwargs or {}))


def noisy(model):
    """No weight is zero, so that every parameter has a gradient."""
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter += 0.1 * randn(*parameter.shape, seed=seed)
    return model


def passes(dtype, on, monkeypatch, checkpointing=False):
    """(losses, gradients, operations) of two micro-batches."""
    monkeypatch.setattr(gpt, "TRITON_TABLES", (DEVICE,) if on else ())
    model = noisy(build(CONFIG, DEVICE, dtype))
    model.checkpointing = checkpointing
    losses = []
    with Operations() as operations:
        for seed in range(2):
            ids = zipf(2 * 17, CONFIG.vocab_size, seed).view(2, 17)
            loss = model(ids[:, :-1], ids[:, 1:], reduction="mean")
            loss.backward()
            losses.append(loss.detach())
    return losses, [p.grad for p in model.parameters()], operations.count


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_with_the_kernel(dtype, checkpointing, monkeypatch):
    """The same losses, and the same gradients but for the order of the sums in tables; one sort a
    micro-batch, for the tokens' table and two others; nothing of the plain way is left."""
    plain_losses, plain, _ = passes(dtype, False, monkeypatch)
    losses, ours, count = passes(dtype, True, monkeypatch, checkpointing)
    assert losses == plain_losses
    for expected, found in zip(plain, ours, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert count["sort.stable"] == 2
    assert not {"embedding.default", "embedding_dense_backward.default"} & set(count)
    _, again, _ = passes(dtype, True, monkeypatch, checkpointing)
    assert all(map(torch.equal, ours, again))


def test_value_embeddings_have_the_dtype_of_the_stream():
    table, ids = gpt.ValueTable(7, 6).to(DEVICE), zipf(9, 7)[None]
    stream = randn(1, 9, 4).bfloat16()
    rows, same = table(ids, stream, places_of(ids, 7))
    assert same is stream
    assert torch.equal(rows, F.embedding(ids, table.weight).bfloat16())


def test_only_training_takes_the_kernel(monkeypatch):
    """Neither evaluation, nor a pass without gradients, nor another device; and not by default."""
    assert gpt.TRITON_TABLES == ()
    model = build(CONFIG, DEVICE)
    ids = zipf(12, CONFIG.vocab_size)[None]

    def count():
        with Operations() as operations:
            model(ids, ids, reduction="mean")
        return operations.count["sort.stable"]

    assert count() == 0
    monkeypatch.setattr(gpt, "TRITON_TABLES", ("mps",))
    assert count() == 0
    monkeypatch.setattr(gpt, "TRITON_TABLES", (DEVICE,))
    assert count() == 1
    with torch.no_grad():
        assert count() == 0
    model.eval()
    assert count() == 0


# The tables are read by the kernel, in Triton's interpreter.
WITH_THE_KERNEL = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, {root!r})
import train
from nanochat.model import gpt
from nanochat.model.kernels import embedding
look_up, calls = embedding.look_up, []
def counted(*args):
    calls.append(1)
    return look_up(*args)
embedding.look_up = counted
gpt.TRITON_TABLES = ("cpu",)
code = train.run(sys.argv[1:])
# in one piece, as two ranks write
sys.stderr.write("tables were read %d times\\n" % len(calls))
sys.exit(code)
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="ranks of the interpreter")
def test_two_ranks(tmp_path):
    """Losses of 3 steps of two micro-batches, with gradients that travel while others are computed,
    and with split tables."""
    flags = (
        "--depth=3",
        "--tokenizer=char",
        "--num-iterations=3",
        "--total-batch-size=128",
        "--device-batch-size=1",
        *small.BARE,
    )
    # Not forked from a server, which may have imported triton before TRITON_INTERPRET was set.
    by_kernel = tmp_path / "with_the_kernel.py"
    by_kernel.write_text(WITH_THE_KERNEL.format(root=str(small.ROOT)))
    plainly = small.ROOT / "train.py"
    runs = {"plain": (plainly,), "whole": (by_kernel,), "split": (by_kernel, "--shard")}
    losses = {}
    for tag, (script, *more) in runs.items():
        folder = tmp_path / tag
        folder.mkdir()
        done = small.run_torchrun(folder, 2, *flags, *more, script=script)
        assert done.returncode == 0, done.stderr
        losses[tag] = small.losses(folder)
        times = [int(n) for n in re.findall(r"tables were read (\d+) times", done.stderr)]
        # three tables; a pass before the first step is counted, too
        assert tag == "plain" or (len(times) == 2 and min(times) >= 3 * 2 * 3)
    assert losses["whole"] == pytest.approx(losses["plain"], abs=1e-5)
    assert losses["split"] == pytest.approx(losses["plain"], abs=1e-5)


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [768, 1536])
def test_a_whole_vocabulary(C, dtype):
    check(zipf(65536, 32768).view(32, 2048), 32768, C, dtype)
    check(torch.zeros(32, 2048, dtype=torch.int64, device=DEVICE), 32768, C, dtype)


@pytest.mark.gpu
def test_compiled_model_with_the_kernel(monkeypatch):
    """Compiled blocks get rows in bf16 instead of fp32: the same loss and gradients."""
    config = GPTConfig(
        depth=4, width=128, head_dim=64, n_head=2, n_kv_head=2, vocab_size=512, max_seq_len=256
    )
    ids = zipf(4 * 257, 512).view(4, 257)
    found = []
    for on in ((), (DEVICE,), (DEVICE,)):
        monkeypatch.setattr(gpt, "TRITON_TABLES", on)
        model = noisy(build(config, DEVICE, torch.bfloat16, "sdpa"))
        model.compile_parts()
        loss = model(ids[:, :-1], ids[:, 1:], reduction="mean")
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    plain, ours, again = found
    assert all(map(torch.equal, ours, again))
    for expected, other in zip(plain, ours, strict=True):
        assert (other - expected).norm() <= 0.01 * expected.norm()


# ---- compilation, which needs no GPU ----

COMPILE = """
from nanochat.model.kernels import embedding

sizes = {"ROWS": embedding.ROWS, "COLUMNS": embedding.COLUMNS}
pieces = sizes | {"PIECE": embedding.PIECE}
types = dict.fromkeys(("ids", "order", "sorted_ids", "starts"), "*i64")
types |= dict.fromkeys(("weight", "pieces", "gradient"), "*fp32")
types |= dict.fromkeys(("out", "upstream"), "*bf16")
for capability in (80, 89, 90):
    reading = build(
        embedding._rows, capability, types, sizes, num_warps=embedding.READING_WARPS
    )
    assert "ld.global.v4" in reading and "st.global.v4" in reading
    for kernel in (embedding._piece_sums, embedding._sums):
        summing = build(kernel, capability, types, pieces, num_warps=embedding.SUMMING_WARPS)
        assert "ld.global.v4" in summing and "st.global.v4" in summing
        # adding up takes no exchange between threads
        assert "shfl.sync.bfly" not in summing and "bar.sync" not in summing
"""


def test_kernels_compile_for_gpus(tmp_path):
    compile_kernels(COMPILE, tmp_path)
