"""Hub addresses against a cache that the test fills; the network is never touched."""

import pathlib
import sys

import huggingface_hub.constants
import pytest

from dar_jax.common import hub

REVISION = "0123456789abcdef0123456789abcdef01234567"
FILES = ("config.json", "sub/config.json", "sub/other.txt")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An offline client whose cache holds `FILES` of owner/name."""
    repository = tmp_path / "models--owner--name"
    for name in FILES:
        path = repository / "snapshots" / REVISION / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_cached_file_is_found_offline(cache):
    path = hub.download_file("hf://owner/name/sub/config.json")
    assert pathlib.Path(path).read_text() == "sub/config.json"


@pytest.mark.parametrize(("address", "text"), [("", "config.json"), ("/sub", "sub/config.json")])
def test_cached_directory_is_found_offline(cache, address, text):
    path = hub.download_directory(f"hf://owner/name{address}", ["config.json"])
    assert (pathlib.Path(path) / "config.json").read_text() == text


@pytest.mark.parametrize(
    "address", ["hf://owner/name/none.pt", "hf://owner/other/a.pt", "hf://a b/c d/e"]
)
def test_missing_file_is_one_line(cache, address):
    with pytest.raises(ValueError, match=f"cannot get {address}: check its name") as caught:
        hub.download_file(address)
    assert "\n" not in str(caught.value)


def test_missing_repository_is_one_line(cache):
    with pytest.raises(ValueError, match="cannot get hf://owner/other: check its name") as caught:
        hub.download_directory("hf://owner/other", ["config.json"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["hf://owner/name", "hf://owner", "hf://owner/name/"])
def test_address_without_a_file_is_refused(address):
    with pytest.raises(ValueError, match="names no file"):
        hub.download_file(address)


def test_missing_client_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"dar-jax\[hub\]"):
        hub.download_file("hf://owner/name/a.pt")


def test_directories_ask_for_their_own_files_only(monkeypatch):
    asked = {}

    def download(**arguments):
        asked.update(arguments)
        return "cache"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    path = hub.download_directory("hf://owner/name/sub/", ["config.json", "tokenizer/config.json"])
    assert path == "cache/sub"
    assert asked == {
        "repo_id": "owner/name",
        "allow_patterns": ["sub/config.json", "sub/tokenizer/config.json"],
    }
