"""nanochat: train, sample and compare small GPTs. Importing this loads nothing heavy."""

__version__ = "0.1.0"


def load(run, step=None, device_type="", dtype="auto"):
    """(model, tokenizer) of a run folder, ready to generate. See loading.load_run()."""
    from nanochat.run.loading import load_run

    return load_run(run, step, device_type, dtype)


def generate(model, tokenizer, prompt, **options):
    """The text that continues `prompt`, a str. options: see engine.generate_text()."""
    from nanochat.eval.generation import generate_text

    return "".join(generate_text(model, tokenizer, prompt, **options))
