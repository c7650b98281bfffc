"""The Triton attention kernel against plain PyTorch: in Triton's interpreter on any machine, and on
a GPU (-m gpu).

The first import of triton, which `torch.use_deterministic_algorithms` in conftest.py causes too,
settles for the whole process, compiled models included, whether kernels are interpreted. So this
file runs the interpreter in a process of its own: there TRITON_INTERPRET=1 is set from the start,
and only there the class TestInterpreted is collected."""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import small
import torch
from test_attention import FULL, inputs, output_and_gradients, reference

from nanochat.model.attention import attention, backend_problem
from nanochat.model.build import build
from nanochat.model.config import GPTConfig

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def in_a_process(*command, **environment):
    variables = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST_", "TRITON_"))
    }
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**variables, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-3000:]
    return done.stdout


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def passes_in_the_interpreter(file):
    """The class TestInterpreted of a test file passes in Triton's interpreter."""
    shown = in_a_process(
        "-m",
        "pytest",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        f"tests/{file}::TestInterpreted",
        TRITON_INTERPRET="1",
    )
    assert re.search(r"\d\d passed", shown) and "failed" not in shown


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter():
    passes_in_the_interpreter("test_flash_attention.py")


def compare(ours, plain, exact):
    """Three-way rule: our error against exact arithmetic on the same inputs is compared with that
    of plain PyTorch in their dtype."""
    for name in exact:
        assert ours[name].shape == exact[name].shape and ours[name].dtype == plain[name].dtype
        error, allowed = ((x[name] - exact[name]).norm() for x in (ours, plain))
        assert error <= 1.5 * allowed + 1e-6 * exact[name].norm(), (
            f"{name}: {error:.2e} against {allowed:.2e}"
        )


def three_ways(T, S, window, H, K, D, dtype, device="cpu"):
    q, k, v, grad_out = (x.to(device, dtype) for x in inputs(T, S, H, K, D))

    def of(function, dtype):
        return output_and_gradients(function, q, k, v, grad_out, dtype)

    compare(
        of(lambda *x: attention(*x, window, "triton"), dtype),
        of(lambda *x: plainly(*x, window), dtype),
        of(lambda *x: plainly(*x, window), torch.float64),
    )


def plainly(q, k, v, window):
    """reference(), on any device."""
    with torch.device(q.device):
        return reference(q, k, v, window)


def llama_block(backend, device="cpu", dtype=torch.float32, head_dim=16, T=70):
    """(a block with a window and grouped heads, the same weights on every call; its arguments)"""
    config = GPTConfig(
        depth=1,
        width=4 * head_dim,
        head_dim=head_dim,
        n_head=4,
        n_kv_head=2,
        vocab_size=64,
        max_seq_len=T,
        window_pattern="L",
        arch="llama",
    )
    model, generator = build(config, device, dtype, backend), torch.Generator().manual_seed(0)
    block = model.blocks[0]
    block.attention.window = 40
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) / parameter.size(-1) ** 0.5
            )
    x = torch.randn(1, T, config.width, generator=generator)
    return block, (x.to(device, dtype), (model.rope_cos[:T], model.rope_sin[:T]))


def output_and_gradients_of_block(block, x, rope, run=None):
    """By name: the output, and gradients for the input and the weights.

    run: in place of calling the block."""
    leaf = x.clone().requires_grad_()
    out = block(leaf, rope) if run is None else run(leaf, rope)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    names, parameters = zip(*block.named_parameters(), strict=True)
    return dict(
        zip(
            ("out", "x", *names),
            (out.detach(), *torch.autograd.grad(out, (leaf, *parameters), grad_out)),
            strict=True,
        )
    )


def checkpointed(function):
    return functools.partial(torch.utils.checkpoint.checkpoint, function, use_reentrant=False)


class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.fixture(autouse=True)
    def rounding(self, monkeypatch):
        small.round_in_interpreter(monkeypatch)

    # T queries, S keys, window, H query heads, K key/value heads, D head dim; the interpreter's
    # tiles are 64 x 32 and 32 x 64
    @pytest.mark.parametrize(
        "T, S, window, H, K, D",
        [
            (1, 1, FULL, 1, 1, 16),
            (1, 65, 31, 4, 1, 64),
            (63, 63, 63, 2, 1, 32),
            (65, 65, 1, 2, 2, 128),
            (63, 130, 31, 2, 1, 32),
            (65, 200, 200, 1, 1, 64),
            (130, 130, FULL, 1, 1, 32),
            (130, 193, 100, 2, 1, 16),
            (200, 200, 129, 1, 1, 16),
        ],
    )
    def test_equals_brute_force_forward_and_backward(self, T, S, window, H, K, D):
        q, k, v, grad_out = inputs(T, S, H, K, D)
        exact = output_and_gradients(
            lambda *x: reference(*x, window), q, k, v, grad_out, torch.float64
        )
        ours = output_and_gradients(
            lambda *x: attention(*x, window, "triton"), q, k, v, grad_out, torch.float32
        )
        for name in exact:
            assert (
                ours[name].shape == exact[name].shape
                and ours[name].dtype == torch.float32
                and ours[name].is_contiguous()
            )
            scale = (
                exact[name].abs().max().clamp_min(1.0)
            )  # dq and dk are exactly 0 where one key is visible
            assert (ours[name] - exact[name]).abs().max() <= 2e-5 * scale, name

    @pytest.mark.parametrize("dtype", ["bf16", "fp16"])
    @pytest.mark.parametrize(
        "T, S, window, H, K, D", [(100, 100, FULL, 2, 1, 64), (100, 130, 31, 1, 1, 128)]
    )
    def test_error_is_no_larger_than_that_of_plain_pytorch(self, T, S, window, H, K, D, dtype):
        three_ways(T, S, window, H, K, D, DTYPES[dtype])

    def test_log_sum_exp(self):
        from nanochat.model.kernels.flash_attention import forward

        q, k, v, _ = inputs(70, 90, 2, 1, 32)
        scores = torch.einsum("bthd,bsd->bhts", q.double(), k[:, :, 0].double()) / 32**0.5
        distance = (torch.arange(70) + 20)[:, None] - torch.arange(90)[None, :]
        exact = scores.masked_fill((distance < 0) | (distance >= 33), float("-inf")).logsumexp(-1)
        _, lse = forward(q, k, v, 33)
        assert lse.dtype == torch.float32
        torch.testing.assert_close(lse, exact.float(), atol=1e-5, rtol=1e-5)

    def test_any_tiles_give_the_same(self):
        from nanochat.model.kernels.flash_attention import Tile, backward, forward

        q, k, v, grad_out = inputs(40, 60, 2, 1, 16)
        exact = output_and_gradients(lambda *x: reference(*x, 30), q, k, v, grad_out, torch.float64)
        for tile in (Tile(16, 128, 4, 1), Tile(128, 16, 4, 1)):
            out, lse = forward(q, k, v, 30, tile)
            for name, x in zip(
                ("out", "dq", "dk", "dv"),
                (out, *backward(grad_out, q, k, v, out, lse, 30, tile, tile)),
                strict=True,
            ):
                torch.testing.assert_close(x, exact[name].float(), atol=2e-5, rtol=2e-5)

    def test_reads_any_strides(self):
        """Adjacent heads in one tensor, keys at the start of a cache with NaN past them, and an
        expanded gradient."""
        T, S, H, K, D, window = 70, 90, 2, 1, 32, 40
        q, k, v, _ = inputs(T, S, H, K, D)
        joined = torch.cat((q, q, q), dim=2)
        cache = torch.full((2, 2, K, S + 40, D), float("nan"))
        cache[0, :, :, :S], cache[1, :, :, :S] = k.transpose(1, 2), v.transpose(1, 2)
        strided = joined[:, :, H : 2 * H], *(cache[i, :, :, :S].transpose(1, 2) for i in (0, 1))
        assert not any(x.is_contiguous() for x in strided)
        leaves, strided = (
            [x.clone().requires_grad_() for x in (q, k, v)],
            [x.detach().requires_grad_() for x in strided],
        )
        reference(*leaves, window).sum().backward()
        attention(*strided, window, "triton").sum().backward()
        for leaf, ours in zip(leaves, strided, strict=True):
            torch.testing.assert_close(ours.grad, leaf.grad, atol=2e-5, rtol=2e-5)
        columns = (
            q.transpose(-1, -2).contiguous().transpose(-1, -2)
        )  # not even one head's numbers are side by side
        torch.testing.assert_close(
            attention(columns, k, v, window, "triton"),
            reference(q, k, v, window),
            atol=2e-5,
            rtol=2e-5,
        )

    def test_hidden_blocks_are_not_visited(self):
        """NaN in blocks without any visible score does not reach the result, as it would through a
        masked product."""
        T, window = 256, 8
        q, k, v, grad_out = (x[:1] for x in inputs(T, T, 1, 1, 16))

        def finite(x):
            return x.isfinite().all()

        for poisoned, clean in ((slice(0, 64), slice(128, T)), (slice(192, T), slice(0, 128))):
            bad_k, bad_v, bad_grad = (x.clone() for x in (k, v, grad_out))
            for x in (bad_k, bad_v):
                x[:, poisoned] = float("nan")
            ours = output_and_gradients(
                lambda *x: attention(*x, window, "triton"), q, bad_k, bad_v, grad_out, torch.float32
            )
            assert (
                finite(ours["out"][:, clean])
                and finite(ours["dq"][:, clean])
                and not finite(ours["out"])
            )
            bad_grad[:, poisoned] = float("nan")
            ours = output_and_gradients(
                lambda *x: attention(*x, window, "triton"), q, k, v, bad_grad, torch.float32
            )
            assert (
                finite(ours["dk"][:, clean])
                and finite(ours["dv"][:, clean])
                and not finite(ours["dv"])
            )

    def test_as_a_custom_operator(self):
        """Schema, fake tensors, autograd and tracing, also with symbolic shapes."""
        from nanochat.model.kernels import flash_attention

        q, k, v, grad_out = inputs(5, 9, 2, 1, 16)
        out, lse = flash_attention.forward(q, k, v, 3)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        torch.library.opcheck(flash_attention._op, (*leaves, 3))
        torch.library.opcheck(
            flash_attention._op,
            (
                leaves[0].half().transpose(1, 2).contiguous().transpose(1, 2),
                leaves[1].half(),
                leaves[2].half(),
                3,
            ),
            test_utils=("test_schema", "test_faketensor"),
        )
        torch.library.opcheck(flash_attention._backward_op, (grad_out, q, k, v, out, lse, 3))

    def test_in_a_compiled_block(self):
        """One graph, and the eager block's output and gradients. The operator is only called, so
        "aot_eager" tests as much as inductor."""
        torch.compiler.reset()
        block, (x, rope) = llama_block("triton")
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False)
        expected = output_and_gradients_of_block(llama_block("blocked")[0], x, rope)
        for run in (compiled, checkpointed(compiled)):
            found = output_and_gradients_of_block(block, x, rope, run)
            for name in expected:
                assert (found[name] - expected[name]).abs().max() <= 1e-5 * expected[
                    name
                ].abs().max(), name
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, rope), expected["out"], atol=1e-5, rtol=1e-5)

    def test_what_cannot_be_had_is_refused(self):
        q, k, v, _ = inputs(10, 20, 4, 2, 32)
        for wrong, reason in (
            ((q[..., :24], k[..., :24], v[..., :24]), "takes head dims"),
            ((q, k.half(), v), "not 32, torch.float32"),
            ((q.double(), k.double(), v.double()), "float64"),
            ((q[:, :, :3], k, v), "do not fit together"),
            ((k, q[:, :, :2], q[:, :, :2]), "do not fit together"),
            ((q, k, v[:, 1:]), "do not fit together"),
        ):
            with pytest.raises(ValueError, match=reason):
                attention(*wrong, 5, "triton")

    def test_tiles(self):
        """Those in use fit into shared memory and head their candidates, all of which fit."""
        from nanochat.model.kernels import flash_attention

        for capability in ((9, 0), (8, 0), (8, 6), (8, 9), (10, 0), (12, 0)):
            limit = flash_attention.SHARED_BYTES[flash_attention.gpu_class(capability)]
            for head_dim in (16, 32, 64, 128):
                for which, used in zip(
                    flash_attention.PASSES,
                    flash_attention.tiles(head_dim, 2, capability),
                    strict=True,
                ):
                    found = flash_attention.candidates(which, head_dim, 2, capability)
                    assert found[0] == used and len(found) == len(set(found)) > 3
                    assert all(
                        flash_attention.shared_bytes(which, tile, head_dim, 2) <= limit
                        for tile in found
                    )


# ---- compiled for GPUs, without one ----

# Bytes of a thread's registers that may be spilled to memory, outside the loops without masks.
SPILLED_BYTES = 640


def compile_for(capability, head_dim, dtype):
    """{pass: (shared memory, its estimate, bytes that a thread keeps on its stack, matrix
    instructions)} of the kernels. Needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nanochat.model.kernels import flash_attention

    kernels, found = (
        (
            flash_attention._forward,
            flash_attention._backward_of_keys,
            flash_attention._backward_of_queries,
        ),
        {},
    )
    for which, kernel, tile in zip(
        flash_attention.PASSES, kernels, flash_attention.tiles(head_dim, 2, capability), strict=True
    ):
        constants = {"D": head_dim, "QUERIES": tile.queries, "KEYS": tile.keys}
        types = {
            name: "constexpr"
            if name in constants
            else "*fp32"
            if name in ("Lse", "Delta")
            else "fp32"
            if name == "scale"
            else f"*{dtype}"
            if name[0].isupper() and name not in "TS"
            else "i32"
            for name in kernel.arg_names
        }
        by_16 = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(kernel.arg_names)
            if types[name][0] == "*"
            or name.endswith(("_batch", "_row", "_head"))
            and not name.startswith("n_")
        }
        compiled = triton.compile(
            ASTSource(kernel, types, constants, by_16),
            GPUTarget("cuda", 10 * capability[0] + capability[1], 32),
            {"num_warps": tile.warps, "num_stages": tile.stages},
        )
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(compiled.asm["cubin"])
            f.flush()
            tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
            usage = subprocess.run(
                [tool, "--dump-resource-usage", f.name], capture_output=True, text=True, check=True
            ).stdout
        instructions = len(re.findall(r"wgmma\.mma_async|mma\.sync", compiled.asm["ptx"]))
        estimated = flash_attention.shared_bytes(which, tile, head_dim, 2)
        found[which] = (
            compiled.metadata.shared,
            estimated,
            int(re.search(r"STACK:(\d+)", usage).group(1)),
            instructions,
        )
    return found


slow = pytest.mark.slow


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted here")
@pytest.mark.parametrize(
    "capability, head_dim, dtype",
    [
        ((9, 0), 128, "bf16"),
        *(
            pytest.param(*case, marks=slow)
            for case in [
                ((9, 0), 64, "bf16"),
                ((9, 0), 128, "fp16"),
                ((9, 0), 16, "bf16"),
                ((8, 0), 128, "bf16"),
                ((8, 0), 64, "fp16"),
                ((8, 6), 128, "bf16"),
                ((8, 6), 64, "bf16"),
                ((8, 9), 32, "fp16"),
            ]
        ),
    ],
)
def test_compiles_for_gpus(tmp_path, capability, head_dim, dtype):
    """With the tiles in use all three kernels compile to matrix instructions, within shared memory
    and nearly within registers."""
    code = (
        f"import json, test_flash_attention as tests; "
        f"print(json.dumps(tests.compile_for({capability}, {head_dim}, {dtype!r})))"
    )
    shown = in_a_process(
        "-c", f"import sys; sys.path[:0] = ['.', 'tests']; {code}", TRITON_CACHE_DIR=str(tmp_path)
    )
    found = json.loads(shown.splitlines()[-1])
    limit = {(9, 0): 227, (8, 0): 163}.get(capability, 99) * 1024
    assert len(found) == 3
    for which, (shared, estimated, stack, matrix_instructions) in found.items():
        assert shared <= estimated <= limit and stack <= SPILLED_BYTES and matrix_instructions, (
            which,
            found[which],
        )


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(
    "T, S, window, H, K",
    [
        (512, 512, FULL, 4, 4),
        (512, 512, 256, 4, 1),
        (2048, 2048, FULL, 2, 1),
        (2048, 2048, 1024, 2, 2),
        (2048, 2048, 100, 4, 2),
        (1001, 1001, FULL, 2, 2),
        (1001, 1001, 333, 4, 2),
        (77, 1001, 500, 2, 1),
        (1, 1001, FULL, 4, 1),
        (300, 300, 1, 2, 2),
    ],
)
def test_gpu_error_is_no_larger_than_that_of_plain_pytorch(T, S, window, H, K, D, dtype):
    three_ways(T, S, window, H, K, D, DTYPES[dtype], "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("D", [16, 32, 64, 128])
def test_gpu_fp32(D):
    three_ways(200, 200, 70, 4, 2, D, torch.float32, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("window", [FULL, 300])
@pytest.mark.parametrize("D", [64, 128])
def test_gpu_same_bits_every_time(D, window):
    q, k, v, grad_out = (x.to("cuda") for x in inputs(1500, 1500, 8, 2, D))
    runs = [
        output_and_gradients(
            lambda *x: attention(*x, window, "triton"), q, k, v, grad_out, torch.bfloat16
        )
        for _ in range(5)
    ]
    for run in runs[1:]:
        assert all(torch.equal(run[name], runs[0][name]) for name in run)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128])
def test_gpu_reads_any_strides_and_nothing_beyond(D):
    """The same bits from slices of one tensor that is NaN elsewhere."""
    q, k, v, grad_out = (x.to("cuda", torch.bfloat16) for x in inputs(300, 300, 4, 4, D))
    around = torch.full((2, 500, 3, 4, D), float("nan"), device="cuda", dtype=torch.bfloat16)
    for i, x in enumerate((q, k, v)):
        around[:, 100:400, i] = x
    found = []
    for tensors in ((q, k, v), [around[:, 100:400, i] for i in range(3)]):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = attention(*leaves, 90, "triton")
        found.append([out, *torch.autograd.grad(out, leaves, grad_out)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "around", [lambda block: block, checkpointed], ids=["plain", "checkpointed"]
)
@pytest.mark.parametrize("backend", ["triton", "flex"])
def test_gpu_compiled_block(backend, around):
    """Inductor's block in bf16 beside the eager block with plain attention, in bf16 and in fp32."""
    torch.compiler.reset()
    block, (x, rope) = llama_block(backend, "cuda", torch.bfloat16, 64, T=600)
    run = around(torch.compile(block, fullgraph=True, dynamic=False))
    plain = output_and_gradients_of_block(
        llama_block("blocked", "cuda", torch.bfloat16, 64, T=600)[0], x, rope
    )
    exact = output_and_gradients_of_block(
        llama_block("blocked", "cuda", torch.float32, 64, T=600)[0], x.float(), rope
    )
    compare(output_and_gradients_of_block(block, x, rope, run), plain, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flex", "fa3", "fa4"])
@pytest.mark.parametrize("T, window", [(512, FULL), (1024, 300), (1001, 500)])
def test_gpu_other_backends(backend, T, window):
    """The same three-way rule for backends of other projects; FlashAttention-3 and 4 where they are
    installed."""
    if problem := backend_problem(backend, "cuda", torch.bfloat16, 128):
        pytest.skip(problem)
    q, k, v, grad_out = (x.to("cuda", torch.bfloat16) for x in inputs(T, T, 4, 2, 128))
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: attention(*x, window, backend), dynamic=False)

    def of(function, dtype):
        return output_and_gradients(function, q, k, v, grad_out, dtype)

    compare(
        of(compiled, torch.bfloat16),
        of(lambda *x: plainly(*x, window), torch.bfloat16),
        of(lambda *x: plainly(*x, window), torch.float64),
    )
