"""The config.json of what is evaluated: a run's, or a Hugging Face model's."""

from pathlib import Path

from nanochat.common import UsageError, read_json


def read_config(run: str) -> dict:
    """config.json of a run or of a Hugging Face folder. Raises UsageError for other folders."""
    path = Path(run) / "config.json"
    remedy = "name a run folder, for example out/d4, or one of a Hugging Face model"
    if not path.parent.is_dir():
        raise UsageError(f"{run}: no such folder; {remedy}")
    if not path.exists():
        raise UsageError(f"{run}: it has no config.json; {remedy}")
    config = read_json(path, str(run))
    # JSON may be anything, and so may config.json in a folder named by mistake
    is_run = isinstance(config, dict) and isinstance(config.get("args"), dict)
    if not (is_run or (isinstance(config, dict) and is_foreign(config))):
        raise UsageError(
            f"{run}: its config.json is neither a run's nor a Hugging Face model's; {remedy}"
        )
    return config


def is_foreign(config: dict) -> bool:
    """Whether a config.json is a Hugging Face model's."""
    return "model_type" in config
