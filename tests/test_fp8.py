"""Training in fp8: which layers, the products against a plain quantization, evaluation,
checkpoints, resuming, refusals.

On a CPU torchao multiplies in fp32 what it rounded to fp8 (fp8.EMULATE); the products of a GPU are
tested where there is one."""

import importlib.util
import json
import os
import signal

import pytest
import small
import torch

import train
from nanochat import hardware
from nanochat.apps.doctor import packages
from nanochat.common import UsageError
from nanochat.model import fp8
from nanochat.model.build import build, meta_model
from nanochat.model.config import GPTConfig
from nanochat.model.layers import Linear
from nanochat.run import loading
from nanochat.run.metrics import Record

CPU = torch.device("cpu")
SMALL = GPTConfig(
    depth=2,
    width=64,
    head_dim=32,
    n_head=2,
    n_kv_head=2,
    vocab_size=100,
    max_seq_len=32,
    short_window=16,
    key_shift=True,
)


@pytest.fixture
def emulated(monkeypatch):
    """fp8 on this machine, in small layers. Its peak is not measured, which would take longer than
    these runs."""
    monkeypatch.setattr(hardware, "measured_peak", lambda device, dtype: 1e12)
    monkeypatch.setattr(fp8, "EMULATE", True)
    monkeypatch.setattr(fp8, "LEAST_MEAN_DIM", 64)


def model_of(config, recipe=None):
    """A model in bf16 with no weight of zero, in training mode; with a recipe, its layers in
    fp8."""
    model = build(config, CPU, torch.bfloat16, seed=1).train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    if recipe:
        fp8.convert(model, recipe)
    return model


def batch_of(config):
    ids = torch.randint(config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(3))
    return ids[:, :-1], ids[:, 1:]


# ----- which layers


def config_of(depth, arch="speedrun", **changes):
    args = train.parse_args([f"--depth={depth}", f"--arch={arch}"])
    for name, value in changes.items():
        setattr(args, name, value)
    from nanochat.run.plan import model_config

    return model_config(args, 32768)


@pytest.mark.parametrize(
    "config, per_block",
    [
        (config_of(24), {"query", "key", "value", "out", "up", "down"}),
        (config_of(16), {"query", "key", "value", "out", "up", "down"}),  # 1024 x 1024
        (config_of(12), {"up", "down"}),  # 768 x 768 is too small
        (config_of(8), set()),
        (config_of(20, n_kv_head=2), {"query", "out", "up", "down"}),  # 1280 x 256
        (config_of(20, "llama"), {"query", "key", "value", "out", "gate", "up", "down"}),
        (config_of(25, aspect_ratio=60, head_dim=60), set()),  # 1500 wide, which 16 does not divide
    ],
    ids=["d24", "d16", "d12", "d8", "grouped", "llama", "indivisible"],
)
def test_large_divisible_layers_of_the_blocks(config, per_block):
    layers = fp8.large_layers(meta_model(config))
    assert {name.split(".")[-1] for name in layers} == per_block and len(
        layers
    ) == config.depth * len(per_block)
    assert all(name.startswith("blocks.") for name in layers), (
        "the head is large and stays as it is"
    )


def test_how_much_is_in_fp8():
    """All matrices of the 24 blocks, 12 x 1536^2 in each; the rest is the products of attention,
    the head and gates."""
    model = meta_model(config_of(24))
    share = 6 * 12 * 1536**2 * 24 / model.flops_per_token()
    assert (
        fp8.in_words(model, "rowwise")
        == f"144 layers with {share:.0%} of the FLOPs in fp8 (rowwise)"
        and 0.5 < share < 0.9
    )


# ----- the products


def quantized(x, largest, dim=None):
    """x rounded to fp8, in fp64, with one scale or, given dim, one power of two for each slice."""
    kind = {448.0: torch.float8_e4m3fn, 57344.0: torch.float8_e5m2}[largest]
    top = x.float().abs().max() if dim is None else x.float().abs().amax(dim, keepdim=True)
    scale = largest / top.double()
    if dim is not None:
        scale = 2 ** scale.log2().floor()
    scale = scale.float()
    return (x.float() * scale).clamp(-largest, largest).to(kind).double() / scale.double()


def reference(x, weight, grad, recipe):
    """(output, gradient of x, gradient of weight) of x @ weight.T in fp64, operands in fp8."""

    def rounded(tensor, largest, dim):  # dim: the one that the product sums over
        return quantized(tensor, 448.0, dim) if recipe == "rowwise" else quantized(tensor, largest)

    return (
        rounded(x, 448.0, 1) @ rounded(weight, 448.0, 1).T,
        rounded(grad, 57344.0, 1) @ rounded(weight, 448.0, 0),
        rounded(grad, 57344.0, 0).T @ rounded(x, 448.0, 0),
    )


def layer_and_inputs(n_tokens, n_in, n_out):
    generator = torch.Generator().manual_seed(4)
    layer = Linear(n_in, n_out).train()
    with torch.no_grad():
        layer.weight.copy_(
            (torch.rand(n_out, n_in, generator=generator) * 2 - 1) * (3 / n_in) ** 0.5
        )
    x = torch.randn(n_tokens, n_in, generator=generator).bfloat16().requires_grad_()
    grad = (
        torch.randn(n_tokens, n_out, generator=generator) * 1e-5
    ).bfloat16()  # of the size that a mean over 10^5 tokens has
    return layer, x, grad


def pass_of(layer, x, grad):
    x.grad = layer.weight.grad = None
    out = layer(x)
    out.backward(grad)
    return out.detach(), x.grad, layer.weight.grad


def converted(layer, recipe):
    """A layer that multiplies in fp8, as convert() makes those of a model."""
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([layer])})
    fp8.convert(model, recipe)
    return layer


def error(found, exact):
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_products_are_those_of_operands_rounded_to_fp8(emulated, recipe):
    """Output and both gradients; what is left is the rounding of results to bf16."""
    layer, x, grad = layer_and_inputs(48, 96, 160)
    found = pass_of(converted(layer, recipe), x, grad)
    assert [tensor.dtype for tensor in found] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for tensor, exact in zip(
        found, reference(x.detach(), layer.weight.detach(), grad, recipe), strict=True
    ):
        assert error(tensor, exact) < 3e-3


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_how_far_fp8_is_from_bf16(emulated, recipe):
    """At most 5% forward and 8% for gradients; and no closer than fp8 can be, which proves that it
    is in fp8."""
    layer, x, grad = layer_and_inputs(64, 512, 768)
    plain = pass_of(layer, x, grad)
    errors = [
        error(*pair) for pair in zip(pass_of(converted(layer, recipe), x, grad), plain, strict=True)
    ]
    assert 0.02 < errors[0] < 0.05 and all(0.02 < value < 0.08 for value in errors[1:]), errors


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_fp8_instructions_give_what_emulation_gives(emulated, monkeypatch, recipe):
    """torch's own product of fp8 numbers, which a CPU has too, if slow, accepts layouts and
    scales."""
    layer, x, grad = layer_and_inputs(32, 64, 96)
    emulation = pass_of(converted(layer, recipe), x, grad)
    monkeypatch.setattr(fp8, "EMULATE", False)
    for found, expected in zip(pass_of(converted(layer, recipe), x, grad), emulation, strict=True):
        assert error(found, expected) < 3e-3


def test_a_layer_is_one_graph(emulated):
    """Nothing breaks the compiler's graph in two, forward or backward."""
    layer, x, grad = layer_and_inputs(32, 64, 96)
    expected = pass_of(converted(layer, "tensorwise"), x, grad)
    layer.compile(fullgraph=True, backend="aot_eager")
    for found, plain in zip(pass_of(layer, x, grad), expected, strict=True):
        assert error(found, plain) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_compiled_on_a_gpu(recipe):
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < fp8.CAPABILITY:
        pytest.skip("this GPU does not multiply fp8")
    layer, x, grad = layer_and_inputs(256, 1024, 1536)
    exact = reference(x.detach(), layer.weight.detach(), grad, recipe)
    layer, x, grad = (
        converted(layer, recipe).cuda(),
        x.detach().cuda().requires_grad_(),
        grad.cuda(),
    )
    layer.compile(dynamic=False)
    for found, expected in zip(pass_of(layer, x, grad), exact, strict=True):
        assert error(found.cpu(), expected) < 5e-3


# ----- a model


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("arch", ["speedrun", "llama"])
def test_a_model_in_fp8(emulated, recipe, arch):
    """Training differs a little from bf16, evaluation in no bit; parameters keep names, dtypes and
    values."""
    changes = (
        {} if arch == "speedrun" else {"arch": "llama", "window_pattern": "L", "key_shift": False}
    )
    config = GPTConfig(**{**vars(SMALL), **changes})
    plain, model = model_of(config), model_of(config, recipe)
    inputs, targets = batch_of(config)
    loss, in_bf16 = (
        model(inputs, targets, reduction="mean"),
        plain(inputs, targets, reduction="mean"),
    )
    assert loss != in_bf16 and loss.item() == pytest.approx(in_bf16.item(), rel=0.02)
    loss.backward()
    in_bf16.backward()
    gradients, expected = (
        torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, plain)
    )
    assert 0.01 < error(gradients, expected) < 0.2
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    states = [m.state_dict() for m in (plain, model)]
    assert list(states[0]) == list(states[1]) and all(
        torch.equal(a, b) and a.dtype == b.dtype
        for a, b in zip(states[0].values(), states[1].values(), strict=True)
    )
    assert torch.equal(model.eval()(inputs), plain.eval()(inputs))
    assert model.train()(inputs, targets, reduction="mean") == loss, (
        "and back in training it is in fp8 again"
    )


def test_activation_checkpointing_changes_nothing(emulated):
    gradients = []
    for checkpointing in (False, True):
        model = model_of(SMALL, "tensorwise")
        model.checkpointing = checkpointing
        model(*batch_of(SMALL), reduction="mean").backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# ----- runs

FLAGS = (
    "--fp8",
    "--dtype=bfloat16",
    "--aspect-ratio=32",
    "--head-dim=32",
    "--total-batch-size=128",
    "--sample-every=-1",
)


def stop_at(monkeypatch, step):
    """SIGTERM to this process while it writes the metrics line of a step."""
    write = Record.write

    def write_and_stop(self, **values):
        write(self, **values)
        if values.get("step") == step and "train/loss" in values:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Record, "write", write_and_stop)


def test_a_run_in_fp8(emulated, tmp_path, monkeypatch, capsys):
    """Stopped and resumed it is the same to the last bit; its checkpoints have the format of a run
    in bf16, and load without torchao."""
    assert small.run(tmp_path, *FLAGS, tag="whole") == 0
    assert "12 layers with" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        assert small.run(tmp_path, *FLAGS, tag="broken") == 75
    assert small.run(tmp_path, *FLAGS, "--resume", tag="broken") == 0
    assert small.timeless(small.lines(tmp_path, "broken")) == small.timeless(
        small.lines(tmp_path, "whole")
    )
    whole, broken = small.weights(tmp_path, 12, "whole"), small.weights(tmp_path, 12, "broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)

    assert small.run(tmp_path, *FLAGS[1:], tag="bf16") == 0
    plain = small.weights(tmp_path, 12, "bf16")
    assert {n: (t.shape, t.dtype) for n, t in whole.items()} == {
        n: (t.shape, t.dtype) for n, t in plain.items()
    }
    losses, in_bf16 = small.losses(tmp_path, "whole"), small.losses(tmp_path, "bf16")
    assert (
        losses != in_bf16
        and losses == pytest.approx(in_bf16, abs=0.05)
        and losses[11] < losses[0] - 0.3
    )

    # the evaluation at the end was in bf16: the saved weights give the same in a model without fp8
    from nanochat.data.rows import held_out_pieces
    from nanochat.data.sources import local_corpus
    from nanochat.data.token_cache import TokenCache
    from nanochat.eval.bpb import bits_per_byte

    model, tokenizer = loading.load_run(tmp_path / "whole", dtype="bfloat16")
    pieces = held_out_pieces(
        local_corpus(str(tmp_path / "text.txt")).val,
        TokenCache(tokenizer, 1),
        32,
        10**9,
    )
    result = bits_per_byte(model, pieces, tokenizer.byte_counts(), 128, CPU)
    assert small.summary(tmp_path, "whole")["val_bpb"] == pytest.approx(result.bpb, rel=1e-6)


def test_a_run_does_not_change_to_or_from_fp8(emulated, tmp_path, capsys):
    flags = [*FLAGS, "--num-iterations=2", "--eval-every=-1"]
    assert small.run(tmp_path, *flags, tag="fp8") == 0
    assert small.run(tmp_path, *flags[1:], tag="bf16") == 0
    assert small.run(tmp_path, *flags, "--fp8-recipe=rowwise", "--resume", tag="fp8") == 2
    assert "--fp8-recipe=rowwise (was tensorwise)" in capsys.readouterr().err
    assert small.run(tmp_path, *flags, "--resume", tag="bf16") == 2
    assert "--fp8=True (was False)" in capsys.readouterr().err
    assert (
        train.run(
            [
                "--resume",
                f"--out-dir={tmp_path}",
                "--model-tag=fp8",
                "--no-compile",
                "--num-iterations=3",
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "fp8" / "config.json").read_text())["args"]["fp8"] is True, (
        "fp8 without being told again"
    )


# ----- refusals


def refused(
    config=SMALL, device_type="cuda", dtype=torch.bfloat16, no_compiler=None, capability=(9, 0)
):
    with pytest.raises(UsageError) as raised:
        fp8.require(meta_model(config), device_type, dtype, no_compiler, capability)
    return str(raised.value).splitlines()


def test_what_is_in_the_way_is_told_at_once():
    lines = refused(
        GPTConfig(**{**vars(SMALL), "max_seq_len": 40}), "cpu", torch.bfloat16, "no g++"
    )
    assert [all(line.startswith("--fp8: ") for line in lines), len(lines)] == [True, 4]
    for words, line in zip(
        ["this is cpu", "not compiled (no g++)", "no layer is large enough", "--max-seq-len=40"],
        lines,
        strict=True,
    ):
        assert words in line
    assert "SM80 does not multiply fp8" in refused(capability=(8, 0))[0]
    assert "not float32; leave --dtype out" in refused(dtype=torch.float32)[0]
    fp8.require(meta_model(config_of(24)), "cuda", torch.bfloat16, None, (8, 9))


def test_without_torchao(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    lines = refused(config_of(24))
    assert len(lines) == 1 and f"pip install {packages.OPTIONAL['torchao'].requirement}" in lines[0]


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ["--fp8", "--compile", "--dtype=auto"],
            ["--fp8: a GPU that multiplies fp8 is needed (this is cpu)", "--gpu=NAME"],
        ),
        (
            ["--fp8"],
            [
                "--dtype=float32: layers that --fp8 does not convert compute in bfloat16",
                "--fp8: slower",
                "leave --no-compile out",
            ],
        ),
        (["--fp8-recipe=rowwise"], ["--fp8-recipe=rowwise: needs --fp8"]),
    ],
)
def test_refused_before_any_work(tmp_path, capsys, flags, words):
    assert small.run(tmp_path, *flags) == 2
    shown = capsys.readouterr()
    assert [word for word in words if word not in shown.err] == [] and "plan:" not in shown.out
    assert not (tmp_path / "run").exists()


def test_plans(capsys):
    assert train.run(["--dry-run", "--depth=24", "--gpus=8", "--gpu=H100", "--fp8"]) == 0
    shown = capsys.readouterr().out
    assert (
        "144 layers with 82% of the FLOPs in fp8 (tensorwise)" in shown
        and "listed bf16 peak of H100" in shown
    )
    assert train.run(["--dry-run", "--depth=12", "--gpu=L4", "--fp8", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["fp8_layers"]) == 24
    assert train.run(["--dry-run", "--depth=24", "--gpu=A100", "--fp8"]) == 2
    assert "SM80 does not multiply fp8" in capsys.readouterr().err


def test_importing_is_light():
    """torchao takes seconds to import, and may not be there."""
    import subprocess
    import sys

    code = "import sys, nanochat.model.fp8, nanochat.run.plan\nassert 'torchao' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=small.ROOT, check=True)
