"""lm_eval's `local-completions` against `nanochat serve`: the numbers of its `hf` model on the
exported folder."""

import pytest
from serving import application, running
from test_export import LLAMA, SPEEDRUN, code_cache, make_run  # noqa: F401

from nanochat.apps import export
from nanochat.apps.serve import build_parser
from nanochat.apps.serve.runs import load_runs

pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install 'lm_eval[api]')")
for package in ("aiohttp", "tenacity", "accelerate"):
    pytest.importorskip(package, reason=f"{package} is not installed; lm_eval needs it here")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402

# a minute, most of it imports
pytestmark = pytest.mark.slow

CONTEXT = 64
MODELS = {
    "llama": LLAMA | {"max_seq_len": CONTEXT},
    "speedrun": SPEEDRUN | {"max_seq_len": CONTEXT, "short_window": 20},
}
PAIRS = [
    ("The café sold", " 12 crêpes"),
    ("The café sold", " plain words"),
    ("plain words and", " more"),
    ("def f(x):", "\n\t\treturn x"),
    # the beginning of a document: lm_eval puts BOS before it
    ("", "日本語"),
    # longer than the context: its end is kept
    ("plain words and more " * 12, " plain"),
]
TEXTS = ["plain words", "The café sold 12 crêpes. 🙂", "more and more plain words " * 8]
GENERATED = [
    ("The café", {"until": ["\n\n", "Q:", "e", "</s>", "Question:"], "max_gen_toks": 12}),
    ("def f", {"until": ["zzz"], "max_gen_toks": 9, "do_sample": False, "temperature": 0.0}),
    ("plain words", {"until": [], "max_gen_toks": 16}),
]


@pytest.fixture(scope="module", params=MODELS)
def served(request, tmp_path_factory):
    """Models of lm_eval by their options: from a server of a run, and from its exported folder."""
    root = tmp_path_factory.mktemp("lm_eval")
    run = make_run(root / request.param, MODELS[request.param])
    folder = root / "exported"
    assert export.main([str(run), "--format", "hf", str(folder)]) == 0
    # a request has more texts than there are slots and places in the queue
    flags = ["--slots=1", "--queue=4", "--device-type=cpu", "--dtype=float32"]
    args = build_parser().parse_args([str(run), *flags])
    with running(application(*load_runs(args))) as url:

        def from_server(**options):
            return get_model("local-completions")(
                model=run.name,
                base_url=f"{url}/v1/completions",
                tokenizer=str(folder),
                tokenizer_backend="huggingface",
                max_length=CONTEXT,
                max_retries=1,
                **options,
            )

        def from_folder(**options):
            return get_model("hf")(
                pretrained=str(folder),
                device="cpu",
                dtype="float32",
                batch_size=1,
                trust_remote_code=True,
                # local-completions keeps room for BOS and for the token that it asks for
                max_length=CONTEXT - 2,
                **options,
            )

        yield from_server, from_folder


def answers(model, pairs=PAIRS, texts=TEXTS):
    """What a model of lm_eval answers to each of its three kinds of request."""

    def ask(kind, arguments):
        instances = [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]
        return getattr(model, kind)(instances, disable_tqdm=True)

    return (
        ask("loglikelihood", pairs),
        ask("loglikelihood_rolling", [(text,) for text in texts]),
        ask("generate_until", GENERATED),
    )


def check(found, expected):
    """Log-probabilities to the rounding of fp32, the rest exactly."""
    (pairs, texts, generated), (pairs_hf, texts_hf, generated_hf) = found, expected
    assert [value for value, _ in pairs] == pytest.approx([v for v, _ in pairs_hf], abs=1e-4)
    assert [is_greedy for _, is_greedy in pairs] == [is_greedy for _, is_greedy in pairs_hf]
    assert texts == pytest.approx(texts_hf, abs=1e-4)
    assert generated == generated_hf and all(generated)


@pytest.mark.parametrize("has_bos", [False, True])
def test_ids_are_taken_as_they_are(served, has_bos):
    """With and without BOS; one by one, in batches, and several batches at a time."""
    from_server, from_folder = served
    expected = answers(from_folder(add_bos_token=has_bos))
    for options in ({}, {"batch_size": 8}, {"batch_size": 4, "num_concurrent": 2}):
        check(answers(from_server(add_bos_token=has_bos, **options)), expected)


def test_texts_begin_with_bos(served):
    from_server, from_folder = served
    # what is longer than the context is cut as ids, of which none is BOS
    pairs, texts = PAIRS[:-1], TEXTS[:-1]
    found = answers(from_server(tokenized_requests=False, batch_size=8), pairs, texts)
    of_pairs, _, generated = answers(from_folder(add_bos_token=True), pairs, texts)
    # of whole texts lm_eval itself puts BOS first, once
    _, of_texts, _ = answers(from_folder(add_bos_token=False), pairs, texts)
    check(found, (of_pairs, of_texts, generated))
