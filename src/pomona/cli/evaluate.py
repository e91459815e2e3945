"""`pomona evaluate`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from pomona.cli.options import Adapter, Client, Device, Graft, Model, Personal, Run, TemplateName
from pomona.cli.personal import personal_of
from pomona.errors import PomonaError

Text = Annotated[
    str | None,
    typer.Option("--text", help="Text file, folder of domains or glob.", metavar="PATH"),
]
Rows = Annotated[
    Path | None,
    typer.Option(
        "--rows", help="Instruction rows (.jsonl, .json, .csv, .parquet).", metavar="FILE"
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        "--task",
        help="Tasks of the LM evaluation harness, by name or YAML file.",
        metavar="NAME,…",
    ),
]
MeasureSpeed = Annotated[bool, typer.Option("--speed", help="Measure generation speed.")]
Limit = Annotated[
    int, typer.Option("--limit", help="Rows; windows per domain; questions per task; 0: all.")
]
Lengths = Annotated[
    list[int] | None,
    typer.Option(
        "--length",
        help="Longest row or window, in tokens, or with --speed prompt and new tokens; 512 if not "
        "given, or the context if that is shorter. With --text it may be given several times.",
        show_default=False,
    ),
]
NewTokens = Annotated[
    int,
    typer.Option("--new-tokens", help="Longest answer; 0 skips answers. With --speed: its length."),
]
Routing = Annotated[
    bool, typer.Option("--routing", help="With --text: how the experts are used, too.")
]
FiguresFolder = Annotated[
    Path | None,
    typer.Option("--figures", help="With --routing: draw it, as SVG, in here.", metavar="DIR"),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="With --tasks: MMLU's folder for mmlu; questions (.jsonl, .csv) for multiple_choice.",
        metavar="PATH",
    ),
]
Fewshot = Annotated[
    int | None, typer.Option("--fewshot", help="With --tasks: examples before a question.")
]
Dense = Annotated[
    str | None,
    typer.Option("--dense", help="With --speed: a model to run beside.", metavar="MODEL"),
]
Repeats = Annotated[
    int | None, typer.Option("--repeats", help="With --speed: timed repeats; 5 if not given.")
]
Json = Annotated[
    Path | None, typer.Option("--json", help="Also write the figures here.", metavar="FILE")
]


def evaluate(
    model: Model,
    text: Text = None,
    rows: Rows = None,
    tasks: Tasks = None,
    speed: MeasureSpeed = False,
    run: Run = None,
    client: Client = None,
    adapter: Adapter = None,
    graft: Graft = None,
    personal: Personal = None,
    limit: Limit = 64,
    length: Lengths = None,
    new_tokens: NewTokens = 64,
    template: TemplateName = None,
    routing: Routing = False,
    figures: FiguresFolder = None,
    data: Data = None,
    fewshot: Fewshot = None,
    dense: Dense = None,
    repeats: Repeats = None,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Measure a model on text, on instruction rows, on tasks, or its speed.

    MODEL is a folder or Hub id; with --run and --client, or --adapter, --graft and --personal, it is a client's
    personal model that is measured. Of a folder of domains the held-out files are read, where there are any.
    --tasks needs the extra: pip install 'pomona[eval]'.
    """
    asked = {"--text": text, "--rows": rows, "--tasks": tasks, "--speed": speed or None}
    _check_one(asked)
    _check_goes_with(asked, "--text", {"--routing": routing or None})
    _check_goes_with({"--routing": routing or None}, "--routing", {"--figures": figures})
    _check_goes_with(asked, "--tasks", {"--data": data, "--fewshot": fewshot})
    _check_goes_with(asked, "--speed", {"--dense": dense, "--repeats": repeats})
    lengths = length or []
    if len(lengths) > 1 and text is None:
        raise PomonaError("several lengths are for --text; give --length once")

    from pomona.cli import measures
    from pomona.cli.console import console, progress_bars
    from pomona.files import check_writable, write_json
    from pomona.pipelines import evaluate as verb

    for path in (json, None if figures is None else figures / "expert-load.svg"):
        if path is not None:
            check_writable(path)
    whole = personal_of(model, run, client, adapter, graft, personal, device)
    only = lengths[0] if lengths else None
    found: dict[str, Any]
    notes: list[str] = []
    with progress_bars() as progress:
        if text is not None:
            made = verb.on_text(whole, text, lengths, limit, routing, progress)
            shown, found = measures.of_text(made, figures)
        elif rows is not None:
            given = (template, limit, only, new_tokens, progress, notes.append)
            made = verb.on_rows(whole, rows, *given)
            shown, found = measures.of_rows(made)
        elif tasks is not None:
            names = [name.strip() for each in tasks for name in each.split(",") if name.strip()]
            made = verb.on_tasks(whole, names, data, fewshot, limit, progress)
            shown, found = measures.of_tasks(made)
        else:
            made = verb.speed(
                whole, dense, only, new_tokens, 5 if repeats is None else repeats, progress
            )
            shown, found = measures.of_speed(made)
    for told in notes:
        console.print(told)
    measures.show(model, shown)
    if json is not None:
        parts = {"adapter": whole.adapter, "graft": whole.graft, "personal": whole.personal}
        worn = {name: str(folder) for name, folder in parts.items() if folder is not None}
        write_json(json, {"model": model, **worn, **found})


def _check_one(asked: Mapping[str, object]) -> None:
    given = [option for option, value in asked.items() if value is not None]
    if len(given) != 1:
        raise PomonaError(
            f"give one of {', '.join(asked)} to measure, not {' and '.join(given) or 'none'}"
        )


def _check_goes_with(
    asked: Mapping[str, object], needed: str, options: Mapping[str, object]
) -> None:
    for option, value in options.items():
        if value is not None and asked[needed] is None:
            raise PomonaError(f"{option} goes with {needed}; give both or neither")
