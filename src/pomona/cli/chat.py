"""`pomona chat`."""

import sys
from typing import Annotated

import typer

from pomona.cli.options import Adapter, Client, Device, Graft, Model, Personal, Run, TemplateName
from pomona.cli.personal import personal_of

System = Annotated[str, typer.Option("--system", help="What the assistant is told first.")]
NewTokens = Annotated[int, typer.Option("--new-tokens", help="Longest answer.")]
Temperature = Annotated[
    float, typer.Option("--temperature", help="0 takes the likeliest token always.")
]
TopP = Annotated[float, typer.Option("--top-p", help="Share of the likeliest tokens drawn from.")]
Seed = Annotated[int, typer.Option("--seed", help="What answers are drawn from.")]


def chat(
    model: Model,
    run: Run = None,
    client: Client = None,
    adapter: Adapter = None,
    graft: Graft = None,
    personal: Personal = None,
    template: TemplateName = None,
    system: System = "",
    new_tokens: NewTokens = 256,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Talk with a model, or with a client's personal model.

    Every line is a turn; an empty one begins a new conversation, and the end of the input (Ctrl-D) ends it.
    What is piped in is answered line by line. Prompts have the form that the client's rows had.
    """
    from pomona.cli.console import console, quiet_libraries
    from pomona.errors import PomonaError
    from pomona.serving.answering import Answering
    from pomona.serving.asked import Asked, prompt_tokens
    from pomona.serving.models import load_served

    quiet_libraries()
    name = "model"
    own = personal_of(model, run, client, adapter, graft, personal, device)
    served, tokenizer = load_served({name: own}, template, console.print)
    context, form = served[name].context, served[name].template
    if new_tokens >= context:
        raise PomonaError(
            f"--new-tokens {new_tokens} leaves no room for a prompt in the context of {context}; use fewer"
        )
    first = [("system", system)] if system else []
    turns, talking = list(first), sys.stdin.isatty()
    if talking:
        console.print("an empty line begins anew, Ctrl-D ends", style="dim")
    with Answering(served, tokenizer, 1) as answering:
        for number, line in enumerate(_lines(talking)):
            if not line.strip():
                turns = list(first)
                continue
            turns.append(("user", line.strip()))
            room = context - new_tokens
            try:
                prompt = prompt_tokens(turns, form, tokenizer, room)
            except PomonaError as error:
                if not talking:
                    raise
                console.print(str(error), style="red")
                turns = list(first)
                continue
            asked = Asked(prompt, new_tokens, temperature, top_p, seed + number)
            answer = answering.ask(name, asked)
            said = ""
            for piece in answer:
                said += piece
                console.print(piece, end="")
            console.print()
            turns.append(("assistant", said))


def _lines(talking: bool):
    """Yield what is said, line by line."""
    while True:
        try:
            yield input("> " if talking else "")
        except EOFError:
            return
