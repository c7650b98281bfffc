"""The steps of `nanochat dpo` are those of TRL's DPOTrainer, on an exported llama in fp32.

Needs the package trl, which is no dependency: pip install trl."""

import json

import pytest
import torch
from test_export_chat import chat_run

from nanochat import load
from nanochat.apps import export
from nanochat.apps.export.fields import tensor_name
from nanochat.data.examples import Source
from nanochat.data.pair_rows import rows_of
from nanochat.data.preferences import read_pairs
from nanochat.eval.preferences import Pass, logprobs_of
from nanochat.model.preference_loss import pair_loss

trl = pytest.importorskip("trl", reason="needs the package trl")
transformers = pytest.importorskip("transformers", reason="needs the package transformers")
datasets = pytest.importorskip("datasets", reason="needs the package datasets")

pytestmark = pytest.mark.slow
T = 31
BETA = 0.3
STEPS = 3
LEARNING_RATE = 0.02
# (loss, label smoothing, TRL's name of the loss, pairs of a step). TRL's "sigmoid" ignores label
# smoothing; "aot" has it, and of a single pair its sorting of the batch changes nothing.
LOSSES = [
    ("sigmoid", 0.0, "sigmoid", 4),
    ("ipo", 0.0, "ipo", 4),
    ("sigmoid", 0.2, "aot", 1),
]
# what TRL logs, in the order of what pair_loss() sums
LOGGED = [
    "rewards/accuracies",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
]


def turns(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def made_pairs(n):
    """Pairs of one and of two turns with answers of different lengths."""
    pairs = []
    for i in range(n):
        prompt = turns(f"{i} + {i}?") if i % 3 else turns("a?", "b", f"{i}?")
        pairs.append({"prompt": prompt, "chosen": f"{2 * i}", "rejected": "no" + i % 4 * "o"})
    return pairs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(run folder, exported folder, pairs as lines, pairs as nanochat reads them)."""
    root = tmp_path_factory.mktemp("trl")
    run, out = chat_run(root / "run", kind="byte"), root / "hf"
    assert export.main([str(run), "--format", "hf", str(out)]) == 0
    lines = made_pairs(STEPS * 4)
    path, held_out = root / "pairs.jsonl", root / "held_out.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    held_out.write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}) + "\n")
    _, tokenizer = load(run, device_type="cpu", dtype="float32")
    found = read_pairs([Source(path)], tokenizer, T + 1, held_out=[held_out], strict=True)
    assert len(found.train) == len(lines)
    return run, out, lines, found.train


def trainer_of(out, folder, lines, **options):
    """TRL's trainer with the exported model, and as its reference the same."""

    def model():
        return transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)

    as_messages = [
        {
            "prompt": line["prompt"],
            "chosen": [{"role": "assistant", "content": line["chosen"]}],
            "rejected": [{"role": "assistant", "content": line["rejected"]}],
        }
        for line in lines
    ]
    config = trl.DPOConfig(
        str(folder),
        beta=BETA,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        **options,
    )
    return trl.DPOTrainer(
        model(),
        ref_model=model(),
        args=config,
        train_dataset=datasets.Dataset.from_list(as_messages),
        processing_class=transformers.AutoTokenizer.from_pretrained(out),
    )


def perturb(ours, theirs):
    """The same noise on both policies, which so differ from their reference."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            noise = 0.05 * torch.randn(parameter.shape, generator=generator)
            parameter += noise
            theirs[tensor_name(name, "llama")] += noise


@pytest.mark.parametrize("variant, smoothing, name, n", LOSSES, ids=lambda value: str(value))
def test_steps_are_those_of_trl(made, tmp_path, variant, smoothing, name, n):
    """Token ids, losses, rewards, log-probabilities and gradients of steps that follow one another,
    each side with its own weights."""
    run, out, lines, pairs = made
    trainer = trainer_of(out, tmp_path, lines, loss_type=[name], label_smoothing=smoothing)
    model, tokenizer = load(run, device_type="cpu", dtype="float32")
    theirs = dict(trainer.model.named_parameters())
    how = Pass(T=T, padding=tokenizer.bos, device_rows=8, device=torch.device("cpu"))
    reference = logprobs_of(model, pairs, how)
    perturb(model, theirs)
    model.train()
    trainer.model.train()
    assert {tensor_name(own, "llama") for own, _ in model.named_parameters()} == set(theirs)

    for step in range(STEPS):
        numbers = list(range(step * n, step * n + n))
        inputs, targets = map(torch.from_numpy, rows_of(pairs, numbers, T, tokenizer.bos))
        batch = trainer.data_collator([trainer.train_dataset[i] for i in numbers])
        same_tokens(inputs, targets, batch)

        model.zero_grad()
        total, logged = pair_loss(
            model(inputs, targets),
            targets,
            reference[numbers].flatten(),
            beta=BETA,
            variant=variant,
            label_smoothing=smoothing,
        )
        loss = total / n
        loss.backward()

        trainer.model.zero_grad()
        trainer._metrics["train"].clear()
        expected = trainer.compute_loss(trainer.model, batch)
        expected.backward()

        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
        their_log = trainer._metrics["train"]
        means = torch.tensor([their_log[key][0] for key in LOGGED])
        torch.testing.assert_close(logged / n, means, rtol=1e-6, atol=1e-5)
        largest = 0.0
        with torch.no_grad():
            for own, parameter in model.named_parameters():
                other = theirs[tensor_name(own, "llama")]
                torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=1e-5)
                largest = max(largest, other.grad.abs().max().item())
                parameter -= LEARNING_RATE * parameter.grad
                other -= LEARNING_RATE * other.grad
        # gradients that could be told from nothing
        assert largest > 1e-2


def same_tokens(inputs, targets, batch):
    """TRL has all chosen answers, then all rejected; padding and its length are its own."""
    order = [*range(0, len(inputs), 2), *range(1, len(inputs), 2)]
    for row, ids, mask, known in zip(
        order, batch["input_ids"], batch["completion_mask"], batch["attention_mask"], strict=True
    ):
        length = int(known.sum())
        assert inputs[row, : length - 1].tolist() == ids[: length - 1].tolist()
        wanted = torch.where(mask[1:length] == 1, ids[1:length], -1)
        assert targets[row, : length - 1].tolist() == wanted.tolist()
        assert (targets[row, length - 1 :] == -1).all()
