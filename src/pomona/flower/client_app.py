"""A client as a ClientApp of Flower's: for `flwr run`, whose workers take whatever client is next.

What a client keeps is in its folder below `states`; between messages nothing of it is in memory but the base
model, which all clients of a worker share.
"""

from functools import lru_cache
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from pomona.errors import PomonaError
from pomona.flower.records import as_records, from_records
from pomona.flower.sites import named
from pomona.parcel import Parcel

app = ClientApp()


@app.query("pomona")
def query(message: Message, context: Context) -> Message:
    """Answer a parcel as the client of this node."""
    asked = from_records(message.content)
    try:
        answer = _answer(asked, context)
    except PomonaError as error:
        answer = Parcel("refused", {"reason": str(error)})
    return Message(as_records(answer), reply_to=message)


def _answer(asked: Parcel, context: Context) -> Parcel:
    from pomona.pipelines.federate.site import Member, Site
    from pomona.recipe.remote import at_site

    settings, names = _settings(str(context.run_config["recipe"]))
    name = names[int(context.node_config["partition-id"])]
    own = named(asked, name)
    if own is not None:
        return own
    if asked.kind == "bye":
        return Parcel("bye")
    states = Path(str(context.run_config["states"]))
    rows = settings.load()[name]
    member = Member(Site(name, rows, settings.model, states / name, at_site, load=_base))
    try:
        return member.answer(asked)
    finally:
        member.close()


@lru_cache(maxsize=1)
def _settings(recipe: str):
    from pomona.federation.settings import FederateSettings
    from pomona.recipe import read_recipe

    settings = read_recipe(Path(recipe), FederateSettings)
    return settings, list(settings.load())


@lru_cache(maxsize=1)
def _base(model: str, dtype: str):
    from pomona.models.loading import load_model

    return load_model(model, dtype)  # pyright: ignore[reportArgumentType]
