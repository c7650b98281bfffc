"""Answers to CORE prompts, against naive_core.py, which shares no code, and worked examples."""

import dataclasses
import json
import types

import naive_core
import pytest
import small
import torch
from hub_server import HubServer, blob_sha1

from nanochat.common import Unavailable, UsageError
from nanochat.data import download
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval import core, core_bundle
from nanochat.eval.core_answers import answers_of
from nanochat.eval.kv_cache import Branches, KVCache
from nanochat.eval.unison import EvaluationFailed
from nanochat.model.build import build, for_inference
from nanochat.model.config import GPTConfig
from nanochat.signals import Stopped
from tasks.core import LABELS, Task, prompts_of

CPU = torch.device("cpu")
BYTES = Tokenizer("byte", [bytes([i]) for i in range(256)])
BOS = BYTES.bos
EVALUATE = """
import json, sys
import torch
import small, test_core
from nanochat import ranks
from nanochat.eval import core
ranks.setup("cpu")
model = test_core.noisy_model()
prompts = core.Core(sys.argv[1], test_core.BYTES, 640)
prompts.describe(1.0, 1.0)
result = core.evaluate(model, prompts, 700, torch.device("cpu"))
open(sys.argv[2] + str(ranks.rank()), "w").write(json.dumps(test_core.timeless(result)))
ranks.close()
"""


def noisy_model(dtype=torch.float32, **changes):
    """A small model whose every part matters: freshly initialised, blocks would add nothing."""
    config = GPTConfig(
        **{
            "depth": 3,
            "width": 32,
            "head_dim": 16,
            "n_head": 2,
            "n_kv_head": 1,
            "vocab_size": BYTES.vocab_size,
            "max_seq_len": 64,
            "short_window": 24,
            "key_shift": changes.get("arch") != "llama",
            **changes,
        }
    )
    model = build(config, CPU, dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def described(folder, limit, max_per_task=-1, tokenizer=BYTES, **options):
    prompts = core.Core(folder, tokenizer, limit, max_per_task=max_per_task, **options)
    prompts.describe(1.0, 1.0)
    return prompts


def timeless(result):
    """A result as JSON has it, without the times."""
    fields = dataclasses.asdict(result)
    for task in (fields, *fields["tasks"].values()):
        del task["seconds"]
    return fields


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return small.core_bundle(tmp_path_factory.mktemp("core"))


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("arch", [{}, {"arch": "llama", "window_pattern": "L", "n_kv_head": 2}])
def test_answers_are_those_of_the_naive_way(bundle, arch, crop):
    """For any batch size: alone, with others, all at once."""
    model = noisy_model(**arch)
    expected = naive_core.evaluate(bundle, model, BYTES, crop=crop)
    assert len({answer for task in expected.values() for answer in task["answers"]}) > 2
    for batch_tokens in (1, 700, 10**6):
        prompts = described(bundle, 64 if crop else 640, published_crop=crop)
        result = core.evaluate(model, prompts, batch_tokens, CPU)
        assert {label: task.answers for label, task in result.tasks.items()} == {
            label: list(map(int, task["answers"])) for label, task in expected.items()
        }
        assert result.core_metric == pytest.approx(naive_core.core(expected), abs=1e-12)
        assert result.tasks["squad"].cropped == 6 * crop and result.reason is None
        assert result.low <= result.core_metric <= result.high and result.n == 22 * 6


@pytest.mark.skipif(not (small.SHARED / "core").is_dir(), reason="needs the shared CORE bundle")
def test_published_bundle():
    """All 22 tasks, five examples each."""
    model = noisy_model()
    expected = naive_core.evaluate(small.SHARED / "core", model, BYTES, max_per_task=5)
    result = core.evaluate(model, described(small.SHARED / "core", 640, 5), 4096, CPU)
    assert list(result.tasks) == list(LABELS)
    for label, task in result.tasks.items():
        assert task.answers == list(map(int, expected[label]["answers"])), label
        assert (task.n, task.malformed, len(task.correct)) == (5, 0, 5)
        assert task.centered == pytest.approx(expected[label]["centered"], abs=1e-12)


def test_answers_on_two_ranks(bundle, tmp_path):
    two = small.ranks_of(tmp_path, 2, [str(bundle), str(tmp_path / "rank")], EVALUATE)
    assert two.returncode == 0, two.stderr
    found = [json.loads((tmp_path / f"rank{i}").read_text()) for i in range(2)]
    alone = core.evaluate(noisy_model(), described(bundle, 640), 700, CPU)
    assert found[0] == found[1] == timeless(alone)


def test_bf16_answers_are_nearly_those_of_fp32(bundle):
    answers = [
        core.evaluate(noisy_model(dtype), described(bundle, 640), 700, CPU).tasks
        for dtype in (torch.float32, torch.bfloat16)
    ]
    pairs = [
        pair
        for label in LABELS
        for pair in zip(*(found[label].answers for found in answers), strict=True)
    ]
    assert sum(a != b for a, b in pairs) <= 0.1 * len(pairs)


# ---- examples worked out by hand ----


class Pairs(torch.nn.Module):
    """A model whose logit is 4 for a liked pair of bytes and 0 for all others.

    The mean loss of b bytes, of which h are liked, is log(256 + e^4) - 4 h / b, more or less, where
    one byte is liked after each."""

    compute_dtype = torch.float32

    def __init__(self, liked):
        super().__init__()
        self.config = types.SimpleNamespace(vocab_size=BYTES.vocab_size, max_seq_len=64)
        table = torch.zeros(BYTES.vocab_size, BYTES.vocab_size)
        for first, second in liked:
            table[ord(first), ord(second)] = 4.0
        self.table = table

    def hidden(self, ids, cache=None):
        return self.table[ids]

    def logits(self, hidden):
        return hidden


LIKED = ["ab", "bc", "cd", " x", "xy", "de"]


def answer_of(kind, example, others=(), limit=640, delimiter=" ", liked=LIKED):
    """(answer, empty spans, scored text of each row) of one example; two shots are of `others`."""
    examples = [example, *others]
    task = Task("made up", None, kind, 2, delimiter, 0.0)
    [prompt] = prompts_of(task, examples, BYTES, limit, [0])
    prompt = dataclasses.replace(prompt, shared=0)  # it takes no cache
    [(answer, empty)] = answers_of(Pairs(liked), [prompt], kind, CPU)
    spans = [
        bytes(prompt.rows[row][prompt.starts[row] :].tolist()).decode() for row in prompt.row_of
    ]
    return answer, empty, spans


MULTIPLE_CHOICE = [
    (
        {"query": "Q", "choices": ["zz", "abc", "ax"], "gold": 0},
        {},
        (1, 0, ["zz", "abc", "ax"]),
    ),  # after " ": a no; ab, bc liked
    (
        {"query": "a", "choices": ["b", "x"], "gold": 0},
        {},
        (1, 0, ["b", "x"]),
    ),  # it is the delimiter that goes before: " x" is liked
    ({"query": "a", "choices": ["b", "x"], "gold": 0}, {"delimiter": ""}, (0, 0, ["b", "x"])),
    (
        {"query": "Q", "choices": ["abq", "ab"], "gold": 0},
        {},
        (0, 1, ["q", ""]),
    ),  # the second has nothing of its own: never chosen
    (
        {"query": "Q", "choices": ["same", "same", "same"], "gold": 2},
        {},
        (0, 3, ["", "", ""]),
    ),  # a tie of nothing: the first
    (
        {"query": "Q", "choices": ["qq", "qr", "qq"], "gold": 2},
        {},
        (0, 0, ["q", "r", "q"]),
    ),  # a tie: the first
    ({"query": "Q", "choices": ["qabcd", "qab"], "gold": 0}, {}, (0, 1, ["cd", ""])),
    (
        {"query": "Q", "choices": ["zbzzzzzz", "ab"], "gold": 0},
        {},
        (1, 0, ["zbzzzzzz", "ab"]),
    ),  # the mean, not the sum
    (
        {"query": "long " * 30, "choices": ["zz", "xy"], "gold": 0},
        {"limit": 20},
        (1, 0, ["zz", "xy"]),
    ),
    (
        {"query": "Q", "choices": ["z" * 30, "xy" * 15], "gold": 0},
        {"limit": 20},
        (1, 0, ["z" * 19, "y" + "xy" * 9]),
    ),
]
SCHEMA = [
    (
        {"context_options": ["end a", "end b"], "continuation": "c", "gold": 0},
        {},
        (0, 0, [" c", " c"]),
    ),  # a tie
    (
        {"context_options": ["end a", "end b"], "continuation": "c", "gold": 0},
        {"delimiter": ""},
        (1, 0, ["c", "c"]),
    ),  # bc
    (
        {"context_options": ["b to", "a to"], "continuation": "xy", "gold": 0},
        {},
        (0, 0, [" to xy", " to xy"]),
    ),  # alike before, too
    (
        {"context_options": ["a", "z"], "continuation": "b", "gold": 0},
        {"delimiter": ""},
        (0, 0, ["b", "b"]),
    ),
    (
        {"context_options": ["one", "one"], "continuation": "x", "gold": 1},
        {},
        (0, 0, ["one x", "one x"]),
    ),  # alike: a tie, BOS unscored
    (
        {"context_options": ["long " * 9 + "c", "long " * 9 + "b"], "continuation": "d", "gold": 0},
        {"limit": 9, "delimiter": ""},
        (0, 0, ["d", "d"]),
    ),
]
LANGUAGE = [
    (
        {"context": "Q", "continuation": "xyz"},
        {},
        (0, 0, [" xyz"]),
    ),  # after "Q" a blank was to be predicted
    ({"context": "Q", "continuation": "xy"}, {"liked": [*LIKED, "Q "]}, (1, 0, [" xy"])),
    (
        {"context": "Q: ", "continuation": "xy"},
        {"liked": [*LIKED, ": "]},
        (1, 0, [" xy"]),
    ),  # white space at its end is dropped
    ({"context": "ab", "continuation": "cde"}, {"delimiter": ""}, (1, 0, ["cde"])),
    (
        {"context": "ab", "continuation": "cdf"},
        {"delimiter": ""},
        (0, 0, ["cdf"]),
    ),  # all tokens, or it is wrong
    (
        {"context": "ab", "continuation": "cd "},
        {"delimiter": ""},
        (0, 0, ["cd "]),
    ),  # white space at the end is predicted, too
    (
        {"context": "ab", "continuation": ""},
        {"delimiter": ""},
        (0, 1, [""]),
    ),  # nothing was predicted
    (
        {"context": "long " * 30 + "ab", "continuation": "cd"},
        {"delimiter": "", "limit": 12},
        (1, 0, ["cd"]),
    ),
]


@pytest.mark.parametrize(
    "kind,example,options,expected",
    [
        (kind, *case)
        for kind, cases in (
            ("multiple_choice", MULTIPLE_CHOICE),
            ("schema", SCHEMA),
            ("language_modeling", LANGUAGE),
        )
        for case in cases
    ],
)
def test_worked_examples(kind, example, options, expected):
    assert answer_of(kind, example, **options) == expected


def test_few_shot_examples_come_before():
    """Their order is drawn; their text does not change what is scored."""
    others = [{"query": f"S{i}", "choices": ["n", "y"], "gold": 1} for i in range(4)]
    example = MULTIPLE_CHOICE[0][0]
    assert answer_of("multiple_choice", example, others) == MULTIPLE_CHOICE[0][2]
    task = Task("made up", None, "multiple_choice", 2, " ", 0.0)
    [prompt] = prompts_of(task, [example, *others], BYTES, 640, [0])
    assert bytes(prompt.rows[1][1:].tolist()) == b"S3 y\n\nS0 y\n\nQ abc"


# ---- parts of the model ----


@pytest.mark.parametrize("arch", [{}, {"arch": "llama", "window_pattern": "L"}])
def test_branches_of_a_filled_cache_go_on_like_whole_rows(arch):
    model = noisy_model(**arch)
    ids = torch.randint(BYTES.vocab_size, (2, 40), generator=torch.Generator().manual_seed(2))
    tails = torch.randint(BYTES.vocab_size, (4, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        lengths = [40, 17]  # of what the second is longer nothing may be used
        cache = KVCache(model.config, 2, 40, CPU, torch.float32, lengths)
        assert model.hidden(ids, cache, fill=True) is None
        found = model.hidden(tails, Branches(cache, 2, 49, model.embed(ids[[0, 1], [39, 16]])))
        for row, tail, one in zip((0, 0, 1, 1), tails, found, strict=True):
            whole = model.hidden(torch.cat((ids[row, : lengths[row]], tail))[None])[
                0, lengths[row] :
            ]
            torch.testing.assert_close(one, whole, rtol=1e-4, atol=1e-4)
    assert cache.length == 40


@pytest.mark.parametrize("arch", [{}, {"arch": "llama", "window_pattern": "L"}])
def test_inference_copy_changes_no_bit(arch):
    model = noisy_model(torch.bfloat16, **arch)
    copy = for_inference(model)
    ids = torch.randint(BYTES.vocab_size, (2, 40), generator=torch.Generator().manual_seed(2))
    assert (
        copy is not model
        and copy.embedding.weight.dtype == torch.bfloat16
        and model.embedding.weight.dtype == torch.float32
    )
    with torch.no_grad():
        assert torch.equal(model(ids), copy(ids))
    assert for_inference(plain := noisy_model()) is plain


def test_training_mode_is_given_back(bundle):
    model = noisy_model().train()
    assert core.evaluate(model, described(bundle, 640, 2), 700, CPU).core_metric is not None
    assert model.training


# ---- what goes wrong ----


def test_damaged_weights_fail_the_evaluation(bundle):
    model = noisy_model()
    model.head.weight.data[7] = float("nan")
    with pytest.raises(
        EvaluationFailed, match="hellaswag_zeroshot: ValueError: the model's losses are not finite"
    ):
        core.evaluate(model, described(bundle, 640), 700, CPU)


def test_interrupted(bundle):
    asked = iter([False, False, True])
    with pytest.raises(Stopped):
        core.evaluate(
            noisy_model(), described(bundle, 640), 700, CPU, interrupted=lambda: next(asked)
        )


def test_progress_reaches_the_end(bundle):
    shares = []
    core.evaluate(
        noisy_model(),
        described(bundle, 640),
        700,
        CPU,
        progress=lambda share, label, left: shares.append((share, label, left)),
    )
    assert (
        shares == sorted(shares, key=lambda entry: entry[0])
        and shares[-1][0] == pytest.approx(1)
        and shares[-1][2] < 1e-3
    )
    assert {label for _, label, _ in shares} == set(LABELS)


@pytest.mark.parametrize(
    "damage,why",
    [
        (lambda path: path.unlink(), "copa.jsonl is missing"),
        (lambda path: path.write_text(""), "holds no example of its kind (0 malformed lines)"),
        (
            lambda path: path.write_text("{}\n[1]\n"),
            "holds no example of its kind (2 malformed lines)",
        ),
    ],
)
def test_a_task_that_cannot_be_evaluated(tmp_path, damage, why):
    """The others are; there is no metric, and no zero."""
    bundle = small.core_bundle(tmp_path)
    damage(bundle / "eval_data/commonsense_reasoning/copa.jsonl")
    prompts = core.Core(bundle, BYTES, 640)
    assert any(
        "copa cannot be evaluated" in line and why in line for line in prompts.describe(1.0, 1.0)
    )
    result = core.evaluate(noisy_model(), prompts, 700, CPU)
    assert (
        result.core_metric is None
        and "1 of 22 tasks were not evaluated: copa (" in result.reason
        and why in result.reason
    )
    assert "copa" not in result.tasks and len(result.tasks) == 21 and result.n == 21 * 6


def test_a_file_that_goes_away_during_an_evaluation(tmp_path):
    bundle = small.core_bundle(tmp_path)
    prompts = described(bundle, 640, keep=False)
    (bundle / "eval_data/commonsense_reasoning/copa.jsonl").unlink()
    result = core.evaluate(noisy_model(), prompts, 700, CPU)
    assert result.core_metric is None and result.tasks["copa"].accuracy is None
    assert "cannot be read" in result.tasks["copa"].reason and "copa" in result.reason


RANK_LOCAL = """
import sys
import small, test_core
from nanochat import ranks
from nanochat.eval import core
from nanochat.common import UsageError
ranks.setup("cpu")
model, prompts = test_core.noisy_model(), core.Core(sys.argv[1], test_core.BYTES, 640)
prompts.describe(1.0, 1.0)
encode = prompts.tokenizer.encode_batch
def encode_or_not(texts, threads=1):
    if ranks.rank() == 1 and any("of copa" in text for text in texts):
        raise UsageError("a character of copa")
    return encode(texts, threads)
prompts.tokenizer.encode_batch = encode_or_not
result = core.evaluate(model, prompts, 700, test_core.CPU)
assert result.core_metric is None and result.tasks["copa"].accuracy is None, result.tasks["copa"]
assert "a character of copa" in result.tasks["copa"].reason and result.tasks["boolq"].n == 6
ranks.close()
"""


def test_what_one_rank_cannot_read_is_nothing_on_all(bundle, tmp_path):
    """Not a score made of what the others have."""
    two = small.ranks_of(tmp_path, 2, [str(bundle)], RANK_LOCAL)
    assert two.returncode == 0, two.stderr


def test_no_memory_for_a_copy_of_the_weights(bundle, monkeypatch):
    """The model itself gives the same answers."""
    model = noisy_model(torch.bfloat16)
    expected = core.evaluate(model, described(bundle, 640, 2), 700, CPU)

    def full(model):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(core, "for_inference", full)
    found = core.evaluate(model, described(bundle, 640, 2), 700, CPU)
    assert [task.answers for task in found.tasks.values()] == [
        task.answers for task in expected.tasks.values()
    ]


def test_a_tokenizer_that_lacks_characters(bundle):
    characters = Tokenizer("char", [c.encode() for c in sorted(set("Question what follows again"))])
    prompts = core.Core(bundle, characters, 640)
    assert any(
        "cannot be evaluated" in line and "is not among this tokenizer's" in line
        for line in prompts.describe(1.0, 1.0)
    )
    result = core.evaluate(noisy_model(), prompts, 700, CPU)
    assert result.core_metric is None and result.tasks == {}


def test_fewer_examples_than_shots(tmp_path):
    result = core.evaluate(
        noisy_model(), described(small.core_bundle(tmp_path, n=1), 640), 700, CPU
    )
    assert {task.shots for task in result.tasks.values()} == {0}
    assert result.core_metric is not None and result.tasks["copa"].stderr is None


def test_some_tasks_give_no_metric(bundle):
    result = core.evaluate(
        noisy_model(), described(bundle, 640, labels=("copa", "boolq")), 700, CPU
    )
    assert (
        set(result.tasks) == {"copa", "boolq"}
        and result.core_metric is None
        and "left out by --tasks" in result.reason
    )
    with pytest.raises(UsageError, match="--tasks=mmlu: not among the CORE tasks"):
        core.Core(bundle, BYTES, 640, labels=("copa", "mmlu"))


# ---- the bundle's whereabouts ----


def test_given_bundles(bundle, tmp_path):
    assert core_bundle.find_bundle(str(bundle)) == bundle
    (tmp_path / "eval_bundle").symlink_to(bundle)
    assert (
        core_bundle.find_bundle(str(tmp_path)) == tmp_path / "eval_bundle"
    )  # as the published archive unpacks
    (tmp_path / "bundle.zip").write_text("")
    for path, message in (
        (tmp_path / "bundle.zip", "unpack it"),
        (tmp_path / "none", "no core.yaml in this folder"),
    ):
        with pytest.raises(UsageError, match=message):
            core_bundle.find_bundle(str(path))


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A server with a bundle's files in place of the published ones, and their checksums."""
    bundle = small.core_bundle(tmp_path)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr(download, "BACKOFF_S", 0.0)
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    contents = {
        str(path.relative_to(bundle / "eval_data")): path.read_bytes()
        for path in (bundle / "eval_data").rglob("*.jsonl")
    }
    with HubServer(0) as server:
        for uri, content in contents.items():
            server.add_url(f"/examples/{uri}", content)
        server.add_url("/table.csv", (bundle / "eval_meta_data.csv").read_bytes())
        monkeypatch.setattr(core_bundle, "EXAMPLES_URL", f"{server.url}/examples/")
        monkeypatch.setattr(core_bundle, "CHANCES_URL", f"{server.url}/table.csv")
        table = (bundle / "eval_meta_data.csv").read_bytes()
        monkeypatch.setattr(core_bundle, "CHANCES", (blob_sha1(table), len(table)))
        monkeypatch.setattr(
            core_bundle,
            "EXAMPLES",
            {
                uri: (blob_sha1(content), None if "hellaswag" in uri else len(content))
                for uri, content in contents.items()
            },
        )
        yield server


def test_download(published, tmp_path, bundle):
    folder = core_bundle.find_bundle("", report=lambda text: None)
    assert folder == tmp_path / "base/core"
    assert (
        core.evaluate(noisy_model(), described(folder, 640), 700, CPU).core_metric
        == core.evaluate(noisy_model(), described(bundle, 640), 700, CPU).core_metric
    )
    assert not list((tmp_path / "base/hub").rglob("*.jsonl"))  # nothing stands twice
    published.fault("", "status", times=None, code=404)
    assert core_bundle.find_bundle("") == folder  # from now on without a network


@pytest.mark.parametrize("kind", ["corrupt", "status"])
def test_failed_download_leaves_no_half_bundle(published, tmp_path, kind):
    published.fault("boolq", kind, times=None, **({"code": 404} if kind == "status" else {}))
    with pytest.raises(Unavailable, match="boolq.jsonl of 127.0.0.1"):
        core_bundle.find_bundle("", report=lambda text: None)
    assert not (tmp_path / "base/core").exists()
    published.faults.clear()
    assert (core_bundle.find_bundle("", report=lambda text: None) / "core.yaml").exists()


def test_published_files_are_named_by_their_content():
    """The checksums, on the shared files; its hellaswag is another text of the same examples."""
    if not (small.SHARED / "core").is_dir():
        pytest.skip("needs the shared CORE bundle")
    content = (small.SHARED / "core/eval_meta_data.csv").read_bytes()
    checksum = blob_sha1(content), len(content)
    assert checksum == core_bundle.CHANCES
    for uri, (blob, n_bytes) in core_bundle.EXAMPLES.items():
        content = (small.SHARED / "core/eval_data" / uri).read_bytes()
        assert "hellaswag" in uri or (blob, n_bytes) == (blob_sha1(content), len(content)), uri
