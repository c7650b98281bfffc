"""The Triton kernel of the loss. Three-way rule: its error against fp64 may not exceed that of
plain PyTorch in the same dtype.

It runs on the GPU where there is one, otherwise in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small
import torch
import torch.nn.functional as F

from nanochat.model import decoder, loss
from nanochat.model.build import build
from nanochat.model.config import GPTConfig
from nanochat.model.loss import linear_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with pytest.MonkeyPatch.context() as environment:
    # read where kernels are defined; other tests and their processes must not inherit it
    if DEVICE == "cpu":
        environment.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    from nanochat.model.kernels.cross_entropy import cross_entropy_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative error that is always allowed; the exponential of a GPU is an approximate instruction.
FLOOR = 1e-6 if DEVICE == "cuda" else 2e-7


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Triton's interpreter, mended: it rounds as GPUs do, and does not warn of every overflow."""
    if DEVICE == "cuda":
        yield
        return
    import triton.language as tl
    from triton.runtime import JITFunction, interpreter

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # triton's own functions in kernels, such as tl.sum: they are not interpreted if triton was
    # imported before, which torch's compiler does
    for module in (tl, tl.standard):
        for name, function in list(vars(module).items()):
            if isinstance(function, JITFunction):
                monkeypatch.setattr(module, name, interpreter.InterpretedFunction(function.fn))
    small.round_in_interpreter(monkeypatch)
    with np.errstate(all="ignore"):
        yield


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def assert_no_worse(ours, plain, exact, floor=FLOOR):
    """Errors in the Frobenius norm, by name."""
    for name in exact:
        assert ours[name].shape == exact[name].shape and ours[name].dtype == plain[name].dtype
        error, allowed = ((x[name].double() - exact[name]).norm() for x in (ours, plain))
        assert error <= 1.5 * allowed + floor * exact[name].norm(), (
            f"{name}: {error:.2e} against {allowed:.2e}"
        )


# ---- cross-entropy ----


def rows(R, V, dtype, seed=0):
    """Logits that grow along the row, of tens and in every other row of tenths; targets, of which a
    third are the likeliest and a fifth do not count; a factor for each row."""
    logits = 20 * randn(R, V, seed=seed) + torch.linspace(-20, 20, V, device=DEVICE)
    logits[::2] *= 0.01
    logits = logits.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(V, (R,), generator=generator).to(DEVICE)
    targets[::3] = logits[::3].argmax(-1)
    targets[1::5] = -1
    return logits, targets, torch.linspace(-1, 2, R, device=DEVICE)


def plain_rows(logits, targets, scale, softcap, dtype):
    leaf = logits.to(dtype, copy=True).requires_grad_()
    z = leaf if dtype == torch.float64 else leaf.float()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    nats = F.cross_entropy(z, targets, ignore_index=-1, reduction="none")
    (nats * scale).sum().backward()
    return {"nats": nats.detach(), "gradient": leaf.grad}


def kernel_rows(logits, targets, scale, softcap):
    logits = logits.clone()
    return {"nats": cross_entropy_(logits, targets, scale, softcap), "gradient": logits}


def check_rows(R, V, softcap, dtype):
    logits, targets, scale = rows(R, V, dtype)
    assert_no_worse(
        kernel_rows(logits, targets, scale, softcap),
        plain_rows(logits, targets, scale, softcap, dtype),
        plain_rows(logits, targets, scale, softcap, torch.float64),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "R, V, softcap",
    [
        (1, 1, 15.0),
        (7, 3, None),
        (33, 257, 15.0),
        (6, 4096, 15.0),
        (9, 4099, 15.0),
        (9, 4099, None),
        (9, 4099, 300.0),
        (4, 257, 1e4),
        (2, 12289, 15.0),
        (2, 12289, None),
    ],
)
def test_cross_entropy(R, V, softcap, dtype):
    check_rows(R, V, softcap, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [15.0, None])
def test_cross_entropy_of_a_whole_vocabulary(softcap, dtype):
    check_rows(4099, 32768, softcap, dtype)


def test_cross_entropy_writes_nothing_else():
    """Given rows of a wider tensor, it leaves the other columns; without a scale it writes nothing;
    a token that does not count gets zeros."""
    logits, targets, scale = rows(11, 500, torch.bfloat16)
    wide = torch.cat((logits, logits), dim=1)
    nats = cross_entropy_(wide[:, :500], targets, None, 15.0)
    assert torch.equal(wide, torch.cat((logits, logits), dim=1))
    assert torch.equal(
        cross_entropy_(wide[:, :500], targets, scale, 15.0), nats
    )  # and the same bits again
    assert torch.equal(wide[:, 500:], logits) and not torch.equal(wide[:, :500], logits)
    assert (nats[targets == -1] == 0).all() and (wide[targets == -1, :500] == 0).all()


def test_cross_entropy_shows_what_is_wrong():
    """NaN for the row with a NaN logit, or with a target that does not exist, and for no other."""
    logits, targets, scale = rows(6, 300, torch.float32)
    logits[2, 299], targets[2], targets[4] = float("nan"), 7, 300
    assert cross_entropy_(logits, targets, scale, 15.0).isnan().tolist() == [
        False,
        False,
        True,
        False,
        True,
        False,
    ]
    with pytest.raises(ValueError, match="float64"):
        cross_entropy_(logits.double(), targets)
    with pytest.raises(ValueError, match="strides"):
        cross_entropy_(logits.T, targets)


def plain_loss(hidden, weight, targets, softcap, reduction):
    logits = F.linear(hidden, weight.to(hidden.dtype))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)


def loss_and_gradients(function, hidden, weight, *rest):
    hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
    nats = function(hidden, weight, *rest)
    # the upstream gradient of "none" is then one number with strides of 0
    (nats.sum() / 3).backward()
    return {"nats": nats.detach(), "d hidden": hidden.grad, "d weight": weight.grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [15.0, None])
def test_linear_cross_entropy(softcap, reduction, dtype, monkeypatch):
    """Forward and backward pass in chunks of 9, 9 and 7 rows, logits of tens."""
    N, C, V = 25, 32, 301
    monkeypatch.setattr(loss, "CHUNK_LOGITS", {"cpu": 10 * V})
    # as on a GPU: the kernel's rows are then longer than the vocabulary
    monkeypatch.setattr(loss, "PADDED_TO", {"cpu": 64, "cuda": 64})
    hidden = F.rms_norm(randn(N, C, seed=1), (C,)).to(dtype)
    weight = (20 * randn(V, C, seed=2) / C**0.5).to(dtype).float()
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    targets[::4] = -1
    exact = loss_and_gradients(
        plain_loss, hidden.double(), weight.double(), targets, softcap, reduction
    )
    plain = loss_and_gradients(plain_loss, hidden, weight, targets, softcap, reduction)
    ours = loss_and_gradients(
        linear_cross_entropy, hidden, weight, targets, softcap, reduction, "triton"
    )
    assert_no_worse(ours, plain, exact, floor=5 * FLOOR)
    with torch.no_grad():
        alone = linear_cross_entropy(hidden, weight, targets, softcap, reduction, "triton")
    assert torch.allclose(alone, ours["nats"], rtol=1e-6)


def test_model_with_the_kernel(monkeypatch):
    """Loss and gradients of a model in training mode are those of the plain loss; so is what
    evaluation finds, which takes the kernel on a GPU."""
    config = GPTConfig(
        depth=2, width=32, head_dim=16, n_head=2, n_kv_head=2, vocab_size=101, max_seq_len=16
    )
    ids, targets = torch.randint(101, (2, 2, 16), generator=torch.Generator().manual_seed(4)).to(
        DEVICE
    )
    found = {}
    for backend in ("plain", "triton"):
        model = build(config, DEVICE)
        model.loss_backend = backend
        monkeypatch.setattr(decoder, "pick_scoring_loss", lambda device_type, n=backend: n)
        model(ids, targets, reduction="mean").backward()
        with torch.no_grad():
            nats = model.eval()(ids, targets)
        found[backend] = [nats, *(p.grad for p in model.parameters())]
    for plain, ours in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-7)


# ---- compilation, which needs no GPU ----

BUILD = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def build(kernel, capability, types, constants, **options):
    types = {name: types.get(name, "i32") for name in kernel.arg_names}
    types |= dict.fromkeys(constants, "constexpr")
    divisible = [["tt.divisibility", 16]]
    whole = {(i,): divisible for i, name in enumerate(types) if types[name][0] in "*i"}
    source, target = ASTSource(kernel, types, constants, whole), GPUTarget("cuda", capability, 32)
    built = triton.compile(source, target=target, options=options)
    # the limit of the smallest of these GPUs
    assert built.metadata.shared <= 99 * 1024, (kernel, built.metadata.shared)
    return built.asm["ptx"]
"""

COMPILE = """
from nanochat.model.kernels import cross_entropy

for capability in (80, 90):
    types = {"logits": "*bf16", "targets": "*i64", "scales": "*fp32", "nats": "*fp32"}
    types["softcap"] = "fp32"
    constants, warps = {"BLOCK": cross_entropy.BLOCK}, cross_entropy.WARPS
    ptx = build(cross_entropy._row, capability, types, constants, num_warps=warps)
    assert "ld.global.v4" in ptx and "st.global.v4" in ptx
"""


def compile_kernels(script, folder):
    """Run a script, which may build() kernels, where they are not interpreted."""
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(folder),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    subprocess.run(
        [sys.executable, "-c", BUILD + script],
        cwd=Path(__file__).parent.parent,
        env=environment,
        check=True,
    )


def test_kernels_compile_for_gpus(tmp_path):
    """To machine code, which takes no GPU: with loads and stores of 16 bytes, within the shared
    memory that a program may have."""
    compile_kernels(COMPILE, tmp_path)
