"""Several machines: what each of them reads and tokenizes, and connections to lost ones."""

import socket
from pathlib import Path

import pytest
import small
from ports import free_port

from nanochat import limits, machines, ranks

# A rank of a machine with a folder, caches and 6 cores of its own. Notes who fits a tokenizer, and
# who tokenizes with how many threads, during the set-up and afterwards.
ONE_RANK = """
import os, sys
sys.path.insert(0, {root!r})
machine = int(os.environ["RANK"]) // 2
os.chdir(f"{{os.environ['MACHINES']}}/{{machine}}")
os.environ["NANOCHAT_BASE_DIR"] = f"{{os.environ['MACHINES']}}/{{machine}}/caches"
import train
from nanochat import limits
from nanochat.data import token_cache
from nanochat.run import training_text
limits.available_cpus = lambda: 6
def note(function, words):
    def noted(*arguments):
        with open("notes", "a") as f:
            f.write(f"rank {{os.environ['RANK']}} {{words(*arguments)}}\\n")
        return function(*arguments)
    return noted
token_cache.fit_tokenizer = note(token_cache.fit_tokenizer, lambda *_: "fits")
token_cache.TokenCache._encode = note(
    token_cache.TokenCache._encode, lambda cache, shard: f"tokenizes with {{cache.threads}}"
)
training_text.describe_tokens = note(
    training_text.describe_tokens, lambda rows, *_: f"has {{rows.cache.threads}}"
)
sys.exit(train.run(sys.argv[1:]))
"""
TRAIN = [
    *small.FLAGS,
    *("--data=text.txt", "--out-dir=out", "--model-tag=run", "--tokenizer=bpe", "--vocab-size=300"),
    *("--eval-every=-1", "--sample-every=-1", "--save-every=-1"),
]


@pytest.fixture(scope="module")
def two_machines(tmp_path_factory):
    """The folder of two machines, 0 and 1, with the same text."""
    folder = tmp_path_factory.mktemp("machines")
    for machine in "01":
        (folder / machine).mkdir()
        small.corpus(folder / machine)
    return folder


def train_on(folder, *flags):
    """train.py as two ranks on each machine. Returns the exit codes and all that was printed."""
    meeting = {"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for rank in range(4):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"}
        environ = small.environment() | meeting | own | {"MACHINES": str(folder)}
        script = ONE_RANK.format(root=str(small.ROOT))
        started.append(small.start([*TRAIN, *flags], environ, folder / "shown", script))
    codes = [small.ended(process) for process in started]
    shown = (folder / "shown").read_text()
    (folder / "shown").unlink()
    return codes, shown


def notes_of(machine: Path):
    return sorted((machine / "notes").read_text().splitlines())


def test_each_machine_tokenizes_once_and_one_rank_fits_the_tokenizer(two_machines):
    """The first rank of a machine with all of its cores, while the others wait; afterwards its
    ranks share them."""
    codes, shown = train_on(two_machines, "--num-iterations=2")
    assert codes == [0, 0, 0, 0], shown
    tokenized = ["rank {0} tokenizes with 6"] * 2
    for machine, notes in enumerate((["rank 0 fits"], [])):
        first = 2 * machine
        expected = [*notes, *(line.format(first) for line in tokenized)]
        expected += [f"rank {first} has 3", f"rank {first + 1} has 3"]
        assert notes_of(two_machines / str(machine)) == sorted(expected)
    # written by rank 0
    assert (two_machines / "0" / "out" / "run" / "summary.json").exists()
    assert not (two_machines / "1" / "out").exists()


def test_a_checkpoint_that_one_machine_has_alone(two_machines):
    """Ranks that do not see it would begin again, and wait for ever for those that resume."""
    codes, shown = train_on(two_machines, "--num-iterations=4", "--resume")
    assert codes == [2, 2, 2, 2], shown
    assert "--resume: 2 ranks, the first of them rank 2, cannot read the checkpoint of step 2" in (
        shown
    )


def test_machines_with_different_text(two_machines):
    text = two_machines / "1" / "text.txt"
    text.write_text(text.read_text().replace("squared", "doubled"))
    codes, shown = train_on(two_machines, "--num-iterations=2", "--overwrite")
    assert codes == [2, 2, 2, 2], shown
    assert "on the machine of rank 2: --data=text.txt: text.txt holds other text here" in shown


@pytest.mark.parametrize(
    "world_size, here, cores, threads",
    [(16, "8", 64, 8), (16, "8", 4, 1), (16, "", 64, 64), (1, "8", 64, 64), (2, "x", 4, 4)],
)
def test_threads_of_a_rank(monkeypatch, world_size, here, cores, threads):
    monkeypatch.setattr(ranks, "_launch", ranks.Launch(world_size=world_size))
    monkeypatch.setattr(limits, "available_cpus", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    assert machines.threads_of_rank() == threads


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux only")
def test_connections_ask_whether_the_other_end_exists(monkeypatch):
    """Those that exist, those that a listening socket accepts later, and no others."""
    monkeypatch.setattr(ranks, "_launch", ranks.Launch(world_size=2))
    within, unix = socket.socketpair(), socket.socket(socket.AF_UNIX)
    with socket.create_server(("127.0.0.1", 0)) as server, unix, within[0], within[1]:
        with socket.create_connection(server.getsockname()) as before:
            accepted, _ = server.accept()
            machines.notice_lost_machines()
            with socket.create_connection(server.getsockname()) as after, accepted:
                later, _ = server.accept()
                with later:
                    asked = [silence_of(each) for each in (before, accepted, later, after)]
    assert asked == [(1, 10, 10, 90000)] * 3 + [(0, *asked[3][1:3], 0)]


def silence_of(connection):
    """(whether it asks, seconds until the first time, between two, milliseconds until it fails)."""
    tcp = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_USER_TIMEOUT)
    asks = connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    return (asks, *(connection.getsockopt(socket.IPPROTO_TCP, option) for option in tcp))
