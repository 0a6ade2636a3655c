"""What is done stays done, what is half is not there, and what is not ours is not touched."""

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from diffpress.artifact import Artifact, file_hash, folder_hash, load_weights, read_json, save_weights, write_json
from diffpress.errors import ArtifactError, ConfigError, InfrastructureError


class Work:
    """A step that counts how often it is done."""

    def __init__(self, text="result"):
        self.times, self.text = 0, text

    def __call__(self, path):
        self.times += 1
        path.mkdir()
        (path / "file.txt").write_text(self.text)
        return {"fact": 7}


@pytest.fixture
def run(tmp_path):
    """Do the step called "first" in a fresh opening of the same folder: ``run(work, key="k")``."""

    def do(work, key="k"):
        with Artifact.open(tmp_path / "out") as artifact:
            return artifact.step("first", key, "stages/first", work)

    return do


def test_a_step_is_done_once(run, tmp_path):
    work = Work()
    entry = run(work)
    assert run(work) == entry
    assert work.times == 1
    assert {"name": "first", "key": "k", "output": "stages/first", "fact": 7}.items() <= entry.items()
    assert entry["hash"] == folder_hash(tmp_path / "out/stages/first")
    assert entry["seconds"] >= 0
    assert entry["peak_memory_mib"] > 10
    assert json.loads((tmp_path / "out/history.json").read_text()) == [entry]


def test_another_key_does_it_again(run, tmp_path):
    run(Work("old"))
    work = Work("new")
    run(work, key="other")
    assert work.times == 1
    assert (tmp_path / "out/stages/first/file.txt").read_text() == "new"
    assert len(read_json(tmp_path / "out/history.json")) == 1


@pytest.mark.parametrize("alter", [lambda f: f.write_text("altered"), Path.unlink, lambda f: f.rename(f"{f}2")])
def test_altered_output_is_done_again(run, tmp_path, alter):
    work = Work()
    run(work)
    alter(tmp_path / "out/stages/first/file.txt")
    run(work)
    assert work.times == 2
    assert [path.name for path in (tmp_path / "out/stages/first").iterdir()] == ["file.txt"]


def test_a_step_that_fails_leaves_neither_output_nor_entry(run, tmp_path):
    def fail(path):
        Work()(path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(fail)
    assert not (tmp_path / "out/stages/first").exists()
    assert read_json(tmp_path / "out/history.json") == []
    assert run(Work())["fact"] == 7  # the half output in its way is cleared


def test_a_step_that_fails_keeps_the_finished_one_before(run, tmp_path):
    entry = run(Work("old"))
    with pytest.raises(ZeroDivisionError):
        run(lambda path: {"fact": 1 // 0}, key="other")
    assert run(Work("not done")) == entry
    assert (tmp_path / "out/stages/first/file.txt").read_text() == "old"


def test_entries_are_found_by_name(tmp_path):
    with Artifact.open(tmp_path / "out") as artifact:
        artifact.step("first", "k", "one.txt", lambda path: {"bytes": path.write_text("x")})
        assert artifact.entry("first")["bytes"] == 1
        with pytest.raises(ArtifactError, match="step 'second' has not finished"):
            artifact.entry("second")


def test_one_run_at_a_time(tmp_path):
    with Artifact.open(tmp_path), pytest.raises(ArtifactError, match="another run is at work"):
        Artifact.open(tmp_path).__enter__()
    with Artifact.open(tmp_path):
        pass  # and free again afterwards


def test_foreign_folders_and_files_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="holds other things"), Artifact.open(tmp_path):
        pass
    with pytest.raises(ConfigError, match="is a file"), Artifact.open(tmp_path / "thesis.tex"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_killed_before_the_first_history_it_still_starts(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".history.json.partial").write_text("[")
    with Artifact.open(tmp_path) as artifact:
        assert artifact.history == []


@pytest.mark.parametrize("text", ["", "[{", "\x00"])
def test_broken_history(tmp_path, text):
    (tmp_path / "history.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"history\.json cannot be read"), Artifact.open(tmp_path):
        pass


@pytest.mark.parametrize("text", ["[1, 2]", '{"loss": [0.3]}', '[{"epoch": 1}]'])
def test_a_history_of_something_else(tmp_path, text):
    (tmp_path / "history.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"is not a history that diffpress wrote"), Artifact.open(tmp_path):
        pass
    assert (tmp_path / "history.json").read_text() == text


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, number):
    def refuse(self, **_):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InfrastructureError, match="cannot be written"), Artifact.open(tmp_path / "out"):
        pass


def test_what_fails_inside_is_not_the_folders_fault(tmp_path):
    with pytest.raises(PermissionError, match="weights"), Artifact.open(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "no", "weights")


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 30, 1 << 30, 5 << 20))
    with pytest.raises(InfrastructureError, match="5 MiB are free, about 6 MiB are needed"):
        Artifact.open(tmp_path, need=6 << 20).__enter__()
    with Artifact.open(tmp_path, need=5 << 20):
        pass


def test_folder_hash_follows_names_and_contents(tmp_path):
    def make(name, files):
        for path, text in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text)
        return folder_hash(tmp_path / name)

    files = {"a.txt": "1", "sub/b.txt": "2"}
    assert make("one", files) == make("two", dict(reversed(files.items())))
    others = [{"a.txt": "1", "sub/b.txt": "3"}, {"a.txt": "1", "b.txt": "2"}, {"a.txt": "2", "sub/b.txt": "1"}]
    assert len({make("one", files), *(make(f"other{i}", changed) for i, changed in enumerate(others))}) == 4
    assert folder_hash(tmp_path / "one/a.txt") == file_hash(tmp_path / "one/a.txt")
    assert file_hash(tmp_path / "one/a.txt") == "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
    make("one", {"notes.md": "not counted"})
    assert folder_hash(tmp_path / "one", suffixes=(".txt",)) == folder_hash(tmp_path / "two")


def test_json_is_whole_or_not_there(tmp_path, monkeypatch):
    write_json(tmp_path / "data.json", {"b": 1, "a": [Path("x")]})
    assert read_json(tmp_path / "data.json") == {"a": ["x"], "b": 1}
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        write_json(tmp_path / "data.json", {"a": "new"})
    assert read_json(tmp_path / "data.json") == {"a": ["x"], "b": 1}
    with pytest.raises(ArtifactError, match="is missing"):
        read_json(tmp_path / "other.json")


def test_weights_round_trip(tmp_path):
    path, first, second = tmp_path / "w.safetensors", torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    save_weights(first, path)
    assert not torch.equal(first.weight, second.weight)
    load_weights(second, path)
    assert torch.equal(first.weight, second.weight)


def test_weights_that_cannot_be_loaded(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(torch.nn.Linear(4, 3), path)
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_weights(torch.nn.Linear(4, 2), path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_weights(torch.nn.Linear(4, 3), path)
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_weights(torch.nn.Linear(4, 3), tmp_path / "missing.safetensors")
