"""config.json and summary.json of run folders that are damaged or of another version."""

import json

import pytest

from nanochat.common import UsageError
from nanochat.run.folder import RunFolder, status_of


def test_a_run_folder_of_a_newer_format_is_refused(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_config({"args": {}})
    (tmp_path / "config.json").write_text(json.dumps({**folder.read_config(), "format": 99}))
    with pytest.raises(UsageError, match="format 99.*version of nanochat that wrote it"):
        folder.read_config()


@pytest.mark.parametrize("content", [None, b"", b'{"status": "comp', b"[]", b"\xff"])
def test_the_status_in_a_damaged_summary_is_unknown(tmp_path, content):
    if content is not None:
        (tmp_path / "summary.json").write_bytes(content)
    assert status_of(tmp_path) is None
