"""Whether an exported folder computes in transformers what our model and tokenizer compute here."""

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanochat.apps.export.tokenizer_files import PAD_TEXT
from nanochat.data.chat import is_chat, render
from nanochat.eval.generation import generate_ids
from nanochat.eval.hf_model import quiet, run_code_from_throwaway_cache

if TYPE_CHECKING:
    import transformers

    from nanochat.data.tokenizer import Tokenizer
    from nanochat.model.decoder import Decoder

# Of logits in fp32, relative to the largest one.
TOLERANCE = 1e-5
# Models with large weights amplify rounding beyond that. What rounding alone does is measured: the
# same model is run with two attention backends.
ROUNDING_FACTOR = 4
# Tokens per row of the comparison of logits, at most.
VERIFY_TOKENS = 512
# New tokens per prompt of the comparison of generate(), at most.
GENERATED_TOKENS = 16
# Blanks, digits, accents in both forms, scripts without blanks, joined emoji, control characters.
TOKENIZER_SAMPLE = (
    "Plain words, then don't and it's; 12 345,67 numbers.\r\n\tdef f(x):\n\n"
    "        return x  # blanks   \u00a0 end\n"
    "caf\u00e9 cafe\u0301 \u65e5\u672c\u8a9e "
    "\U0001f642\U0001f468\u200d\U0001f469\u200d\U0001f467 \u0000\u0007 "
)


class ExportFailed(Exception):
    """What was written does not compute what the original computes; nothing of it is kept.

    Exit code 1."""


@dataclass(frozen=True)
class Reference:
    """Logits of our model, (B, T, V), and the largest difference that rounding can explain."""

    logits: Tensor
    bound: float


@dataclass(frozen=True)
class Ours:
    """The model and the tokenizer that were exported."""

    model: "Decoder"
    tokenizer: "Tokenizer"

    def random_ids(self) -> Tensor:
        """Two rows of random ids, BOS first, of the length that is compared."""
        config = self.model.config
        length = max(2, min(config.max_seq_len, VERIFY_TOKENS))
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (2, length), generator=generator)
        ids[:, 0] = self.tokenizer.bos
        return ids

    def reference(self, ids: Tensor, least_bound: float = 0.0) -> Reference:
        """The logits of ids (B, T). least_bound: rounding that is known to occur."""
        found = []
        for backend in ("blocked", "sdpa"):
            for block in self.model.blocks:
                block.attention.backend = backend
            found.append(self.model(ids))
        rounding = (found[0] - found[1]).abs().max().item()
        largest = found[0].abs().max().item()
        bound = max(least_bound, TOLERANCE * max(1.0, largest), ROUNDING_FACTOR * rounding)
        return Reference(found[0], bound)

    def greedy(self, prompt: list[int], n_new: int) -> list[int]:
        """At most n_new ids that continue the prompt, up to one that ends a text."""
        ends = self.tokenizer.end_ids
        steps = generate_ids(self.model, prompt, n_new, temperature=0, stop_ids=ends)
        return [step[0] for step in steps]


def verify(folder: Path, model: "Decoder", tokenizer: "Tokenizer") -> str:
    """Load the folder as a user would and compare it with our model and tokenizer.

    Compared are the logits of random ids in fp32, read in one pass and in two parts through the
    cache; what generate() continues greedily, one prompt alone and several padded on the left, with
    our own greedy generation; and the ids of sample text. Returns a sentence to print that names
    what was compared; without transformers it reports that nothing was. Raises ExportFailed on a
    difference beyond rounding."""
    run_code_from_throwaway_cache()
    try:
        import transformers
    except ImportError:
        return (
            "not verified: that needs the package transformers; to verify, install it (pip install "
            "transformers) and export again"
        )
    name = f"transformers {transformers.__version__}"
    ours = Ours(model, tokenizer)
    with quiet(transformers):
        theirs, their_tokenizer = _load(folder, name, trust_code=model.config.arch != "llama")
        with torch.no_grad():
            logits, bound = _compare_logits(theirs, ours, name)
            generated = _compare_generation(theirs, their_tokenizer, ours, name, bound)
        _compare_tokenizers(their_tokenizer, tokenizer, name)
        texts = "sample text"
        if is_chat(tokenizer):
            _compare_chats(their_tokenizer, tokenizer, name)
            texts += " and of a chat by its template"
    return f"verified with {name}: {logits}; {generated}; same token ids of {texts}"


def _load(
    folder: Path, name: str, trust_code: bool
) -> "tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerFast]":
    """The model in fp32 and in eval mode, and the tokenizer, as transformers loads them."""
    import transformers

    options = {"local_files_only": True, "trust_remote_code": trust_code}
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **options
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    # Of any class: a user would meet the same error.
    except Exception as error:
        raise ExportFailed(
            f"{name} cannot load the exported folder ({type(error).__name__}: {error}); "
            "transformers 4.57 or newer is needed"
        ) from error
    # transformers only warns about such weights, and would draw missing ones at random.
    wrong = {key: list(names) for key, names in report.items() if names}
    if wrong:
        raise ExportFailed(f"{name} reports weights that do not fit: {wrong}")
    return model.eval(), tokenizer


def _within(difference: float, bound: float) -> bool:
    """Whether rounding explains a difference. False for NaN."""
    return difference <= bound


# ---- logits ----


def _compare_logits(
    theirs: "transformers.PreTrainedModel", ours: Ours, name: str
) -> tuple[str, float]:
    """Compare logits in one pass and in two parts through the cache.

    Returns what to print about it, and the largest difference that rounding can explain."""
    ids = ours.random_ids()
    reference = ours.reference(ids)
    whole = theirs(ids).logits
    parts = _in_two_parts(theirs, ids)
    difference = max((reference.logits - found).abs().max().item() for found in (whole, parts))
    largest = reference.logits.abs().max().item()
    if not _within(difference, reference.bound):
        raise ExportFailed(
            f"the logits in {name} differ from nanochat's by up to {difference:.1e}, but rounding "
            f"explains only {reference.bound:.1e} (largest logit {largest:.1f})"
        )
    said = (
        f"largest logit difference {difference:.1e} (largest logit {largest:.1f}, "
        f"{ids.numel()} tokens, with and without cache)"
    )
    return said, reference.bound


def _in_two_parts(theirs: "transformers.PreTrainedModel", ids: Tensor) -> Tensor:
    """Logits of ids when the second half is read by means of the first half's cache."""
    half = ids.size(1) // 2
    # transformers 5.24 renamed past_key_values to cache, for arguments and for results.
    known = inspect.signature(theirs.forward).parameters
    argument = "cache" if "cache" in known else "past_key_values"
    first = theirs(ids[:, :half], use_cache=True)
    cache = first["cache"] if "cache" in first else first["past_key_values"]
    second = theirs(ids[:, half:], **{argument: cache})
    return torch.cat((first.logits, second.logits), dim=1)


# ---- generate() ----


@dataclass(frozen=True)
class Continued:
    """What transformers' generate() did to one prompt.

    what: names the call in messages. new_ids: up to BOS. logits: (new ids, V), behind each of
    them."""

    what: str
    prompt: list[int]
    new_ids: list[int]
    logits: Tensor


def _compare_generation(
    theirs: "transformers.PreTrainedModel",
    their_tokenizer: "transformers.PreTrainedTokenizerFast",
    ours: Ours,
    name: str,
    bound: float,
) -> str:
    """Compare greedy generate(), alone and padded, with ours; what to print about it.

    The logits behind each new token are compared as well: a poor model repeats itself, and its
    tokens alone would prove little. bound: what rounding explains in a long text."""
    row = ours.random_ids()[0].tolist()
    longest = len(row) // 2
    n_new = min(GENERATED_TOKENS, len(row) - longest)
    prompts = [row[:length] for length in sorted({longest, max(1, longest // 3), 1}, reverse=True)]
    # A context of two tokens leaves one length: the batch is two equal rows, without padding.
    if len(prompts) == 1:
        prompts *= 2
    expected = [ours.greedy(prompt, n_new) for prompt in prompts]
    counts = []
    for kind, n_rows in (("", 1), ("left-padded batched ", len(prompts))):
        found = _generate(
            theirs,
            their_tokenizer,
            prompts[:n_rows],
            n_new,
            stop_ids=ours.tokenizer.end_ids,
            what=f"{kind}generate() in {name}",
        )
        counts.append(
            sum(_compare_row(each, ours, ids, bound) for each, ids in zip(found, expected))
        )
    return (
        f"greedy generate() as ours over {counts[0]} new tokens of one prompt and, padded on "
        f"the left, over {counts[1]} of {len(prompts)} prompts in a batch"
    )


def _generate(
    theirs: "transformers.PreTrainedModel",
    their_tokenizer: "transformers.PreTrainedTokenizerFast",
    prompts: list[list[int]],
    n_new: int,
    stop_ids: Collection[int],
    what: str,
) -> list[Continued]:
    """One greedy generate() of all prompts, padded to one length by the exported tokenizer."""
    batch = their_tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    try:
        found = theirs.generate(
            **batch,
            max_new_tokens=n_new,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    # Of any class: a user would meet the same error.
    except Exception as error:
        raise ExportFailed(
            f"{what} fails ({type(error).__name__}: {error}); try another release of transformers"
        ) from error
    # sequences also holds the prompts, padded.
    rows = found.sequences[:, batch["input_ids"].size(1) :].tolist()
    continued = []
    for i, prompt in enumerate(prompts):
        new_ids = _up_to(rows[i], stop_ids)
        logits = torch.stack([step[i] for step in found.logits[: len(new_ids)]])
        continued.append(Continued(what, prompt, new_ids, logits.float()))
    return continued


def _up_to(ids: list[int], stop_ids: Collection[int]) -> list[int]:
    """The ids as far as the first of stop_ids, included; a row that stopped early is padded."""
    end = next((place for place, i in enumerate(ids, 1) if i in stop_ids), len(ids))
    return ids[:end]


def _compare_row(found: Continued, ours: Ours, expected: list[int], least_bound: float) -> int:
    """Compare what one prompt became with ours; returns how many new tokens were compared."""
    n_prompt = len(found.prompt)
    # Rounding measured in a short text alone may be small by chance.
    reference = ours.reference(torch.tensor([found.prompt + found.new_ids]), least_bound)
    # The last token of the prompt predicts the first new one.
    logits = reference.logits[0, n_prompt - 1 : -1]
    difference = (found.logits - logits).abs().max().item()
    if not _within(difference, reference.bound):
        raise ExportFailed(
            f"{found.what} misreads a prompt of {n_prompt} tokens: its logits differ from "
            f"nanochat's by up to {difference:.1e}, but rounding explains only "
            f"{reference.bound:.1e}; try another release of transformers"
        )
    if found.new_ids == expected:
        return len(expected)
    same = _first_difference(found.new_ids, expected)
    # Two tokens whose logits differ by rounding only may swap places: the text then differs from
    # there on, and neither is wrong.
    if same is not None:
        ahead = logits[same, expected[same]] - logits[same, found.new_ids[same]]
        if _within(ahead.item(), 2 * reference.bound):
            return same + 1
    raise ExportFailed(
        f"{found.what} continues a prompt of {n_prompt} tokens with the ids {found.new_ids}, but "
        f"nanochat with {expected}; try another release of transformers"
    )


def _first_difference(found: Sequence[int], expected: Sequence[int]) -> int | None:
    """Where two lists first differ; None if one only ends before the other."""
    for i, (one, other) in enumerate(zip(found, expected)):
        if one != other:
            return i
    return None


# ---- the tokenizer ----


def _compare_tokenizers(
    theirs: "transformers.PreTrainedTokenizerFast", tokenizer: "Tokenizer", name: str
) -> None:
    """Compare the ids of sample text, and the text of those ids. Raises ExportFailed."""
    # Text that spells special tokens must stay plain text, in transformers too. A tokenizer for
    # chats does that on demand, since it reads what the template writes.
    options = {"split_special_tokens": True} if is_chat(tokenizer) else {}
    spelled = [tokenizer.bos_text, *tokenizer.specials, PAD_TEXT]
    sample = encodable(TOKENIZER_SAMPLE + "".join(spelled), tokenizer)
    expected = tokenizer.encode(sample)
    if (
        theirs(sample, add_special_tokens=False, **options)["input_ids"] != expected
        or theirs(sample, **options)["input_ids"] != [tokenizer.bos, *expected]
        or theirs.decode(expected) != sample
    ):
        raise ExportFailed(
            f"the tokenizer in {name} gives other ids, or another text, than nanochat's"
        )


def encodable(text: str, tokenizer: "Tokenizer") -> str:
    """The text without the characters that a char tokenizer refuses."""
    if tokenizer.kind != "char":
        return text
    known = set(tokenizer.tokens)
    return "".join(c for c in text if c.encode("utf-8") in known)


def sample_chat(tokenizer: "Tokenizer") -> list[dict[str, str]]:
    """A conversation that ends with an answer."""
    content = encodable(TOKENIZER_SAMPLE, tokenizer)
    roles = ("system", "user", "assistant", "user", "assistant")
    # contents that differ, and whose ends a template may not trim
    return [{"role": role, "content": content[i:]} for i, role in enumerate(roles)]


def _compare_chats(
    theirs: "transformers.PreTrainedTokenizerFast", tokenizer: "Tokenizer", name: str
) -> None:
    """Compare the ids of a conversation, which of them are the assistant's, and those that ask for
    an answer. Raises ExportFailed."""
    messages = sample_chat(tokenizer)
    ids, mask = render(tokenizer, messages)
    asked, _ = render(tokenizer, messages[:-1], generation_prompt=True)
    options = {"tokenize": True, "return_dict": True}
    try:
        found = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, **options)
        found_asked = theirs.apply_chat_template(
            messages[:-1], add_generation_prompt=True, **options
        )
    # Of any class: a user would meet the same error.
    except Exception as error:
        raise ExportFailed(
            f"the chat template fails in {name} ({type(error).__name__}: {error})"
        ) from error
    if (
        found["input_ids"] != ids.tolist()
        or found["assistant_masks"] != mask.astype(int).tolist()
        or found_asked["input_ids"] != asked.tolist()
    ):
        raise ExportFailed(f"the chat template in {name} gives other ids than nanochat's")
