"""The command `layerfed`: run, compare, report, watch, export, predict, layers, solve, deploy."""

from __future__ import annotations

import glob
import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

# Set before anything imports Flower or Ray: a run sends no telemetry and does not look for updates.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# In a log, of this process or of those it starts, Hugging Face's libraries draw no progress bars.
if not sys.stderr.isatty():
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import layerfed
from layerfed.config import ConfigError, RunConfig, expanded, nearest, parse_override, shipped
from layerfed.config.command_line import App, complete_setting, read_settings
from layerfed.config.errors import one_line_errors
from layerfed.deploy.cli import app as deploy

EngineName = Literal["auto", "inprocess", "ray"]
ENGINES = get_args(EngineName)

if TYPE_CHECKING:
    from layerfed.compare import Plan
    from layerfed.models.layers import Layer, LayerMap
    from layerfed.runs import RunFolder
    from layerfed.task import Task

app = App(
    help="Federated fine-tuning in which every device trains only the layers it can afford.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(deploy, name="deploy")
console = Console(stderr=True, emoji=False)

Settings = Annotated[
    list[str] | None,
    typer.Argument(
        help="A configuration file (conf/*.toml), then key=value settings that override it; "
        "without a file, the defaults.",
        metavar="[CONF] [KEY=VALUE]...",
        autocompletion=complete_setting,
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"layerfed {layerfed.__version__}")
        raise typer.Exit


@app.callback()
def _begin(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    # A user's own task, `module:Class`, may be in the current folder.
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)


def _engine(name: str) -> EngineName:
    return cast(EngineName, _one_of(name, ENGINES, "--engine"))


@app.command()
def run(
    settings: Settings = None,
    engine: Annotated[
        str, typer.Option(help="auto, inprocess (one client at a time) or ray (several)")
    ] = "auto",
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where run folders go", show_default="./runs")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="A run folder to continue, with its own configuration.")
    ] = None,
    verbose: Annotated[bool, typer.Option(help="Show Flower's and Ray's own logs.")] = False,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", help="Print the run folder, and else only warnings and errors."),
    ] = False,
    json_lines: Annotated[
        bool,
        typer.Option(
            "--json-lines",
            help="Print one JSON object a line on standard output: start, rounds, end.",
        ),
    ] = False,
) -> None:
    """Run one federated fine-tuning on this machine, or continue an interrupted one."""
    from layerfed.runs.signals import clean_up_on_sigterm

    clean_up_on_sigterm()
    from layerfed.strategies import checked

    config = checked(read_settings(settings, resume).simulated())
    wanted = _engine(engine)
    if directory is not None:
        if resume is not None:
            raise ConfigError(f"--resume goes on in {resume}; leave out --dir {directory}")
        config = config.model_copy(
            update={"run": config.run.model_copy(update={"dir": str(directory)})}
        )
    # Imported late, so that `--help` and errors in a configuration answer at once.
    from layerfed.engine import choose_engine, run_on
    from layerfed.report import data_table
    from layerfed.runs import JsonLines, ProgressLine
    from layerfed.runs.files import read_json

    logging.getLogger("flwr").setLevel(logging.DEBUG if verbose else logging.WARNING)
    lines = JsonLines(sys.stdout)
    # What a program reads is alone on standard output, whatever a library or a task prints.
    with redirect_stdout(sys.stderr):
        chosen, why = choose_engine(config, wanted)
    shown = _printer(stderr=True, quiet=quiet)
    shown.print(
        f"[bold]{escape(config.task.name)}[/] · {config.strategy.name} · "
        f"{config.federation.clients} clients, {config.federation.clients_per_round} a round, "
        f"{config.federation.rounds} rounds · engine {chosen} ({why})",
        highlight=False,
    )
    folders: list[RunFolder] = []

    def opened(folder: RunFolder) -> None:
        folders.append(folder)
        lines.folder = folder.path
        shown.print(data_table(read_json(folder.path / "data.json")))

    try:
        with redirect_stdout(sys.stderr), ProgressLine(shown) as progress:
            observers = [progress, lines] if json_lines else [progress]
            run_on(chosen, config, observers, verbose=verbose, opened=opened)
    except KeyboardInterrupt:
        _say_how_to_resume([folder.path for folder in folders])
        raise typer.Exit(130) from None
    if quiet and not json_lines:
        typer.echo(folders[0].path)
    elif not json_lines:
        _print_summary(folders[0].path)


def _say_how_to_resume(folders: Sequence[Path]) -> None:
    """Print what an interrupted run has left, and the command that continues it."""
    from layerfed.runs import latest_checkpoint

    if not folders:
        text = "interrupted; nothing was written"
    elif latest_checkpoint(folders[0]) is None:
        text = f"interrupted before the first checkpoint; run folder {folders[0]}"
    else:
        text = f"interrupted; to go on: layerfed run --resume {shlex.quote(str(folders[0]))}"
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _print_summary(folder: Path, page: Path | None = None) -> None:
    from layerfed.report import PAGE, class_table, run_table

    output = _printer(markup=False)
    output.print(run_table(folder))
    if (classes := class_table(folder)) is not None:
        output.print(classes)
    for picture in sorted(folder.glob("*.png")):
        typer.echo(f"picture     {picture}")
    if (page := page or folder / PAGE).exists():
        typer.echo(f"page        {page}")
    typer.echo(f"run folder  {folder}")


@app.command()
def compare(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            help="A configuration file (conf/*.toml) to compare strategies on, or a table file "
            "(conf/tables/*.toml) that says it all; then key=value settings for every run.",
            metavar="[CONF|TABLE] [KEY=VALUE]...",
            autocompletion=complete_setting,
        ),
    ] = None,
    strategies: Annotated[
        str, typer.Option(help="Strategies, separated by commas", show_default="all")
    ] = "",
    budgets: Annotated[
        str,
        typer.Option(
            help="Budgets: numbers or half-normal, separated by commas", show_default="1,2"
        ),
    ] = "",
    seeds: Annotated[
        str,
        typer.Option(help="Seeds, separated by commas", show_default="the table file's, or 0,1,2"),
    ] = "",
    only: Annotated[
        str, typer.Option(help="Experiments of a table file to keep, separated by commas")
    ] = "",
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            help="Where run folders and tables go",
            show_default="runs/compare; of a table file: runs/tables",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, a process each")] = 1,
    engine: Annotated[
        str, typer.Option(help="auto, inprocess or ray; auto with --jobs is inprocess")
    ] = "auto",
) -> None:
    """Compare strategies: run what is missing, write tables and pictures. Run it again to continue."""
    from layerfed.compare import compare as carry_out
    from layerfed.runs.progress import RunsBar
    from layerfed.runs.signals import clean_up_on_sigterm

    clean_up_on_sigterm()
    plan, place = _plan(settings, strategies, budgets, seeds, only)
    try:
        with RunsBar(console) as bar:
            files, failed = carry_out(
                plan,
                expanded(str(directory or place)).resolve(),
                jobs=jobs,
                engine=_engine(engine),
                say=lambda line: console.print(escape(line), highlight=False, soft_wrap=True),
                show=bar.show,
            )
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from here")
        raise typer.Exit(130) from None
    typer.echo(files[0].read_text(encoding="utf-8"))
    typer.echo("\n".join(f"written: {file}" for file in files))
    if failed:
        console.print(f"[bold red]failed:[/] {failed} runs; the same command tries them again")
        raise typer.Exit(1)


def _plan(
    settings: list[str] | None, strategies: str, budgets: str, seeds: str, only: str
) -> tuple[Plan, Path]:
    """Return the comparison that a command line describes, and its default folder."""
    from layerfed.compare import (
        Budget,
        Experiment,
        Plan,
        Row,
        is_table_file,
        load_plan,
        parse_seeds,
        refuse_grid_keys,
    )
    from layerfed.config.section import words
    from layerfed.strategies import STRATEGIES

    given = list(settings or [])
    overrides = [word for word in given if "=" in word]
    refuse_grid_keys((parse_override(word)[0] for word in overrides), "command line")
    file = shipped(Path(given[0])) if given and "=" not in given[0] else None
    if file is not None and is_table_file(file):
        for option, value in (("--strategies", strategies), ("--budgets", budgets)):
            if value:
                raise ConfigError(f"{option} {value}: {file} has rows and budgets of its own")
        numbers = parse_seeds(words(seeds))
        return load_plan(file, given[1:], seeds=numbers, only=words(only)), Path("runs/tables")
    if only:
        raise ConfigError(f"--only {only} is for table files, which have several experiments")
    base = read_settings(settings)
    names = words(strategies) or list(STRATEGIES)
    plan = Plan(
        name="table",
        title=f"{base.task.name}: strategies compared",
        rows=[Row(name) for name in names],
        budgets=[Budget.parse(budget) for budget in words(budgets or "1,2")],
        experiments=[Experiment(base.task.name, base.task.name, base)],
        seeds=parse_seeds(words(seeds or "0,1,2")),
        reference="ilp" if "ilp" in names else "",
    )
    return plan, Path("runs/compare")


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            exists=True,
            file_okay=False,
            metavar="RUN...",
            help="A run folder; or several, or folders of runs, which are compared",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            dir_okay=False,
            help="The page",
            show_default="report.html in the folder; of several runs, in the current one",
        ),
    ] = None,
) -> None:
    """Write the page of a run, with its pictures and figures, or of a comparison of runs."""
    from layerfed.report import (
        PAGE,
        comparison_view,
        draw_run,
        run_folders,
        run_view,
        sections_of,
        write_page,
    )

    with one_line_errors(OSError, ValueError, KeyError):
        if len(runs) == 1 and (runs[0] / "summary.json").exists():
            folder = runs[0].resolve()
            try:
                draw_run(folder)
            except OSError:
                if out is None:  # the page itself goes elsewhere
                    raise
            page = write_page(run_view(folder), (out or folder / PAGE).expanduser().resolve())
            _print_summary(folder, page)
            return
        # `layerfed compare` writes tables and page after each run, so they are up to date.
        if len(runs) == 1 and _print_tables(runs[0].resolve()) and out is None:
            return
        found = {each.resolve(): None for place in runs for each in run_folders(place)}
        if not found:
            raise ConfigError(
                f"{', '.join(map(str, runs))} is no run folder and no folder of a comparison: it has "
                "neither summary.json nor a table"
            )
        sections, left_out = sections_of(found)
        for name, reason in left_out:
            console.print(f"left out: {name}: {reason}", markup=False, highlight=False)
        place = runs[0].resolve() if len(runs) == 1 else Path.cwd()
        page = (out or place / PAGE).expanduser().resolve()
        title = runs[0].resolve().name if len(runs) == 1 else "comparison"
        typer.echo(f"page        {write_page(comparison_view(title, sections, left_out), page)}")


def _print_tables(folder: Path) -> bool:
    """Print a comparison's tables and where its pictures are; return whether there are any."""
    tables = [file for file in sorted(folder.glob("*.md")) if file.with_suffix(".csv").exists()]
    for table in tables:
        typer.echo(table.read_text(encoding="utf-8"))
        for picture in sorted(folder.glob(f"{glob.escape(table.stem)}-*.png")):
            typer.echo(f"picture     {picture}")
        if (page := table.with_suffix(".html")).exists():
            typer.echo(f"page        {page}")
    return bool(tables)


@app.command()
def watch(
    place: Annotated[
        Path,
        typer.Argument(
            metavar="[RUN|DIR]", help="A run folder, or a folder of runs", show_default="./runs"
        ),
    ] = Path("runs"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one")] = 0,
    terminal: Annotated[bool, typer.Option("--terminal", help="Show runs here instead.")] = False,
) -> None:
    """Show runs while they go on: pages on this machine only, or a view in the terminal."""
    if not place.expanduser().is_dir():
        raise ConfigError(f"{place} is no folder; name a run folder, or a folder of runs")
    folder = place.expanduser().resolve()
    try:
        if terminal:
            from layerfed.watch.terminal import watch_terminal

            watch_terminal(folder, _printer())
        else:
            from layerfed.watch.server import serve_watch

            console.print("The address is a secret: who has it sees these runs. Ctrl-C ends it.")
            serve_watch(folder, port, lambda address: print(address, flush=True))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command()
def layers(settings: Settings = None) -> None:
    """Print how a configuration's model is split into layers."""
    config = read_settings(settings)
    from layerfed.task import load_task

    task = load_task(config)
    found = task.layers(task.adapted(task.skeleton()))
    table = Table(title=f"{escape(config.task.name)}: {found.num_blocks} selectable layers")
    table.add_column("layer", no_wrap=True)
    table.add_column("role", no_wrap=True)
    table.add_column("modules", overflow="fold")
    for column in ("parameters", "MB", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    costs = _measured(config) if config.budget.unit in ("flops", "seconds", "memory") else {}
    if costs:
        table.add_column(f"own {config.budget.unit}", justify="right", no_wrap=True)
        table.add_column("when lowest", justify="right", no_wrap=True)
    total = sum(layer.elements for layer in found.layers)
    role = {"embeddings": "frozen", "block": "selectable", "head": "always trained"}
    for layer in found.layers:
        table.add_row(
            escape(layer.name),
            role[layer.kind] + _kept(layer, found),
            escape(", ".join(_with_tensors(layer, found))),
            f"{layer.elements:,}",
            f"{layer.bytes / 1e6:.3f}",
            f"{layer.elements / total:.1%}",
            *costs.get(layer.name, ()),
        )
    output = _printer()
    output.print(table)
    if (predicted := _predicted(config, task)) is not None:
        output.print(predicted)


def _kept(layer: Layer, layers: LayerMap) -> str:
    """Return what a layer's role says of tensors that stay on clients."""
    if layer.name in layers.personal:
        return ", personal"
    return ", with personal adapters" if layer.own else ""


def _predicted(config: RunConfig, task: Task) -> Table | None:
    """Return a table of the memory of a training step by mask; None for a task without an example."""
    from layerfed.client.memory import Phases
    from layerfed.doctor.job import predicted_by_mask, storage_of

    if not (predicted := predicted_by_mask(config, task)):
        return None
    batch = config.train.batch_size
    table = Table(
        title=f"memory of a training step in MB: batch {batch}, storage {storage_of(config)}"
    )
    table.add_column("trained", no_wrap=True)
    for column in (field.name for field in fields(Phases)):
        table.add_column(column, justify="right", no_wrap=True)
    for name, found in predicted.items():
        table.add_row(name, *(f"{number / 1e6:.1f}" for number in asdict(found).values()))
    return table


@app.command()
def doctor(
    settings: Settings = None,
    federation: Annotated[
        Path, typer.Option("--dir", help="A federation's folder, whose certificates are checked")
    ] = Path("federation"),
    seconds: Annotated[
        float, typer.Option(help="The most that trying the configuration may take", min=1)
    ] = 300.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON on standard output, and nothing else.")
    ] = False,
) -> None:
    """Look at this machine, and at what a run of CONF will take; exit 0 only if nothing is wrong."""
    from layerfed.doctor import findings
    from layerfed.runs.signals import clean_up_on_sigterm

    clean_up_on_sigterm()
    config = read_settings(settings) if settings else None
    output = Console(quiet=as_json, highlight=False, soft_wrap=True, markup=False, emoji=False)
    marks = {"ok": "ok", "note": "note", "wrong": "WRONG"}
    styles = {"ok": "green", "note": "yellow", "wrong": "bold red"}
    seen = []
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        for found in findings(config, federation, seconds):
            seen.append(found)
            output.print(f"{marks[found.status]:5}", style=styles[found.status], end="  ")
            output.print(f"{found.check:12} {found.text}")
            if found.advice:
                output.print(f"{'':20}→ {found.advice}")
    wrong = sum(found.status == "wrong" for found in seen)
    if as_json:
        typer.echo(json.dumps({"wrong": wrong, "findings": [asdict(found) for found in seen]}))
    elif config is None:
        output.print("A configuration (layerfed doctor conf/default.toml) is tried as well.")
    raise typer.Exit(1 if wrong else 0)


@app.command()
def data(
    settings: Settings = None,
    picture: Annotated[
        Path, typer.Option(help="The picture of the partition; SVG and PDF are written beside it")
    ] = Path("partition.png"),
) -> None:
    """Print who holds how many examples of which classes and groups, and draw the partition."""
    config = read_settings(settings).simulated()
    from layerfed.report import data_table, draw_partition, save_picture
    from layerfed.task import load_task
    from layerfed.task.overview import describe_data

    found = describe_data(load_task(config), config.federation.population)
    output = _printer()
    for what in ("classes", "groups"):
        names = ", ".join(found[what][:50])
        output.print(f"{what:9}{len(found[what])}{': ' * bool(names)}{escape(names)}")
    sizes = [client["examples"] for client in found["clients"]]
    output.print(f"clients  {len(sizes)}, of {min(sizes):,} to {max(sizes):,} training examples")
    output.print(data_table(found))
    with one_line_errors(OSError):
        file = save_picture(draw_partition(found), picture.expanduser().resolve())
        typer.echo(f"picture  {file}")


def _measured(config: RunConfig) -> dict[str, tuple[str, str]]:
    """Measure c_l and c_l + D_l here, as the clients will on their devices."""
    from layerfed.client.workbench import workbench

    bench = workbench(config.to_flat())
    own, depth = bench.costs(0, config.budget.unit)  # type: ignore[arg-type]
    return {
        block.name: (f"{c:.4g}", f"{c + d:.4g}")
        for block, c, d in zip(bench.resident.layers.blocks, own, depth, strict=True)
    }


def _with_tensors(layer: Layer, layers: LayerMap) -> list[str]:
    """Return a layer's modules with tensors, and its loose parameters; no dropouts or activations."""
    inside = [m for m in layer.modules if any(t.startswith(m + ".") for t in layer.tensors)]
    loose = [t for t in layer.tensors if not any(t.startswith(m + ".") for m in inside)]
    blocks = tuple(f"{module}." for block in layers.blocks for module in block.modules)
    if layers.adapted and layer is layers.embeddings:
        loose = [t for t in loose if not t.startswith(blocks)]
        folded = " and what those change" if layers.blocks[0].frozen else ""
        return [*loose, *inside, f"all weights of the blocks but their adapters{folded}"]
    return [*loose, *inside]


@app.command()
def solve(
    instance: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            help=escape('JSON: {"values": [[…]], "costs": […], "budgets": […], "consistency": λ}'),
        ),
    ],
    solver: Annotated[str, typer.Option(help="auto, lagrangian or milp")] = "auto",
    time_limit: Annotated[float, typer.Option(help="Seconds", min=0.0)] = 60.0,
    gap: Annotated[float, typer.Option(help="Relative gap that counts as optimal")] = 1e-6,
    rounding: Annotated[
        float, typer.Option(help="Share of a budget that rounding costs may take; 0: exact")
    ] = 0.0,
) -> None:
    """Solve one instance of the selection problem (P1) and print the masks as JSON."""
    from layerfed.selection import SelectionError, SelectionProblem, round_costs
    from layerfed.selection import solve as solve_problem

    with one_line_errors(ValueError, SelectionError):
        try:
            data: Any = json.loads(instance.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{instance} is not valid JSON: {error}") from None
        if solver not in ("auto", "lagrangian", "milp"):
            raise ValueError(
                f"--solver {solver} is unknown; choose auto, lagrangian or milp"
                f"{nearest(solver, ('auto', 'lagrangian', 'milp'))}"
            )
        problem, taken = round_costs(SelectionProblem.from_json(data), rounding)
        found = solve_problem(
            problem,
            solver=solver,  # type: ignore[arg-type]
            time_limit=time_limit,
            gap=gap,
        )
    typer.echo(json.dumps({**found.to_json(), "rounding": taken}))


Best = Annotated[
    bool, typer.Option("--best", help="The best round's model instead of the last round's.")
]
Finished = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A run folder")]


@app.command()
def export(
    run: Finished,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the model")],
    best: Best = False,
    form: Annotated[
        str, typer.Option("--format", help="native (the model's own library), onnx or peft")
    ] = "native",
    push_to_hub: Annotated[
        str, typer.Option(help="Upload to this repository, OWNER/NAME; a new one is private")
    ] = "",
) -> None:
    """Write a run's whole model in the form of its own library, with a model card."""
    from layerfed.export import ExportFormat, SavedRun, export_run

    wanted = _one_of(form, get_args(ExportFormat), "--format")
    with one_line_errors(OSError):
        saved = SavedRun.open(run.resolve(), best=best)
        address = export_run(saved, directory.resolve(), cast(ExportFormat, wanted), push_to_hub)
    typer.echo(f"model of round {saved.round}: {directory.resolve()}")
    if address:
        typer.echo(f"uploaded to {address}")


@app.command()
def predict(
    run: Finished,
    files: Annotated[
        list[Path],
        typer.Argument(help="Images; texts (.txt); or tables of either (CSV, TSV, JSON, parquet)"),
    ],
    best: Best = False,
    form: Annotated[str, typer.Option("--format", help="csv, or json: an object a line")] = "csv",
) -> None:
    """Print the labels that a run's model gives to files, with their scores."""
    from layerfed.export import SavedRun, predictions, write_rows

    wanted = cast(Literal["csv", "json"], _one_of(form, ("csv", "json"), "--format"))
    rows_go = sys.stdout
    # What a program reads is alone on standard output, whatever a library or a task prints.
    with redirect_stdout(sys.stderr):
        saved = SavedRun.open(run.resolve(), best=best)
        write_rows(predictions(saved, files), wanted, rows_go)


def _printer(**options: Any) -> Console:
    """Return a console for tables; in a file, which has no width, few of them are broken."""
    found = Console(emoji=False, **options)  # :b: is a part of a path
    if not found.is_terminal:
        found.width = 160
    return found


def _one_of(value: str, allowed: Sequence[str], option: str) -> str:
    if value not in allowed:
        raise ConfigError(
            f"{option} {value} is unknown; choose one of {', '.join(allowed)}{nearest(value, allowed)}"
        )
    return value


if __name__ == "__main__":
    app()
