"""The .jsonl records of a run on a disk that refuses lines or garbles them."""

import json

import pytest

from nanochat.run.metrics import Record, read_lines


def steps(path):
    return [line["step"] for line in read_lines(path)]


def test_lines_wait_for_room(tmp_path):
    """A torn line is taken back; what could not be written comes with the next line.

    Both are reported once."""
    reports = []
    record = Record(tmp_path / "metrics.jsonl", reports.append)
    record.write(step=0, x=1.0)
    whole = record.file

    class Full:
        def __getattr__(self, name):
            return getattr(whole, name)

        def write(self, content):
            return whole.write(content[:5])

    record.file = Full()
    record.write(step=1, x=2.0)
    record.write(step=2, x=3.0)
    assert steps(record.path) == [0]
    record.file = whole
    record.write(step=3, x=4.0)
    record.close()
    written = [json.loads(line)["step"] for line in record.path.read_text().splitlines()]
    assert written == [0, 1, 2, 3]
    assert len(reports) == 2
    assert "cannot be written" in reports[0] and "all lines are written" in reports[1]


@pytest.mark.parametrize("end", ["sync", "close"])
def test_kept_lines_are_written_at_the_next_save_and_at_the_end(tmp_path, end):
    """sync() brings them to disk before a checkpoint vouches for them; close() is the last one."""
    path = tmp_path / "run" / "metrics.jsonl"
    record = Record(path, lambda text: None)
    # there is no such folder yet
    record.write(step=0)
    if end == "sync":
        with pytest.raises(OSError):
            record.sync()
    path.parent.mkdir()
    getattr(record, end)()
    assert steps(path) == [0]
    record.close()


def test_a_bad_byte_spoils_only_its_own_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n{"st\xffep": 1}\n{"step": 2}\n')
    assert steps(path) == [0, 2]
    Record(path).keep_before(2)
    assert path.read_text() == '{"step": 0}\n'


def test_the_value_written_last_for_a_step(tmp_path):
    """As for the best checkpoint's bits per byte after a restart."""
    record = Record(tmp_path / "metrics.jsonl")
    assert record.value_at(None, "val/bpb") is None
    for value in (1.5, 1.4, None):
        record.write(step=2, **{"val/bpb": value})
    record.write(step=3, **{"val/bpb": 1.3})
    record.close()
    assert record.value_at(2, "val/bpb") == 1.4
    assert record.value_at(2, "other") is None and record.value_at(9, "val/bpb") is None
