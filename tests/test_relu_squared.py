"""The Triton kernel of the speedrun model's MLP against plain PyTorch: in Triton's interpreter on
any machine, in a process of its own as in test_flash_attention.py, and on a GPU (-m gpu)."""

import functools
import json

import pytest
import small
import torch
import torch.nn.functional as F
from test_flash_attention import (
    INTERPRETED,
    checkpointed,
    compare,
    in_a_process,
    needs_triton,
    passes_in_the_interpreter,
)

from nanochat.model import gpt
from nanochat.model.build import build
from nanochat.model.config import GPTConfig
from nanochat.model.kernels import ROW_MULTIPLE


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter():
    passes_in_the_interpreter("test_relu_squared.py")


def inputs(N, C, device="cpu"):
    """By name: x as a norm returns it, weights as training finds them, a gradient as small as that
    of a mean over many tokens. bf16, though for the weights as fp32."""
    generator = torch.Generator().manual_seed(N + C)

    def randn(*shape, scale):
        drawn = scale * torch.randn(shape, generator=generator)
        return drawn.bfloat16().to(device)

    return {
        "x": F.rms_norm(randn(N, C, scale=3.0), (C,)),
        "up": randn(4 * C, C, scale=C**-0.5).float(),
        "down": randn(C, 4 * C, scale=0.3 * C**-0.5).float(),
        "grad": randn(N, C, scale=1e-6),
    }


def plain_mlp(x, up, down):
    return F.linear(F.relu(F.linear(x, up.to(x.dtype))).square(), down.to(x.dtype))


def fused_mlp(x, up, down):
    from nanochat.model.kernels.relu_squared import relu_squared_mlp

    return relu_squared_mlp(x, up, down)


def output_and_gradients(function, given, dtype=None):
    """By name. dtype: of everything; None: as given."""
    leaves = [given[name].to(dtype or given[name].dtype) for name in ("x", "up", "down")]
    for leaf in leaves:
        leaf.requires_grad_()
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, given["grad"].to(out.dtype))
    return dict(zip(("out", "x", "up", "down"), (out.detach(), *gradients), strict=True))


def three_ways(N, C, device="cpu", function=fused_mlp):
    given = inputs(N, C, device)
    compare(
        output_and_gradients(function, given),
        output_and_gradients(plain_mlp, given),
        output_and_gradients(plain_mlp, given, torch.float64),
    )


def derivative(given):
    """The exact gradient of the hidden channels before ReLU^2, and these channels, in fp64."""
    hidden = given["x"].double() @ given["up"].double().T
    of_squares = given["grad"].double() @ given["down"].double()
    return of_squares * 2 * hidden.relu(), hidden


def check_what_is_not_finite(device):
    """NaN reaches the rows that it must, and no others."""
    from nanochat.model.kernels import relu_squared

    given = inputs(40, 16, device)
    given["x"][7, 3], given["grad"][9, 2] = float("nan"), float("nan")
    squares = relu_squared.forward(given["x"], given["up"].bfloat16())
    gradient = relu_squared.backward(given["grad"], given["down"].bfloat16(), squares)
    assert squares.isnan().all(1).nonzero().tolist() == [[7]]
    assert squares.isnan().any(1).nonzero().tolist() == [[7]]
    assert gradient.isnan().any(1).nonzero().tolist() == [[7], [9]]


class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.fixture(autouse=True)
    def rounding(self, monkeypatch):
        small.round_in_interpreter(monkeypatch)

    @pytest.fixture(params=["pointers", "descriptors"])
    def tile(self, request, monkeypatch):
        """Tiles of 32 x 64 and 32 channels, read in both ways."""
        from nanochat.model.kernels import relu_squared

        descriptors = request.param == "descriptors"
        tile = relu_squared.INTERPRETER_TILE._replace(descriptors=descriptors)
        monkeypatch.setattr(relu_squared, "INTERPRETER_TILE", tile)
        return tile

    @pytest.mark.parametrize("N, C", [(1, 8), (31, 16), (33, 40), (64, 32), (97, 72)])
    def test_error_is_no_larger_than_that_of_plain_pytorch(self, tile, N, C):
        three_ways(N, C)

    @pytest.mark.parametrize("N, C", [(1, 8), (33, 40), (97, 72)])
    def test_each_number_is_rounded_once(self, tile, N, C):
        """To the nearest bf16, which is off by 1/256 at most; the gradient once more, from a square
        root, which is half as wrong as what it is taken of."""
        from nanochat.model.kernels import relu_squared

        given = inputs(N, C)
        squares = relu_squared.forward(given["x"], given["up"].bfloat16())
        gradient = relu_squared.backward(given["grad"], given["down"].bfloat16(), squares)
        exact, hidden = derivative(given)
        # what fp32 sums of C products add
        slack = 1e-6 * C
        torch.testing.assert_close(squares.double(), hidden.relu() ** 2, rtol=1 / 250, atol=slack)
        torch.testing.assert_close(gradient.double(), exact, rtol=1 / 165, atol=1e-6 * slack)
        silent = hidden < -slack
        assert silent.any() and (hidden > slack).any()
        assert (squares[silent] == 0).all() and (gradient[silent] == 0).all()

    def test_zeros_have_no_gradient(self, tile):
        """Not even where the gradient that arrives is infinite, as in plain PyTorch."""
        from nanochat.model.kernels import relu_squared

        given = inputs(40, 16)
        x, up, down = given["x"], given["up"].bfloat16(), given["down"].bfloat16()
        x[3], x[5] = 0, -0.0
        squares = relu_squared.forward(x, up)
        assert (squares[3] == 0).all() and (squares[5] == 0).all() and (squares[4] != 0).any()
        given["grad"][3] = float("inf")
        gradient = relu_squared.backward(given["grad"], down, squares)
        assert (gradient[3] == 0).all() and (gradient[5] == 0).all() and (gradient[4] != 0).any()

    def test_what_is_not_finite_stays_so(self, tile):
        check_what_is_not_finite("cpu")

    def test_same_bits_every_time(self, tile):
        first, again = (output_and_gradients(fused_mlp, inputs(70, 40)) for _ in range(2))
        assert all(torch.equal(first[name], again[name]) for name in first)

    def test_any_tiles_and_strides_give_the_same(self):
        from nanochat.model.kernels import relu_squared

        given = inputs(70, 48)
        up, down = given["up"].bfloat16(), given["down"].bfloat16()
        squares = relu_squared.forward(given["x"], up)
        gradient = relu_squared.backward(given["grad"], down, squares)
        strided = [x.T.contiguous().T for x in (given["x"], up, given["grad"], down, squares)]
        x, up, grad, down, strided_squares = strided
        for tile in (
            relu_squared.Tile(16, 32, 16, 4, 1, False),
            relu_squared.Tile(64, 16, 64, 4, 1, True),
        ):
            found = relu_squared.forward(x, up, tile)
            torch.testing.assert_close(found, squares, rtol=1 / 120, atol=1e-5)
            found = relu_squared.backward(grad, down, strided_squares, tile)
            torch.testing.assert_close(found, gradient, rtol=1 / 120, atol=1e-11)

    def test_one_tensor_of_hidden_channels_is_kept(self):
        given = inputs(30, 16)
        kept = []

        def keep(x):
            kept.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            output_and_gradients(fused_mlp, given)
        shapes = [tuple(x.shape) for x in kept]
        assert sorted(shapes) == [(16, 64), (30, 16), (30, 64), (64, 16)]
        assert all(x.dtype == torch.bfloat16 for x in kept)

    def test_as_a_custom_operator(self):
        """Schema, fake tensors and tracing, also with symbolic shapes."""
        from nanochat.model.kernels import relu_squared

        given = inputs(5, 8)
        x, grad, up, down = (given[name].bfloat16() for name in ("x", "grad", "up", "down"))
        torch.library.opcheck(relu_squared._op, (x, up))
        squares = relu_squared.forward(x, up)
        torch.library.opcheck(relu_squared._backward_op, (grad, down, squares))

    def test_second_derivative_is_refused(self):
        given = inputs(5, 8)
        x = given["x"].requires_grad_()
        grad = given["grad"].requires_grad_()
        out = fused_mlp(x, given["up"], given["down"])
        (gradient,) = torch.autograd.grad(out, x, grad, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()

    def test_what_cannot_be_had_is_refused(self):
        given = inputs(5, 8)
        x, up, down = (given[name] for name in ("x", "up", "down"))
        for wrong, reason in (
            ((x.float(), up, down), "not torch.float32"),
            ((x[:, :4], up[:, :4], down[:4]), "and 4 to 32 channels"),
            ((x, up, down.T), "do not fit together"),
            ((x[:, :7], up, down), "do not fit together"),
        ):
            with pytest.raises(ValueError, match=reason):
                fused_mlp(*wrong)

    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    @pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
    def test_model_with_the_kernel(self, monkeypatch, checkpointing, compiled):
        """Loss and gradients are nearly those of the plain MLP, with dropout too; every layer calls
        the kernel, once more where activations are recomputed. A compiled block is one graph."""
        calls = count_calls(monkeypatch)
        found = {}
        for devices in ((), ("cpu",)):
            torch.compiler.reset()
            monkeypatch.setattr(gpt, "FUSED_MLP", devices)
            model = model_of(dropout=0.1)
            model.checkpointing = checkpointing
            if compiled:
                for block in model.blocks:
                    # The operators are only called, so it tests as much as inductor.
                    block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
            calls.clear()
            found[devices] = loss_and_gradients(model)
            n = 0 if not devices else model.config.depth
            again = n if checkpointing else 0
            assert (calls.count("forward"), calls.count("backward")) == (n + again, n)
        for plain, ours in zip(*found.values(), strict=True):
            assert (ours - plain).norm() <= 0.1 * plain.norm()

    def test_where_the_kernel_is_taken(self, monkeypatch):
        """In training, in bf16, not in fp8, for widths that fit, and only if it is switched on."""
        calls = count_calls(monkeypatch)

        def taken(mlp, dtype=torch.bfloat16):
            calls.clear()
            mlp(torch.ones(2, 3, mlp.up.in_features, dtype=dtype))
            return calls == ["forward"]

        def mlp_of(width):
            return gpt.MLP(config_of(width=width, n_head=1, n_kv_head=1, head_dim=width))

        mlp = mlp_of(2 * ROW_MULTIPLE)
        assert gpt.FUSED_MLP == () and not taken(mlp)
        monkeypatch.setattr(gpt, "FUSED_MLP", ("cuda",))
        assert not taken(mlp)
        monkeypatch.setattr(gpt, "FUSED_MLP", ("cpu",))
        assert taken(mlp) and not taken(mlp, torch.float32)
        assert not taken(mlp_of(2 * ROW_MULTIPLE + 2))
        assert not taken(mlp.eval()) and taken(mlp.train())
        mlp.up.training_product = mlp.down.training_product = lambda x, weight: F.linear(
            x, weight.to(x.dtype)
        )
        assert not taken(mlp)

    def test_a_llama_never_takes_it(self, monkeypatch):
        calls = count_calls(monkeypatch)
        monkeypatch.setattr(gpt, "FUSED_MLP", ("cpu",))
        loss_and_gradients(model_of(arch="llama", window_pattern="L"))
        assert calls == []

    def test_tiles(self):
        """Those in use fit into shared memory and head their candidates, all of which fit."""
        from nanochat.model.kernels import relu_squared
        from nanochat.model.kernels.flash_attention import SHARED_BYTES, gpu_class

        for capability in ((9, 0), (8, 0), (8, 6), (8, 9), (10, 0), (12, 0)):
            limit = SHARED_BYTES[gpu_class(capability)]
            for which in relu_squared.PASSES:
                found = relu_squared.candidates(which, capability)
                assert found[0] == relu_squared.tile_of(which, capability)
                assert len(found) == len(set(found)) > 3
                assert all(relu_squared.shared_bytes(which, tile) <= limit for tile in found)


def config_of(**changes):
    shape = {
        "depth": 2,
        "width": 32,
        "head_dim": 16,
        "n_head": 2,
        "n_kv_head": 2,
        "vocab_size": 101,
        "max_seq_len": 16,
    }
    return GPTConfig(**(shape | changes))


def model_of(**changes):
    """A bf16 model in training mode on the CPU, all of whose matrices are random."""
    model = build(config_of(**changes), "cpu", torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn / parameter.size(-1) ** 0.5)
    return model.train()


def loss_and_gradients(model):
    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(4)
    ids, targets = torch.randint(101, (2, 2, 16), generator=generator)
    nats = model(ids, targets, reduction="mean")
    nats.backward()
    return [nats.detach(), *(p.grad for p in model.parameters())]


def count_calls(monkeypatch):
    """A list that grows by "forward" or "backward" with each call of a pass of the kernel."""
    from nanochat.model.kernels import relu_squared

    calls = []

    def counted(which, run, *inputs):
        calls.append(which)
        return run(*inputs)

    for which in relu_squared.PASSES:
        run = getattr(relu_squared, which)
        monkeypatch.setattr(relu_squared, which, functools.partial(counted, which, run))
    return calls


# ---- compiled for GPUs, without one ----

# Bytes of a thread's registers that may be spilled to memory, between tiles.
SPILLED_BYTES = 32
COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nanochat.model.kernels import relu_squared
from nanochat.model.kernels.flash_attention import SHARED_BYTES, gpu_class

capability = tuple(json.loads(sys.argv[1]))
kernel = relu_squared._gemm
for which in relu_squared.PASSES:
    tile = relu_squared.tile_of(which, capability)
    of_b = (tile.columns, tile.depth) if which == "forward" else (tile.depth, tile.columns)
    half = (tile.rows, tile.columns // 2)
    shapes = {"A": (tile.rows, tile.depth), "B": of_b, "Squares": half, "Out": half}
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    constants |= {"DESCRIPTORS": tile.descriptors}
    if which == "forward":
        constants["Squares"] = None
    types = dict.fromkeys(kernel.arg_names, "i32")
    for name, shape in shapes.items():
        types[name] = f"tensordesc<bf16{list(shape)}>" if tile.descriptors else "*bf16"
    types |= dict.fromkeys(constants, "constexpr")
    by_16 = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(types)
        if types[name][0] in "*i"
    }
    major, minor = capability
    built = triton.compile(
        ASTSource(kernel, types, constants, by_16),
        GPUTarget("cuda", 10 * major + minor, 32),
        {"num_warps": tile.warps, "num_stages": tile.stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(built.asm["cubin"])
        f.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [tool, "--dump-resource-usage", f.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ptx = built.asm["ptx"]
    found = {
        "shared": built.metadata.shared,
        "estimated": relu_squared.shared_bytes(which, tile),
        "limit": SHARED_BYTES[gpu_class(capability)],
        "stack": int(re.search(r"STACK:(\\d+)", usage).group(1)),
        "products": len(re.findall(r"wgmma\\.mma_async|mma\\.sync|tcgen05\\.mma", ptx)),
        "by descriptor": len(re.findall(r"cp\\.async\\.bulk\\.tensor", ptx)),
        "of 16 bytes": len(re.findall(r"cp\\.async\\.cg\\S+ \\[[^]]*\\], \\[[^]]*\\], 0x10", ptx)),
    }
    print(json.dumps(found))
"""


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted here")
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_compiles_for_gpus(tmp_path, capability):
    """With the tiles in use both passes compile to matrix instructions and asynchronous copies,
    within shared memory and registers."""
    shown = in_a_process("-c", COMPILE, json.dumps(capability), TRITON_CACHE_DIR=str(tmp_path))
    rows = [json.loads(line) for line in shown.splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert row["shared"] <= row["estimated"] <= row["limit"], row
        assert row["stack"] <= SPILLED_BYTES, row
        copies = "by descriptor" if capability[0] in (9, 10) else "of 16 bytes"
        assert row["products"] and row[copies], row


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize(
    "N, C", [(1, 8), (77, 40), (300, 136), (1001, 768), (4096, 768), (2048, 1536), (70_000, 64)]
)
def test_gpu_error_is_no_larger_than_that_of_plain_pytorch(N, C):
    three_ways(N, C, "cuda")


@pytest.mark.gpu
def test_gpu_what_is_not_finite_stays_so():
    # tl.maximum() would pass in the interpreter, but not here
    check_what_is_not_finite("cuda")


@pytest.mark.gpu
def test_gpu_same_bits_every_time():
    given = inputs(5000, 768, "cuda")
    runs = [output_and_gradients(fused_mlp, given) for _ in range(5)]
    for run in runs[1:]:
        assert all(torch.equal(run[name], runs[0][name]) for name in run)


@pytest.mark.gpu
def test_gpu_more_numbers_than_32_bits_count():
    """The last rows of a product of 2^31 numbers and more are those of a small one."""
    from nanochat.model.kernels import relu_squared

    N, C = 2**23 + 300, 64
    given = inputs(4 * 128, C, "cuda")
    x = given["x"].repeat(N // (4 * 128) + 1, 1)[:N]
    up, down = given["up"].bfloat16(), given["down"].bfloat16()
    for rows in (slice(N - 400, N), slice(0, 400)):
        squares = relu_squared.forward(x, up)
        assert squares.numel() > 2**31
        few = relu_squared.forward(x[rows], up)
        assert torch.equal(squares[rows], few)
        gradient = relu_squared.backward(x, down, squares)
        assert torch.equal(gradient[rows], relu_squared.backward(x[rows], down, few))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "around", [lambda block: block, checkpointed], ids=["plain", "checkpointed"]
)
def test_gpu_compiled(around):
    torch.compiler.reset()
    compiled = torch.compile(fused_mlp, fullgraph=True, dynamic=False)
    three_ways(600, 256, "cuda", around(compiled))
