"""The commands. Each is a thin shell around a function of the library; errors are told in `diffpress.__main__`."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffpress import __version__
from diffpress.compress.console import err, folder_for, out, place_for, print_table
from diffpress.errors import ConfigError, DiffpressError

if TYPE_CHECKING:
    import click

    from diffpress.compress.progress import RichProgress
    from diffpress.compress.report import Report

app = typer.Typer(
    name="diffpress",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
_state = {"quiet": False}


RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes, as evaluate.samples=64 or quantize.int8.observer=mse."),
]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that 'diffpress run' made.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", callback=place_for, help="Write every figure as JSON.")
]


def command() -> click.Command:
    """The whole command line."""
    return typer.main.get_command(app)  # type: ignore[return-value]


@app.callback()
def _global(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and more log lines.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Turn a pretrained diffusion generator into a small, fast engine, and prove what it cost.

    Start with: [bold]diffpress run quickstart --output demo[/]
    """
    if version:
        out.print(f"diffpress {__version__}")
        raise typer.Exit
    _state["quiet"] = quiet
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    logging.getLogger("diffpress").setLevel(logging.DEBUG if debug else logging.INFO)
    if not debug:
        warnings.simplefilter("ignore")


@app.command()
def ls(
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Show what is in this artifact instead.")
    ] = None,
) -> None:
    """List recipes, methods and targets; or the stages of an artifact.

    [bold]Examples[/]

    diffpress ls

    diffpress ls demo
    """
    if directory is not None:
        _show_artifact(directory)
        return
    from diffpress.compress.recipe import recipe_summary, shipped_recipes
    from diffpress.targets import TARGETS

    print_table(("recipe", "what it does"), ((name, recipe_summary(file)) for name, file in shipped_recipes().items()))
    print_table(("method", "what it does"), ((name, _summary(cls)) for name, cls in sorted(_methods().items())))
    print_table(
        ("target", "8-bit activations", "here"), ((name, _codes(TARGETS[name]), _here(name)) for name in TARGETS)
    )
    out.print("To change a recipe: diffpress cp RECIPE. To see all of its settings: diffpress validate RECIPE.")


@app.command()
def cp(
    recipe: RecipeArgument,
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="Where to; default: RECIPE.yaml here.")] = None,
) -> None:
    """Copy a recipe here, to change it. An existing file is not overwritten.

    [bold]Examples[/]

    diffpress cp quickstart

    diffpress cp unet-int8 mine.yaml
    """
    from diffpress.compress.loading import find_recipe
    from diffpress.compress.recipe import recipes_folder

    source = find_recipe(recipe)
    target = file or Path(source.name)
    target = target / source.name if target.is_dir() else target
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent} is no folder, so {target.name} cannot be put there")
    if target.exists():
        raise ConfigError(f"{target} exists and is not overwritten; give another name: diffpress cp {recipe} FILE")
    schema = (recipes_folder() / "recipe.schema.json").as_posix()
    text = source.read_text(encoding="utf-8").replace("$schema=recipe.schema.json", f"$schema={schema}")
    target.write_text(text, encoding="utf-8")
    typer.echo(str(target))


@app.command()
def validate(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or a file.")] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of recipes, for editors.")] = False,
) -> None:
    """Check a recipe and print it with every default written out. All errors are told at once, with their lines.

    [bold]Examples[/]

    diffpress validate mine.yaml

    diffpress validate quickstart evaluate.samples=64 quantize.int8.observer=mse

    diffpress validate --schema > recipe.schema.json
    """
    import json

    from diffpress.compress.loading import load_recipe
    from diffpress.compress.recipe import dump_recipe, recipe_schema

    if schema:
        typer.echo(json.dumps(recipe_schema(_configs()), indent=2, ensure_ascii=False))
    elif recipe is None:
        raise ConfigError("name a recipe: diffpress validate RECIPE; 'diffpress ls' lists those that ship")
    else:
        typer.echo(dump_recipe(load_recipe(recipe, overrides or [], methods=_configs())), nl=False)


@app.command()
def run(
    recipe: RecipeArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for everything the run makes.")],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything that is cheap to check, then stop.")
    ] = False,
) -> None:
    """Compress a model, export the engine, measure it and judge it. A stopped run goes on where it was.

    Exit code 1 when the recipe's gate fails.

    [bold]Examples[/]

    diffpress run quickstart --output demo

    diffpress run dit-int8 model=path/to/pipeline evaluate.features=null gate.frechet_ratio=null --output out

    diffpress run mine.yaml evaluate.samples=2048 --output out --dry-run
    """
    from diffpress.compress import runner
    from diffpress.compress.loading import load_recipe

    loaded = load_recipe(recipe, overrides or [], methods=_configs())
    result = runner.run(loaded, output, dry_run=dry_run, progress=_progress())
    if dry_run:
        err.print("The recipe fits the model and the target; nothing was built.")
    elif result is not None:
        _finish(result.report, result.directory)


@app.command()
def generate(
    source: Annotated[str, typer.Argument(metavar="DIR|MODEL", help="An artifact, a diffusers folder or a hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder for the pictures.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A prompt or a class; may be given several times.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures; prompts are used in turn.")] = 4,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Seed of the first picture; the next ones count up.")] = 0,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Sampling steps.", show_default="what an engine was made for, or 20"),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(min=0, help="Classifier-free guidance; 1: none.", show_default="likewise, or 3"),
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Which weights of a model that has several, as fp16.")] = None,
) -> None:
    """Make pictures with an engine or with an original model. Existing pictures are not overwritten.

    [bold]Examples[/]

    diffpress generate demo --output pictures --count 8

    diffpress generate models/emoji-unet --output pictures --prompt "red apple" --seed 7
    """
    from diffpress.compress.pictures import generate_pictures

    seeds = range(seed, seed + count)
    options = {"prompts": prompt, "steps": steps, "guidance_scale": guidance_scale, "variant": variant}
    files = generate_pictures(source, output, seeds, **options, progress=_progress())  # type: ignore[arg-type]
    for file in files:
        typer.echo(str(file))


@app.command()
def evaluate(directory: Directory) -> None:
    """Measure the engine in DIR again and write its report anew.

    [bold]Example[/]

    diffpress evaluate demo
    """
    from diffpress.compress import runner

    _finish(runner.evaluate(directory, progress=_progress()), directory)


@app.command()
def benchmark(
    directory: Directory,
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved timing rounds.")] = 20,
    processes: Annotated[int, typer.Option(min=1, help="Fresh processes, each of so many rounds.")] = 1,
    beside: Annotated[list[Path] | None, typer.Option(metavar="DIR", help="More runs, or engines, to time.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Time the engine in DIR beside stock diffusers and other engines, in turns. The report is left alone.

    [bold]Examples[/]

    diffpress benchmark demo --rounds 50

    diffpress benchmark out/small --beside out/int8 --processes 6 --json small.json
    """
    from diffpress.compress import measured, tables
    from diffpress.compress.runner import measure_latency

    rows = measure_latency(directory, rounds=rounds, processes=processes, beside=beside or (), progress=_progress())
    print_table(*tables.timing_table(rows))
    if json_file:
        measured.write_timings(rows, json_file)


@app.command()
def profile(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that 'diffpress run' made, or an engine.")],
    batch: Annotated[
        int | None, typer.Option(help="Pictures at once.", show_default="1, or what the engine takes")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Runs that are timed, and calls of each engine.")] = 20,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", callback=folder_for, help="For profile.json and profile.svg."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Show where the time of the engine in DIR goes: by part, by layer and by kind of work.

    [bold]Examples[/]

    diffpress profile demo

    diffpress profile demo --batch 4 --rounds 50 --output where
    """
    from diffpress.compress import tables
    from diffpress.compress.profile import profile_engine
    from diffpress.compress.profile_output import write_profile

    found = profile_engine(directory, batch=batch, rounds=rounds, progress=_progress())
    for table in (tables.parts_table, tables.layers_table, tables.honesty_table):
        print_table(*table(found))
    for file in write_profile(found, output, json_file):
        typer.echo(str(file))


@app.command()
def check(
    directory: Directory,
    baseline: Annotated[
        Path, typer.Option("--baseline", "-b", metavar="FILE_OR_DIR", help="A report.json, or an artifact folder.")
    ],
    strict: Annotated[bool, typer.Option("--strict", help="An undecided outcome fails too.")] = False,
    margin: Annotated[
        list[str] | None,
        typer.Option(
            "--margin", metavar="NAME=VALUE", help="frechet, coverage, latent_error or latency, as latency=1.05."
        ),
    ] = None,
    junit: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE", callback=place_for, help="Write JUnit XML.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", callback=place_for, help="Write a summary.")
    ] = None,
) -> None:
    """Is DIR no worse than a baseline, in quality and latency?

    Exit code 0 pass, 1 regression, 2 bad input, 3 not comparable, 4 infrastructure.

    [bold]Examples[/]

    diffpress check out --baseline released

    diffpress check out --baseline baseline.json --margin latency=1.05 --junit check.xml --markdown check.md
    """
    from diffpress.compress import check as checking
    from diffpress.compress import check_output

    for file in filter(None, (junit, markdown)):
        file.unlink(missing_ok=True)  # of an earlier check
    try:
        named = [pair.partition("=")[0] for pair in margin or []]
        result = checking.check(directory, baseline, margins=checking.read_margins(margin or []), named=named)
    except DiffpressError as error:
        if junit is not None:
            junit.write_text(check_output.junit_error(error), encoding="utf-8")
        if markdown is not None:
            markdown.write_text(check_output.markdown_error(error), encoding="utf-8")
        raise
    if junit is not None:
        junit.write_text(check_output.junit(result, strict=strict), encoding="utf-8")
    if markdown is not None:
        markdown.write_text(check_output.markdown(result), encoding="utf-8")
    out.print(check_output.table(result))
    if result.outcome == "undecided" and not strict:
        err.print(f"[yellow]warning:[/] {result.sentence}; it counts as passed (--strict makes it fail)")
    result.require(strict=strict)


def _finish(report: Report, directory: Path) -> None:
    """Print the verdict and where the page is; exit 1 where the gate failed."""
    color = {"pass": "green", "fail": "red", "undecided": "yellow"}.get(report.verdict.outcome, "bold")
    out.print(f"[bold {color}]{report.verdict.outcome}[/]: {report.verdict.headline}", highlight=False, soft_wrap=True)
    for item in report.verdict.criteria:
        out.print(f"  {item.outcome}: {item.sentence}", highlight=False, soft_wrap=True)
    typer.echo(f"report: {directory / 'report.html'}")
    if report.verdict.outcome == "fail":
        raise typer.Exit(1)


def _show_artifact(directory: Path) -> None:
    from diffpress.compress import tables
    from diffpress.compress.report import read_report

    report = read_report(directory)
    print_table(*tables.stages_table(report))
    out.print(f"{report.verdict.outcome}: {report.verdict.headline}", highlight=False)


def _methods() -> dict[str, Any]:
    from diffpress.compress.methods import METHODS

    return METHODS


def _configs() -> dict[str, type]:
    return {name: stage.Config for name, stage in _methods().items()}


def _summary(cls: type) -> str:
    """First line of the docstring, without the method's own name, as a sentence."""
    line = (cls.__doc__ or "").strip().partition("\n")[0].rpartition("``: ")[2]
    return line[:1].upper() + line[1:]


def _codes(target: Any) -> str:
    if target.symmetric:
        return "int8, no zero point"
    return "uint8, zero point" if target.lopsided < 1 else "int8, or uint8 and zero point"


def _here(target: str) -> str:
    """Whether the run-time is installed, or how to get it."""
    from importlib.util import find_spec

    if find_spec(target) is not None:
        return "installed"
    return f"not installed: pip install 'diffpress\\[{'gpu' if target == 'tensorrt' else target}]'"


def _progress() -> RichProgress:
    from diffpress.compress.progress import RichProgress

    return RichProgress(err, quiet=_state["quiet"])
