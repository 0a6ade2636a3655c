"""The command line: help, listing, copying, validating, errors and exit codes."""

import dataclasses
import errno
import logging
import os
import resource
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from diffpress.__main__ import explain, require_versions, run
from diffpress.artifact import write_json
from diffpress.compress import cli, pictures
from diffpress.compress.progress import RichProgress
from diffpress.errors import ArtifactError, ConfigError, InfrastructureError, NotComparableError, RegressionError
from diffpress.generator import SamplingPlan
from diffpress.progress import SILENT

COMMANDS = ("ls", "cp", "validate", "run", "generate", "evaluate", "benchmark", "profile", "check")


def invoke(*arguments):
    return CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)


def test_version_answers_at_once():
    """In processor time, which others on the machine do not lengthen much."""

    def once():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "diffpress", "--version"], capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith("diffpress 0.")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(once() for _ in range(3)) < 0.3


def test_importing_diffpress_stays_light():
    code = (
        "import sys, diffpress.__main__; sys.exit(any(name in sys.modules for name in ('torch', 'typer', 'pydantic')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_has_an_example_for_every_command():
    overview = invoke("--help").output
    for name in COMMANDS:
        assert name in overview
        text = invoke(name, "--help").output
        assert f"diffpress {name}" in text.replace("Usage: diffpress", ""), name


def test_ls_shows_recipes_methods_and_targets():
    text = invoke("ls").output
    for name in ("quickstart", "unet-int8", "quantize.int8", "quantize.smooth", "onnxruntime", "tensorrt"):
        assert name in text
    assert "``" not in text
    assert "installed" in text


def test_ls_of_an_artifact(tmp_path):
    from fabricated import fabricate

    from diffpress.compress.report import report_json

    (tmp_path / "report.json").write_text(report_json(fabricate()), encoding="utf-8")
    text = invoke("ls", str(tmp_path)).output
    assert "quantize.int8" in text
    assert "74 operators in 8 bits" in text
    with pytest.raises(ArtifactError):
        invoke("ls", str(tmp_path / "nothing"))


def test_cp_copies_and_never_overwrites(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke("cp", "quickstart").exit_code == 0
    assert "quantize.int8" in (tmp_path / "quickstart.yaml").read_text(encoding="utf-8")
    (tmp_path / "quickstart.yaml").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="not overwritten"):
        invoke("cp", "quickstart")
    assert (tmp_path / "quickstart.yaml").read_text(encoding="utf-8") == "mine"
    assert run(["cp", "quickstart", "other.yaml"]) == 0
    assert run(["validate", "other.yaml"]) == 0
    assert run(["cp", "quickstart", "no/such/other.yaml"]) == 2


def test_validate_prints_the_resolved_recipe(capsys):
    assert run(["validate", "quickstart", "evaluate.samples=64"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["evaluate"]["samples"] == 64


def test_validate_tells_all_errors(capsys, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("model: x\nseed: -1\nsead: 1\n", encoding="utf-8")
    assert run(["validate", str(file), "export.opset=3"]) == 2
    text = capsys.readouterr().err
    assert "bad.yaml:2: seed = -1" in text
    assert "bad.yaml:3: unknown key 'sead': did you mean 'seed'?" in text
    assert "override 'export.opset=3'" in text
    assert run(["validate"]) == 2


def test_what_does_not_fit_the_model_is_told_by_a_dry_run(capsys, dit_folder, tmp_path):
    def dry_run(*changes):
        given = [f"model={dit_folder}", "evaluate.features=null", "gate.frechet_ratio=null", *changes]
        return run(["run", "quickstart", *given, "--output", str(tmp_path / "out"), "--dry-run"])

    assert dry_run() == 0
    assert dry_run("export.height=64", "export.width=64") == 2
    assert "height is 64, but DiTPipeline has a fixed size" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [["nothing"], ["run"], ["run", "quickstart"], ["run", "nowhere", "-o", "x"], ["check"]]
)
def test_bad_command_lines_exit_2_without_traceback(arguments, capsys):
    assert run(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("the value 3 is not allowed"), 2, "the value 3"),
        (RegressionError("slower"), 1, "slower"),
        (NotComparableError("other machine"), 3, "other machine"),
        (InfrastructureError("lost"), 4, "lost"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), 4, "No space left on device: out/x"),
        (OSError(errno.EROFS, "Read-only file system", "out"), 4, "Read-only file system: out"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 4, "Permission denied: out"),
        (MemoryError(), 4, "out of memory"),
        (RuntimeError("write failed: No space left on device (os error 28)"), 4, "No space left on device: write"),
        (RuntimeError("I/O error: File too large (os error 27)"), 4, "File too large: I/O"),
        (ImportError("No module named 'onnx'"), 2, "missing or broken"),
        (KeyError("x"), 70, "a bug of diffpress: KeyError"),
    ],
)
def test_every_error_has_one_message_and_a_code(monkeypatch, capsys, error, code, text):
    def main(arguments, prog_name):
        raise error

    assert explain(error)[1] == code
    monkeypatch.setattr(cli, "command", lambda: SimpleNamespace(main=main))
    assert run(["run"]) == code
    shown = capsys.readouterr().err
    assert text in shown
    assert "Traceback" not in shown
    assert run(["run", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


STOPPED = """
import os, signal, time
from types import SimpleNamespace
from diffpress.__main__ import run
from diffpress.compress import cli

class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)

def main(arguments, prog_name):
    try:
        if SWALLOWED:
            Finalized()
            time.sleep(30)
        if PRESSED:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    except BaseException:
        if not CONVERTS:
            raise
    if CONVERTS:
        raise RuntimeError("returned a result with an exception set")

before = signal.getsignal(signal.SIGINT)
cli.command = lambda: SimpleNamespace(main=main)
code = run(["run"])
print(signal.getsignal(signal.SIGINT) is before)
raise SystemExit(code)
"""


@pytest.mark.parametrize(
    ("pressed", "swallowed", "converts", "code", "text"),
    [
        (True, False, False, 130, "run the same command again to go on"),
        (False, True, False, 130, "run the same command again to go on"),  # by Python: in a finalizer it is ignored
        (True, False, True, 130, "run the same command again to go on"),  # by a library that it stopped in the middle
        (False, False, True, 70, "a bug of diffpress: RuntimeError"),
    ],
)
def test_ctrl_c_says_how_to_go_on(pressed, swallowed, converts, code, text):
    """In a process of its own: the signal would reach the one that runs the tests."""
    script = f"PRESSED, SWALLOWED, CONVERTS = {pressed}, {swallowed}, {converts}{STOPPED}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert text in done.stderr
    assert done.stdout.strip() == "True"


def test_flags_may_stand_anywhere(monkeypatch):
    seen = []
    monkeypatch.setattr(
        cli, "command", lambda: SimpleNamespace(main=lambda arguments, prog_name: seen.append(arguments))
    )
    assert run(["run", "x", "--quiet", "-o", "d", "--debug"]) == 0
    assert seen == [["--quiet", "--debug", "run", "x", "-o", "d"]]


def test_old_packages_are_named(monkeypatch):
    monkeypatch.setattr(
        metadata, "requires", lambda name: ["torch>=999", "nosuchpackage>=1", 'pytest>=999; extra == "dev"']
    )
    with pytest.raises(ConfigError) as caught:
        require_versions()
    assert "torch>=999 is needed, installed:" in str(caught.value)
    assert "nosuchpackage>=1 is needed, installed: none" in str(caught.value)
    assert "pytest" not in str(caught.value)
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch>=1"])
    require_versions()


class _Generator:
    plan = None
    conditioning_kind = "class"

    def conditions(self, count, given):
        return [(given or ["apple"])[index % len(given or [0])] for index in range(count)]

    def sample(self, conditions, *, seeds, plan, batch_size, progress):
        self.used, self.batch, self.conditions_drawn = plan, batch_size, conditions
        assert len(conditions) == len(seeds)
        return SimpleNamespace(images=np.zeros((len(seeds), 8, 8, 3), dtype=np.uint8))


def test_generate_names_pictures_and_overwrites_none(monkeypatch, tmp_path):
    monkeypatch.setattr(pictures, "open_generator", lambda source, variant: _Generator())
    options = {"prompts": ["Red apple!", "7"], "steps": 1}
    files = pictures.generate_pictures("x", tmp_path / "out", range(5, 8), **options)
    assert [file.name for file in files] == ["0005-red-apple.png", "0006-7.png", "0007-red-apple.png"]
    with pytest.raises(ConfigError, match=r"not overwritten: .*0007-red-apple\.png"):
        pictures.generate_pictures("x", tmp_path / "out", range(7, 9), **options)
    assert len(list((tmp_path / "out").iterdir())) == 3
    with pytest.raises(ConfigError, match="is a file; allowed: a folder"):
        pictures.generate_pictures("x", files[0], range(1), **options)


@pytest.mark.parametrize(
    ("own", "given", "used"),
    [
        (None, {}, (20, 3.0)),
        (None, {"steps": 7, "guidance_scale": 0.0}, (7, 0.0)),
        (SamplingPlan(steps=4, guidance_scale=1.0), {}, (4, 1.0)),
        (SamplingPlan(steps=4, guidance_scale=1.0), {"steps": 2}, (2, 1.0)),
    ],
)
def test_generate_takes_the_steps_that_an_engine_was_distilled_for(monkeypatch, tmp_path, own, given, used):
    generator = _Generator()
    generator.plan = own
    monkeypatch.setattr(pictures, "open_generator", lambda source, variant: generator)
    pictures.generate_pictures("x", tmp_path, range(1), prompts=None, **given)
    assert (generator.used.steps, generator.used.guidance_scale) == used


def test_generate_takes_the_steps_of_an_ordinary_engine(monkeypatch, tmp_path):
    generator, made_for = _Generator(), SamplingPlan(steps=7, guidance_scale=1.5, scheduler="DDIMScheduler")
    monkeypatch.setattr(pictures, "open_generator", lambda source, variant: generator)
    manifest = {"export": {"batch": "dynamic"}, "plan": dataclasses.asdict(made_for)}
    write_json(tmp_path / pictures.MANIFEST, manifest)
    for given, used in (({}, (7, 1.5)), ({"steps": 9}, (9, 1.5)), ({"guidance_scale": 0.0}, (7, 0.0))):
        pictures.generate_pictures(str(tmp_path), tmp_path / str(used), range(1), prompts=None, **given)
        assert (generator.used.steps, generator.used.guidance_scale) == used
        assert generator.used.scheduler == "DDIMScheduler"


@pytest.mark.parametrize("scale", ["nan", "inf"])
def test_a_guidance_that_is_no_number_is_bad_input(tmp_path, capsys, scale):
    assert run(["generate", "models/emoji-dit", "--output", str(tmp_path), "--guidance-scale", scale]) == 2
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(ConfigError, match=f"guidance_scale is {scale}; allowed: 0 and more, finite"):
        pictures.generate_pictures("x", tmp_path, range(1), prompts=None, guidance_scale=float(scale))


def test_a_file_in_place_of_the_folder_is_refused_before_a_profile(tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    assert run(["profile", str(tmp_path), "--output", str(tmp_path / "taken")]) == 2
    assert "taken is a file; allowed: a folder" in capsys.readouterr().err


@pytest.mark.parametrize(("batch", "count", "drawn"), [(2, 3, 4), (8, 3, 8), ("dynamic", 3, 3)])
def test_generate_fills_the_batch_that_an_engine_takes(monkeypatch, tmp_path, batch, count, drawn):
    generator = _Generator()
    monkeypatch.setattr(pictures, "open_generator", lambda source, variant: generator)
    write_json(tmp_path / pictures.MANIFEST, {"export": {"batch": batch}, "plan": {"steps": 2}})
    files = pictures.generate_pictures(str(tmp_path), tmp_path / "out", range(count), prompts=["a", "b", "c"])
    assert len(files) == len(list((tmp_path / "out").iterdir())) == count
    assert len(generator.conditions_drawn) == drawn
    assert generator.batch == (4 if batch == "dynamic" else batch)


def test_signs_that_a_code_page_lacks_are_no_bug():
    def told(script):
        ascii_alone = os.environ | {"PYTHONIOENCODING": "ascii"}
        return subprocess.run([sys.executable, "-c", script], capture_output=True, env=ascii_alone)

    shown = "import diffpress.__main__ as m; m.run = lambda given: print('1.02 (0.98\u2013' + '1.06)'); m.main()"
    done = told(shown)
    assert (done.returncode, done.stdout.strip()) == (0, b"1.02 (0.98?1.06)")
    assert b"UnicodeEncodeError" in told("print('0.98\u2013' + '1.06')").stderr


def test_progress_logs_one_line_where_there_is_no_terminal(caplog):
    console = Console(force_terminal=False)
    with caplog.at_level(logging.INFO, "diffpress"), RichProgress(console).task("Sampling", total=4) as advance:
        advance(4)
    assert [record.message.split(" in ")[0] for record in caplog.records] == ["Sampling: 4 done"]
    with SILENT.task("Sampling", total=4) as advance:
        advance(4)


def test_progress_draws_a_bar_on_a_terminal():
    console = Console(force_terminal=True, record=True, width=100)
    with RichProgress(console).task("Sampling original", total=4) as advance:
        advance(2)
    assert "Sampling original" in console.export_text()
    quiet = Console(force_terminal=True, record=True)
    with RichProgress(quiet, quiet=True).task("Sampling", total=4) as advance:
        advance(2)
    assert "Sampling" not in quiet.export_text()
