"""`nanochat export --push`: what was verified arrives on the hub, whole or not at all.

The hub is a stand-in on this machine (hub_uploads.py), the client is the real huggingface_hub."""

import builtins
import shutil

import pytest
from conftest import HUB_PORT
from hub_server import hasten
from hub_uploads import Repo, UploadHub
from test_export_gguf import LLAMA, make_run

from nanochat.apps import export
from nanochat.apps.export import push
from nanochat.common import Unavailable, UsageError

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def plain_uploads(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    hasten(monkeypatch, [])


@pytest.fixture
def uploads():
    with UploadHub(HUB_PORT) as server:
        yield server


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("push") / "d2", LLAMA)


@pytest.fixture
def quick(monkeypatch, run, tmp_path):
    """Export by copying a folder: what is pushed is of no importance to most tests."""

    def copied(source, out, step, dtype):
        out.mkdir()
        for name, content in FILES.items():
            (out / name).write_bytes(content)

    monkeypatch.setattr("nanochat.apps.export.to_huggingface.export_run", copied)
    return [str(run), str(tmp_path / "out")]


FILES = {
    "README.md": b'---\npipeline_tag: text-generation\n---\nfrom_pretrained("FOLDER")\n',
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 50,
}
PUSHED = FILES | {"README.md": FILES["README.md"].replace(b"FOLDER", b"ada/model")}


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without_attributes(repo):
    return {name: content for name, content in repo.files.items() if name != ".gitattributes"}


def test_an_exported_folder_arrives_whole(run, tmp_path, uploads, capsys):
    out = tmp_path / "out"
    assert export.main([str(run), str(out), "--push=model"]) == 0
    printed = capsys.readouterr().out
    assert "verified with transformers" in printed
    assert f"to a private repository: {uploads.url}/ada/model" in printed.splitlines()[-1]
    repo = uploads.repos["ada/model"]
    assert repo.visibility == "private" and len(repo.commits) == 1
    found, expected = without_attributes(repo), files_of(out)
    card = expected.pop("README.md").decode()
    assert found.pop("README.md").decode() == card.replace('"FOLDER"', '"ada/model"') != card
    assert found == expected and "model.safetensors" in found


def test_gguf_arrives_in_an_organization_and_public(run, tmp_path, uploads):
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    flags = ["--format=gguf", "--push=engines/tiny", "--public"]
    assert export.main([str(run), str(tmp_path / "out"), *flags]) == 0
    repo = uploads.repos["engines/tiny"]
    assert repo.visibility == "public"
    assert without_attributes(repo) == files_of(tmp_path / "out")
    assert set(files_of(tmp_path / "out")) == {"Modelfile", "README.md", "model.gguf"}


def test_a_page_arrives_with_a_card(run, tmp_path, uploads):
    page = tmp_path / "tiny.html"
    page.write_text("<!doctype html>")
    destination = push.open_destination("model", "html", False)
    push.push(destination, page, push.card_of_page(run, 7))
    found = without_attributes(uploads.repos["ada/model"])
    assert found.keys() == {"README.md", "tiny.html"}
    assert b"open it in a browser" in found["README.md"] and b"| 7 |" in found["README.md"]


def test_large_files_arrive_in_parts_and_only_once(quick, tmp_path, uploads):
    uploads.part_bytes = 5000
    assert export.main([*quick, "--push=ada/model"]) == 0
    assert without_attributes(uploads.repos["ada/model"]) == PUSHED
    assert len([path for _, path in uploads.requests if "/store/" in path]) == 3
    shutil.rmtree(tmp_path / "out")
    assert export.main([*quick, "--push=ada/again"]) == 0
    assert len([path for _, path in uploads.requests if "/store/" in path]) == 3


def test_an_empty_repository_is_filled(quick, uploads):
    uploads.repos["ada/model"] = Repo("private")
    assert export.main([*quick, "--push=model"]) == 0
    assert without_attributes(uploads.repos["ada/model"]) == PUSHED
    assert not any("create" in path for _, path in uploads.requests)


def test_faults_that_pass_do_not_matter(quick, uploads):
    uploads.faults = {"preupload": (1, 503), "/store/": (1, 500)}
    assert export.main([*quick, "--push=model"]) == 0
    assert without_attributes(uploads.repos["ada/model"]) == PUSHED


# ---- what is refused before the export ----


@pytest.mark.parametrize(
    "token, flags, message",
    [
        ("", ["--push=model"], "there is none; set HF_TOKEN .* `hf auth login`"),
        ("hf_old", ["--push=model"], r"does not accept the token \(Invalid username or password"),
        ("hf_read", ["--push=model"], "the token of ada may only read"),
        ("hf_write", ["--push=ada/old"], "exists, and is not overwritten; choose another name"),
        ("hf_write", ["--push=ada/empty"], "empty repository is public; add --public"),
        ("hf_write", ["--push=ada/hidden", "--public"], "repository is private; leave --public"),
        ("hf_write", ["--push=a/b/c"], "--push a/b/c: not a name for a repository .* OWNER/NAME"),
        ("hf_write", ["--push=a..b"], "not a name for a repository"),
        ("hf_write", ["--public"], "--public: has no effect without --push"),
        ("hf_write", ["--push=x", "--format=run"], "--push x: works only with --format hf, gguf"),
    ],
)
def test_refusals_come_before_the_work(
    quick, tmp_path, monkeypatch, uploads, token, flags, message
):
    monkeypatch.setenv("HF_TOKEN", token)
    uploads.repos["ada/old"] = Repo("private", files={".gitattributes": b"", "x": b""})
    uploads.repos["ada/empty"] = Repo("public")
    uploads.repos["ada/hidden"] = Repo("private")
    with pytest.raises(UsageError, match=message):
        export.main([*quick, *flags])
    assert not (tmp_path / "out").exists()
    assert not any(method == "PUT" for method, _ in uploads.requests)


def test_nothing_is_pushed_that_cannot_be_verified(quick, tmp_path, monkeypatch, uploads):
    real = builtins.__import__

    def without(name, *rest):
        if name in ("transformers", "xllamacpp"):
            raise ImportError
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    for target, package in (("hf", "transformers"), ("gguf", "xllamacpp")):
        with pytest.raises(UsageError, match=f"only what was verified.*pip install {package}"):
            export.main([*quick, f"--format={target}", "--push=model"])
    assert not (tmp_path / "out").exists() and not uploads.requests


def test_nothing_is_pushed_that_failed(run, tmp_path, monkeypatch, uploads, capsys):
    from nanochat.apps.export.verify import ExportFailed

    def fails(*_):
        raise ExportFailed("other logits")

    monkeypatch.setattr("nanochat.apps.export.to_huggingface.verify", fails)
    assert export.main([str(run), str(tmp_path / "out"), "--push=model"]) == 1
    assert "other logits" in capsys.readouterr().err
    assert not uploads.repos


# ---- what fails on the way ----


def test_no_network(quick, tmp_path):
    with pytest.raises(Unavailable, match="--push model: no connection .*check the network and HF"):
        export.main([*quick, "--push=model"])
    assert not (tmp_path / "out").exists()


def test_no_permission_for_a_name_of_others(quick, tmp_path, uploads):
    with pytest.raises(UsageError, match="may not write there.*namespace.*hf upload bob/model"):
        export.main([*quick, "--push=bob/model"])
    assert files_of(tmp_path / "out") == FILES and not uploads.repos


@pytest.mark.parametrize(
    "path, status, kind, message",
    [
        ("repos/create", 409, UsageError, "exists, and is not overwritten"),
        ("repos/create", 429, Unavailable, "asks for fewer requests"),
        ("/store/", 500, Unavailable, "the server answers 500"),
        ("/commit/", 503, Unavailable, "the server answers 503"),
        ("/commit/", 403, UsageError, "may not write there"),
    ],
)
def test_an_upload_that_breaks_leaves_no_half_of_it(
    quick, tmp_path, uploads, path, status, kind, message
):
    uploads.faults = {path: (99, status)}
    with pytest.raises(kind, match=message) as caught:
        export.main([*quick, "--push=model"])
    out = tmp_path / "out"
    assert f"{out} is complete; to push it later: hf upload ada/model {out}" in str(caught.value)
    assert files_of(out) == FILES
    repo = uploads.repos.get("ada/model")
    assert repo is None or not without_attributes(repo)
    # again, and it works
    uploads.faults = {}
    shutil.rmtree(out)
    if status != 409:
        assert export.main([*quick, "--push=model"]) == 0
        assert without_attributes(uploads.repos["ada/model"]) == PUSHED
