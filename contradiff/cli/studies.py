"""The command `contradiff study`: what a study has, what it lacks, and its page."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from contradiff.cli.progress import say

if TYPE_CHECKING:
    from contradiff.studies.collecting import Collection
    from contradiff.studies.members import Member
    from contradiff.studies.study import Study

ROOT = Path()


def study(
    name: Annotated[
        str | None, typer.Argument(help="A file of studies/, without .yaml. Without it: a list.")
    ] = None,
    *,
    run: Annotated[
        bool, typer.Option("--run", help="Also start DVC's workers, and wait for them.")
    ] = False,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=1, help="For --run: how many workers.")
    ] = 1,
    report: Annotated[
        bool, typer.Option("--report", help="Collect the results, and write docs/studies.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print members, commands and hours.")
    ] = False,
    slurm: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Write an sbatch script a member to this folder."),
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Also run members whose results come from other code.")
    ] = False,
) -> None:
    """Show which experiments of a study exist, and queue those that are missing.

    An experiment counts if its parameters (but for the section runtime) are those of the study, and
    its results are complete. Its name does not matter. The exit code is 1 if a member fails.
    """
    from contradiff.studies.study import read_study

    if sum([run, report, dry_run, slurm is not None]) > 1:
        raise typer.BadParameter("choose one of --run, --report, --dry-run and --slurm")
    if name is None:
        if run or report or dry_run or again or slurm is not None:
            raise typer.BadParameter("name a study; `contradiff study` lists them")
        _print_studies()
        return
    content = read_study(ROOT, name)
    members, found = _look(name, content)
    if report:
        _report(name, content, found)
        return
    _print_standings(found)
    _print_differences(found, members)
    wanted = found.members("missing", "failed") + (found.members("other code") if again else [])
    if not wanted and not (run and found.members("queued", "running")):
        _print_end(name, found)
        return
    from contradiff.studies.members import check_members
    from contradiff.studies.pipeline import Graph
    from contradiff.studies.planning import ordered

    wanted = ordered(wanted, Graph.read(ROOT), content.targets)
    check_members(wanted, root=ROOT)
    if dry_run:
        _print_plan(content, wanted, found, jobs)
    elif slurm is not None:
        _write_scripts(content, wanted, slurm)
    else:
        from contradiff.studies.queue import add_to_queue, forget_lost

        forget_lost(ROOT, wanted)
        add_to_queue(ROOT, wanted, content.targets, say=say)
        if run:
            _run(name, content, wanted + found.members("queued", "running"), jobs)
        else:
            how = f"`contradiff study {name} --run -j 2`, or `dvc queue start`"
            typer.echo(f"they wait in DVC's queue; start them with {how}")


def _print_studies() -> None:
    from contradiff.studies.study import read_study, study_names

    names = study_names(ROOT)
    if not names:
        raise ValueError("studies/: no studies here; go to the root of the project")
    width = max(len(each) for each in names)
    for each in names:
        typer.echo(f"{each:{width}}  {read_study(ROOT, each).question}")


def _look(name: str, content: "Study") -> "tuple[list[Member], Collection]":
    """Read params.yaml, and find out how each member of the study stands."""
    from contradiff.config import read_params
    from contradiff.studies.collecting import collect
    from contradiff.studies.members import members_of
    from contradiff.studies.pipeline import Graph
    from contradiff.studies.store import read_store

    Graph.read(ROOT).check(content, name)
    members = members_of(content, name, read_params(ROOT / "params.yaml"))
    return members, collect(ROOT, content, members, read_store(ROOT, name))


def _print_standings(found: "Collection") -> None:
    from contradiff.studies.members import describe

    rows = [
        (each.state, f"{describe(each.member.changes)} seed={each.member.seed}", each.note)
        for each in found.standings
    ]
    widths = [max(len(row[place]) for row in rows) for place in (0, 1)]
    for state, changes, note in rows:
        typer.echo(f"{state:{widths[0]}}  {changes:{widths[1]}}  {note}".rstrip())
    for each in found.store.aside:
        typer.echo(f"set aside: {each.experiment}: {each.why}")
    number = len(found.members("done"))
    typer.echo(f"{number} of {len(found.standings)} members are done")


def _print_end(name: str, found: "Collection") -> None:
    """Say what to type if nothing is missing."""
    if number := len(found.members("queued", "running")):
        how = f"`contradiff study {name} --run -j 2` starts workers, and waits"
        typer.echo(f"{number} members are in DVC's queue; {how}")
    elif number := len(found.members("other code")):
        typer.echo(f"nothing is missing, but {number} results come from other code;")
        typer.echo(f"`contradiff study {name} --again` queues these members anew")
    else:
        typer.echo(f"nothing is missing; `contradiff study {name} --report` writes docs/studies")


def _print_differences(found: "Collection", members: "Sequence[Member]") -> None:
    """Say why a stored study is missing under the present params.yaml."""
    from contradiff.studies.collecting import base_differences

    if found.members("done"):
        return
    if lines := base_differences(found.store, members):
        typer.echo("the stored results have other parameters than params.yaml:")
        for line in lines:
            typer.echo(f"  {line}")


def _print_plan(
    content: "Study", wanted: "Sequence[Member]", found: "Collection", jobs: int
) -> None:
    import shlex

    from contradiff.planning.times import read_notes
    from contradiff.studies.pipeline import Graph
    from contradiff.studies.planning import hours_of, seconds_of
    from contradiff.studies.queue import command_of

    done = found.members("done", "queued", "running")
    graph = Graph.read(ROOT)
    seconds = seconds_of(read_notes(ROOT), found.store.records, wanted)
    hours = hours_of(wanted, seconds, graph, content.targets, done)
    for member, each in zip(wanted, hours.by_member, strict=True):
        command = shlex.join(command_of(member, content.targets, "--queue"))
        typer.echo(f"{each:6.2f} h  {command}")
    total = sum(hours.by_member)
    typer.echo(f"{total:6.2f} h of work; about {total / jobs:.2f} h with -j {jobs}, if that many")
    typer.echo("          members at once do not slow each other down")
    if hours.unmeasured:
        typer.echo(f"without the stages {', '.join(hours.unmeasured)}: no run of them was timed")


def _write_scripts(content: "Study", wanted: "Sequence[Member]", folder: Path) -> None:
    from contradiff.files import replace_file
    from contradiff.studies.slurm import script_of

    for member in wanted:
        path = folder / f"{member.name}.sbatch"
        with replace_file(path) as temporary:
            text = script_of(member, content.targets, root=ROOT.resolve())
            temporary.write_text(text, encoding="utf-8")
        typer.echo(f"sbatch {path}")


def _run(name: str, content: "Study", members: "Sequence[Member]", jobs: int) -> None:
    """Start workers, wait, and say how the members ended."""
    from contradiff.config import read_params
    from contradiff.studies.queue import find_gpus, start_workers, wait_for

    device: Any = read_params(ROOT / "params.yaml").get("runtime", {}).get("device", "auto")
    start = partial(start_workers, ROOT, jobs, find_gpus(str(device)))
    start()
    say("DVC's workers go on if you stop this command; `dvc queue stop --kill` stops them")
    wait_for(ROOT, members, num_workers=jobs, start=start, say=say)
    _, found = _look(name, content)
    _print_standings(found)
    left = [each for each in found.standings if each.state not in ("done", "other code")]
    if left:
        typer.echo(f"`contradiff study {name} --run` tries again; finished stages are not repeated")
        raise typer.Exit(1)
    typer.echo(f"`contradiff study {name} --report` writes docs/studies/{name}.md")


def _report(name: str, content: "Study", found: "Collection") -> None:
    from contradiff.studies.collecting import write_samples
    from contradiff.studies.page import write_pages
    from contradiff.studies.store import write_store

    write_store(ROOT, name, found.store)
    write_samples(ROOT, name, found.samples)
    for path in write_pages(ROOT, name, content, found.store):
        typer.echo(str(path))
    missing = [each for each in found.standings if each.state != "done"]
    if missing:
        typer.echo(f"{len(missing)} of {len(found.standings)} members are missing or of other code")
