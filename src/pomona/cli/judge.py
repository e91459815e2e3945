"""`pomona judge`."""

from pathlib import Path
from typing import Annotated

import typer

from pomona.cli.options import Adapter, Client, Device, Graft, Model, Personal, Run, TemplateName
from pomona.cli.personal import personal_of

Prompts = Annotated[
    Path, typer.Option("--prompts", metavar="FILE", help="Prompts (.jsonl): turns, prompt or text.")
]
Url = Annotated[
    str, typer.Option("--url", metavar="URL", help="Base of the endpoint, such as https://…/v1.")
]
JudgeModel = Annotated[
    str, typer.Option("--judge-model", metavar="NAME", help="The endpoint's name of the judge.")
]
KeyVariable = Annotated[
    str,
    typer.Option("--key-variable", metavar="VARIABLE", help="Environment variable with the key."),
]
Limit = Annotated[int, typer.Option("--limit", help="Prompts; 0: all.")]
NewTokens = Annotated[int, typer.Option("--new-tokens", help="Longest answer.")]
Timeout = Annotated[float, typer.Option("--timeout", help="Seconds to wait for a reply.")]
Retries = Annotated[
    int, typer.Option("--retries", help="How often a request or a reply without score is repeated.")
]
Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Also write answers, replies and scores here."),
]


def judge(
    model: Model,
    prompts: Prompts,
    url: Url,
    judge_model: JudgeModel,
    key_variable: KeyVariable = "OPENAI_API_KEY",
    run: Run = None,
    client: Client = None,
    adapter: Adapter = None,
    graft: Graft = None,
    personal: Personal = None,
    limit: Limit = 0,
    new_tokens: NewTokens = 256,
    template: TemplateName = None,
    timeout: Timeout = 60.0,
    retries: Retries = 2,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Have open-ended answers scored for helpfulness and harmlessness.

    MODEL is a folder or Hub id; with --run and --client it is a client's personal model
    that answers. Prompts and answers are sent to the endpoint you name and nowhere else. The key is read
    from the environment only, and never printed or written.
    """
    from dataclasses import asdict

    from pomona.cli.console import console, print_table, progress_bars
    from pomona.evaluation.judge import Judge
    from pomona.files import check_writable, write_json
    from pomona.pipelines.judge import judge as verb

    if json is not None:
        check_writable(json)
    by = Judge(url, judge_model, key_variable, timeout, retries)
    whole, notes = personal_of(model, run, client, adapter, graft, personal, device), list[str]()
    with progress_bars() as progress:
        made = verb(whole, prompts, by, template, limit, new_tokens, progress, notes.append)
    for told in notes:
        console.print(told)
    rows = [
        [
            name,
            *(
                ("–", "–")
                if score is None
                else (f"{score.mean:.2f}", f"{score.low:.2f} to {score.high:.2f}")
            ),
            str(len(made.answers) - made.unparsable[name]),
            str(made.unparsable[name]),
        ]
        for name, score in made.scores.items()
    ]
    print_table(model, ["judged", "mean of 1 to 10", "95 %", "scores", "unparsable"], rows)
    if json is not None:
        parts = {"adapter": whole.adapter, "graft": whole.graft, "personal": whole.personal}
        worn = {name: str(folder) for name, folder in parts.items() if folder is not None}
        about = {"model": model, **worn, "judge": judge_model, "url": url}
        write_json(json, {**about, **asdict(made)})
