"""Saving while training continues: what is saved is the state of then, and failures are retried."""

import contextlib

import pytest
import torch
from disk import MODEL, Disk, save, small_model

from nanochat.run import checkpoint
from nanochat.run.saver import LAST_ATTEMPTS, RETRY_SECONDS, Saver

LOOP_STATE = {"tokenizer": "x"}


class Room:
    """A disk that is full until `free` is raised, and a clock that stands still."""

    def __init__(self):
        self.free, self.now = 5000, 0.0

    def free_bytes(self, path):
        return self.free

    def clock(self):
        return self.now

    def save_fails(self, run, kind, model=MODEL):
        """A Saver whose save of step 1 has failed."""
        saver = Saver(run, -1, print, [], clock=self.clock, free_bytes=self.free_bytes)
        saver.save(1, kind, model, {}, LOOP_STATE)
        saver.wait()
        assert checkpoint.steps_of(run) == [] and saver.can_retry()
        return saver


@contextlib.contextmanager
def saver_of(run, keep_last=-1, report=print, records=(), **options):
    saver = Saver(run, keep_last, report, records, **options)
    yield saver
    saver.close()


def test_saving_beside_training(tmp_path):
    """What is saved is the state at save(), whatever happens to the model afterwards."""
    model, moments = small_model(), {"head.weight": {"exp_avg": torch.ones(11, 8)}}
    saver = Saver(tmp_path, -1, print, [])
    saver.save(3, "permanent", model, moments, LOOP_STATE)
    with torch.no_grad():
        model.head.weight.zero_()
        moments["head.weight"]["exp_avg"].zero_()
    saver.save(4, "permanent", model, moments, LOOP_STATE)
    saver.wait()
    assert not saver.busy() and saver.failure == ""
    assert checkpoint.load_optimizer(tmp_path, 3)["head.weight"]["exp_avg"].eq(1).all()
    assert checkpoint.load_optimizer(tmp_path, 4)["head.weight"]["exp_avg"].eq(0).all()
    other = small_model()
    checkpoint.load_model(tmp_path, 3, other)
    assert torch.equal(other.head.weight, MODEL.head.weight)
    saver.close()
    saver.thread.join(timeout=10)
    assert not saver.thread.is_alive()


def test_a_checkpoint_appears_after_the_records_it_vouches_for(tmp_path):
    """Those of earlier steps are on disk first; while they cannot be, there is no checkpoint."""

    class Record:
        full = True

        def sync(self):
            assert checkpoint.steps_of(tmp_path) == []
            if self.full:
                raise OSError(28, "No space left on device")

    record = Record()
    with saver_of(tmp_path, records=[record]) as saver:
        saver.save(1, "permanent", MODEL, {}, LOOP_STATE)
        saver.wait()
        assert checkpoint.steps_of(tmp_path) == [] and "No space left" in saver.failure
        record.full = False
        assert saver.finish(sleep=lambda seconds: None) == ""
        assert checkpoint.steps_of(tmp_path) == [1]


# ----- failures


def full():
    raise OSError(28, "No space left on device")


def test_a_full_disk_at_every_point_of_a_save(tmp_path, monkeypatch):
    """From the n-th change to a file on nothing can be written.

    That is reported, the old checkpoint stays, and the same state is saved once there is room."""
    n = 0
    while True:
        n += 1
        run, reports = tmp_path / str(n), []
        save(run, 1)
        with saver_of(run, report=reports.append) as saver:
            with Disk(run / "checkpoints", n, full).watch(monkeypatch) as disk:
                saver.save(2, "rolling", MODEL, {}, LOOP_STATE)
                saver.wait()
            if disk.count < n:
                assert not saver.failure
                break
            # It was full after the rename: only making that durable failed.
            if checkpoint.steps_of(run) == [1, 2]:
                assert checkpoint.damage(run, 2) is None
            else:
                assert checkpoint.newest_intact(run, print) == 1
                outlook = "the save will be retried; the newest checkpoint is step 1"
                assert reports == [f"{saver.failure}; {outlook}"]
            assert "step 2 cannot be saved" in saver.failure and "No space left" in saver.failure
            assert saver.finish(sleep=lambda seconds: None) == ""
            assert checkpoint.newest_intact(run, print) == 2
    assert n > 20


def test_too_little_room_is_reported_before_anything_is_written(tmp_path):
    save(tmp_path, 1)
    reports, room = [], Room()
    with saver_of(tmp_path, report=reports.append, free_bytes=room.free_bytes) as saver:
        saver.save(2, "final", MODEL, {}, LOOP_STATE)
        saver.wait()
        assert "it needs 1.0 MiB, but only 4.9 KiB are free" in reports[0]
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]
        room.free = 10**9
        assert saver.finish(sleep=lambda seconds: None) == ""
        assert checkpoint.kind_of(tmp_path, 2) == "final"
        assert reports[1:] == ["checkpoint saved at step 2, after an earlier failure"]


@pytest.mark.parametrize("where", ["weights", "moments"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_bad_numbers_are_not_saved_and_not_retried(tmp_path, where, number):
    """The older checkpoint stays, also a rolling one."""
    reports, model, moments = [], small_model(), torch.ones(11, 8)
    state = {"head.weight": {"exp_avg": moments}}
    with saver_of(tmp_path, report=reports.append) as saver:
        saver.save(1, "rolling", model, state, LOOP_STATE)
        saver.wait()
        with torch.no_grad():
            bad = model.head.weight if where == "weights" else moments
            bad[3, 5] = number
        saver.save(2, "permanent", model, state, LOOP_STATE)
        saver.wait()
        assert checkpoint.steps_of(tmp_path) == [1] and len(reports) == 1
        assert "step 2 cannot be saved" in reports[0]
        assert "not finite, the first in head.weight" in reports[0]
        assert reports[0].endswith("; it is not retried; the newest checkpoint is step 1")
        assert not saver.can_retry()
        wait = pytest.fail
        assert "step 2" in saver.finish(sleep=lambda seconds: wait("nothing to wait for"))


def test_a_failed_save_is_retried_as_what_it_was(tmp_path):
    """From the copy that was made of it: the state of then, whatever the model has become."""
    room, model = Room(), small_model()
    saver = room.save_fails(tmp_path, "before_warmdown", model)
    with torch.no_grad():
        model.head.weight.zero_()
    room.now = RETRY_SECONDS
    saver.retry()
    assert not saver.busy(), "too early"
    room.now += 0.1
    saver.retry()
    saver.wait()
    assert checkpoint.steps_of(tmp_path) == [] and saver.failed_at == room.now, "still no room"
    room.free, room.now = 10**9, room.now + RETRY_SECONDS + 0.1
    saver.retry()
    saver.wait()
    assert checkpoint.kind_of(tmp_path, 1) == "before_warmdown" and not saver.failure
    other = small_model()
    checkpoint.load_model(tmp_path, 1, other)
    assert torch.equal(other.head.weight, MODEL.head.weight)
    room.now += RETRY_SECONDS + 0.1
    saver.retry()
    assert not saver.busy(), "that is done"
    saver.close()


def test_the_last_save_is_retried_with_pauses(tmp_path):
    room, pauses = Room(), []
    saver = room.save_fails(tmp_path, "final")
    assert "step 1 cannot be saved" in saver.finish(sleep=pauses.append)
    assert pauses == list(LAST_ATTEMPTS)

    def makes_room(seconds):
        room.free = 10**9

    assert saver.finish(sleep=makes_room) == "" and checkpoint.kind_of(tmp_path, 1) == "final"
    saver.close()


@pytest.mark.parametrize(
    "kind, kept", [("before_warmdown", [1, 2]), ("permanent", [1, 2]), ("rolling", [2])]
)
def test_a_failed_save_has_a_last_chance_before_the_next(tmp_path, kind, kept):
    room = Room()
    saver = room.save_fails(tmp_path, kind)
    room.free = 10**9
    saver.save(2, "permanent", MODEL, {}, LOOP_STATE)
    saver.wait()
    assert checkpoint.steps_of(tmp_path) == kept and not saver.failure
    saver.close()


# ----- states that are held, the best one


def test_a_held_state_is_written_when_it_proved_good(tmp_path):
    with saver_of(tmp_path) as saver:
        saver.save(1, "before_warmdown", MODEL, {}, LOOP_STATE, hold=True)
        # that step was skipped too
        saver.save(2, "permanent", MODEL, {}, LOOP_STATE, hold=True)
        saver.retry()
        saver.wait()
        assert checkpoint.steps_of(tmp_path) == []
        saver.release()
        saver.release()
        saver.wait()
        assert checkpoint.steps_of(tmp_path) == [1]
        assert checkpoint.kind_of(tmp_path, 1) == "before_warmdown"
        saver.save(2, "permanent", MODEL, {}, LOOP_STATE, hold=True)
        assert saver.finish() == "" and checkpoint.steps_of(tmp_path) == [1], "never proved"


def test_the_best_of_those_that_exist(tmp_path):
    with saver_of(tmp_path, keep_last=1) as saver:
        for step, bpb in ((1, 2.0), (2, 1.5), (3, 1.7)):
            saver.save(step, "permanent", MODEL, {}, LOOP_STATE)
            saver.mark_best(step, bpb)
        # was not saved
        saver.mark_best(99, 0.1)
        saver.wait()
        assert checkpoint.best_step(tmp_path) == 2 and checkpoint.steps_of(tmp_path) == [2, 3]
    # After a restart the best number is known from the metrics.
    with saver_of(tmp_path, keep_last=1, best_bpb=1.5) as saver:
        saver.save(4, "permanent", MODEL, {}, LOOP_STATE)
        saver.mark_best(4, 1.6)
        saver.wait()
        assert saver.best_bpb == 1.5 and checkpoint.best_step(tmp_path) == 2


@pytest.mark.parametrize("content", [b"", b"nonsense", b"step_\xff\xfe"])
def test_a_garbled_best(tmp_path, content):
    """It names no checkpoint, which is reported; the next best one overwrites it."""
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "best").write_bytes(content)
    reports = []
    with saver_of(tmp_path, report=reports.append) as saver:
        assert checkpoint.best_step(tmp_path) is None
        assert "checkpoints/best does not name a checkpoint" in reports[0]
        checkpoint.set_aside_after(tmp_path, 1)
        saver.mark_best(1, 2.0)
        saver.wait()
        assert checkpoint.best_step(tmp_path) == 1
