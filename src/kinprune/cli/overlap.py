"""``kinprune overlap``: whether a bank's pruned models keep the same units, and more so for tasks that are alike."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kinprune.cli import kin_options as kin
from kinprune.cli.bank_build import shown_address
from kinprune.cli.options import DATA, KIN, RUNNING, Json
from kinprune.cli.output import console
from kinprune.cli.running import guarded
from kinprune.cli.values import share, whole
from kinprune.errors import BankError
from kinprune.quantities import some_names

if TYPE_CHECKING:
    from kinprune.overlap_study import KindOverlap, OverlapStudy, PairOverlap

Keep = Annotated[
    float | None,
    typer.Option(
        "--keep",
        metavar="SHARE",
        parser=share,
        rich_help_panel=KIN,
        help="Compare the best share of each layer's units: 0.1 or 10%. [default: those that each pruned model kept]",
    ),
]
Pairs = Annotated[
    int,
    typer.Option(
        "--pairs", metavar="N", parser=whole(1), rich_help_panel=KIN, help="Compare at most N pairs, drawn at random."
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        metavar="ID,ID,...",
        rich_help_panel=DATA,
        help="Only these records, numbered as 'bank ls' shows them; two are compared layer by layer. [default: all]",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="FILE", rich_help_panel=RUNNING, help="A picture: FILE.svg, or FILE.html with its tables."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", rich_help_panel=RUNNING, help="Replace the file of --out.")]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        metavar="N",
        parser=whole(0),
        rich_help_panel=RUNNING,
        help="Decides which pairs are drawn, and the intervals.",
    ),
]


@guarded
def overlap_command(
    bank: kin.Address,
    tasks: Tasks = None,
    keep: Keep = None,
    pairs: Pairs = 20_000,
    out: Out = None,
    overwrite: Overwrite = False,
    json: Json = False,
    seed: Seed = 0,
) -> dict[str, Any] | None:
    """Compare which units a bank's tasks keep, with chance and with how alike the tasks are."""
    ids = None if tasks is None else _ids(tasks)
    if out is not None and ids is not None and len(ids) == 2:
        raise BankError("--out draws many pairs, two tasks are one: leave --out away, or name three tasks or more")
    from kinprune.bank import open_bank
    from kinprune.bank.backbone import bank_space, load_bank_backbone
    from kinprune.overlap_picture import check_picture, write_picture
    from kinprune.overlap_study import compare_tasks, source_tasks, study_overlap, summarise_pair, summarise_study

    if out is not None:
        check_picture(out, overwrite=overwrite)
    opened = open_bank(bank)
    chosen = source_tasks(opened, ids)
    space = bank_space(opened, load_bank_backbone(opened, 2))
    if ids is not None and len(ids) == 2:
        pair = compare_tasks(opened, space, sorted(chosen, key=lambda entry: ids.index(entry.id)), keep=keep)
        if json:
            return {"bank": shown_address(bank), **summarise_pair(pair)}
        _print_pair(pair)
        return None
    study = study_overlap(opened, space, chosen, keep=keep, pairs=pairs, seed=seed)
    if out is not None:
        write_picture(study, out, name=opened.header.spec.name)
    if json:
        written = None if out is None else str(out)
        return {"bank": shown_address(bank), "out": written, "seed": seed, **summarise_study(study)}
    _print_study(study)
    if out is not None:
        console().print(f"The picture is in {out}.", soft_wrap=True)
    return None


def _ids(text: str) -> list[int]:
    """The numbers of ``--tasks``, in the order given."""
    try:
        ids = [whole(1)(part) for part in text.split(",") if part.strip()]
    except typer.BadParameter as error:
        raise BankError(f"--tasks is '{text}': {error.message}") from error
    if len(ids) < 2:
        raise BankError(f"--tasks is '{text}', expected two numbers of records or more, such as 3,17")
    return ids


def _print_pair(pair: PairOverlap) -> None:
    from rich.table import Table

    table = Table(title="Units that both of two tasks keep", title_justify="left")
    table.add_column("group", overflow="fold")
    one, other = pair.tasks
    for name in ("kind", "units", f"kept by {one.id}", f"by {other.id}", "IoU", "chance"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for group in pair.groups:
        numbers = (str(value) for value in (group.size, group.first, group.second))
        table.add_row(group.name, group.kind, *numbers, f"{group.overlap:.3f}", f"{group.chance:.3f}")
    out = console()
    for entry in pair.tasks:
        out.print(f"{entry.id}: {some_names(entry.classes)}", soft_wrap=True)
    shared = ", ".join(pair.shared) or "none"
    out.print(f"Shared classes: {shared}. Similarity of the class means: {pair.similarity:.3f}.", soft_wrap=True)
    out.print(table)


def _print_study(study: OverlapStudy) -> None:
    from kinprune.overlap_picture import shown

    out = console()
    some = len(study.first) < study.possible
    pairs = f"{len(study.first):,} of {study.possible:,} pairs" if some else f"all {study.possible:,} pairs"
    kept = "the units that each pruned model kept" if study.keep is None else f"the best {study.keep:g} of each layer"
    counts = [int(those.sum()) for those in (study.shared == 0, study.shared == 1, study.shared > 1)]
    out.print(f"{len(study.tasks):,} tasks, {pairs}; {kept}.", soft_wrap=True)
    for kind in study.kinds:
        means, by = kind.means, kind.correlations
        out.print(_study_table(kind))
        for words, text in (
            ("mean IoU", f"{shown(means.all)}, chance {means.chance:.3f}"),
            ("most similar quarter of pairs", shown(means.most)),
            ("least similar quarter", shown(means.least)),
            ("difference", shown(means.difference)),
            (f"no shared class ({counts[0]:,} pairs)", shown(means.none)),
            (f"one shared class ({counts[1]:,} pairs)", shown(means.one)),
            (f"more shared classes ({counts[2]:,} pairs)", shown(means.more)),
            ("rank correlation with class means", shown(by.class_means)),
            ("  in pairs without a shared class", shown(by.class_means_disjoint)),
            ("rank correlation with class names", shown(by.class_names)),
        ):
            out.print(f"  {words:<36} {text}", soft_wrap=True)
    out.print("In brackets: 95 % intervals, from drawing the tasks again. Chance is exact, for sets of the same sizes.")


def _study_table(kind: KindOverlap) -> Any:
    from rich.table import Table

    table = Table(title=f"Overlap of kept units ({kind.kind}), group by group in forward order", title_justify="left")
    table.add_column("group", overflow="fold")
    for name in ("units", "kept", "chance", "IoU", "least\nsimilar", "most\nsimilar"):
        table.add_column(name, justify="right")
    for group in kind.groups:
        means = group.means
        found = ("" if one.value is None else f"{one.value:.3f}" for one in (means.all, means.least, means.most))
        table.add_row(group.name, str(group.size), f"{group.kept:.4g}", f"{means.chance:.3f}", *found)
    return table
