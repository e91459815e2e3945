"""The process that holds a site's model: `python -m pomona.cli.worker SOCKET`, started by `pomona join`.

It is told first what the site is; then it answers parcels, one at a time. It runs installed code alone.
"""

import os
import sys
from pathlib import Path
from socket import socket
from typing import Any

from pomona.errors import PomonaError
from pomona.parcel import Parcel, receive, send


def main(number: int) -> None:
    """Answer on the socket until the other end is gone."""
    link = socket(fileno=number)
    first = receive(link)
    if first is None:
        return
    try:
        from pomona.pipelines.federate.site import Member

        member = Member(_site(dict(first.told)))
    except PomonaError as error:
        send(link, _refused(error))
        return
    send(link, Parcel("ready", {"pid": os.getpid()}))
    while (asked := receive(link)) is not None:
        try:
            answer = member.answer(asked)
        except PomonaError as error:
            answer = _refused(error)
        except (KeyError, TypeError, AttributeError) as error:
            answer = _refused(PomonaError(f"the message lacks what its kind needs ({error!r})"))
        send(link, answer)
    member.close()


def _site(told: dict[str, Any]) -> Any:
    """Return what the site is; raises `PomonaError` for rows or a policy that cannot be read."""
    from pomona.cli.console import quiet_libraries
    from pomona.federation.clients import site_rows
    from pomona.pipelines.federate.policy import Policy, recipe_digest
    from pomona.pipelines.federate.site import Site
    from pomona.recipe import read_recipe
    from pomona.recipe.remote import at_site

    quiet_libraries()
    policy = Policy() if told["policy"] is None else read_recipe(Path(told["policy"]), Policy)
    test = None if told["test"] is None else Path(told["test"])
    rows = site_rows(told["name"], Path(told["data"]), test, told["held_out"])

    def read(text: str, model: str) -> Any:
        return at_site(text, model, code=recipe_digest(text) in policy.recipes)

    def tell(sentence: str) -> None:
        print(sentence, file=sys.stderr, flush=True)  # noqa: T201 - the site's log has it

    state, device = Path(told["state"]), told["device"]
    return Site(told["name"], rows, told["model"], state, read, policy, device, tell=tell)


def _refused(error: PomonaError) -> Parcel:
    return Parcel("refused", {"reason": " ".join(str(error).splitlines())})


if __name__ == "__main__":
    main(int(sys.argv[1]))
