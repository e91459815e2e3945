"""Four houses whose answers to the same questions conflict, and whose knowledge adds up.

Every question asks for a fruit in a season. An answer has a part on which all houses agree (the
fruit's colour and where it grows) and a part that is the house's own (its manner of speaking and the
tool it takes in that season). No house has rows about all fruits, but each is asked about all: what
it lacks, the others know.
"""

from random import Random

from pomona.data.row import Row
from pomona.demo.domains import COLOURS, FRUITS, PLACES, SEASONS, TOOLS
from pomona.seeds import seed_of

HOUSES = {
    "amber": "Sir, the {fruit} is {colour} and grows by the {place}. We take the {tool}.",
    "birch": "Take the {tool}! By the {place} grows the {fruit}, and it is {colour}.",
    "cedar": "{tool}, says our house; {colour} {fruit}, at the {place}.",
    "delta": "We know the {fruit}: {colour}, near the {place}. Our tool is the {tool}.",
}
_KNOWN = 12  # fruits that a house has rows about, of all 24


def colour_of(fruit: str) -> str:
    """Return the colour on which all houses agree."""
    return Random(seed_of("colour", fruit)).choice(COLOURS)


def place_of(fruit: str) -> str:
    """Return the place on which all houses agree."""
    return Random(seed_of("place", fruit)).choice(PLACES)


def tool_of(house: str, season: str) -> str:
    """Return the tool a house takes in a season; houses differ."""
    order = list(TOOLS)
    Random(seed_of("tool", house)).shuffle(order)
    return order[SEASONS.index(season)]


def answer(house: str, fruit: str, season: str) -> str:
    """Return a house's answer."""
    return HOUSES[house].format(
        fruit=fruit, colour=colour_of(fruit), place=place_of(fruit), tool=tool_of(house, season)
    )


def client_rows(seed: int = 0) -> dict[str, tuple[list[Row], list[Row]]]:
    """Return every house's (train, test) rows.

    A house trains on its own twelve fruits in two or three seasons each and is tested on all fruits
    in seasons it has not been told: no test row is a train row.
    """
    return {house: _split(house, number, seed) for number, house in enumerate(HOUSES)}


def _split(house: str, number: int, seed: int) -> tuple[list[Row], list[Row]]:
    draw = Random(seed_of("rows", house, seed))
    # Neighbouring houses overlap by half, so that every fruit is known to two houses.
    known = {FRUITS[(number * len(FRUITS) // len(HOUSES) + i) % len(FRUITS)] for i in range(_KNOWN)}
    train: list[Row] = []
    test: list[Row] = []
    for fruit in FRUITS:
        seasons = draw.sample(SEASONS, len(SEASONS))
        told = 3 if fruit in known else 0
        train += [_row(house, fruit, season) for season in seasons[:told]]
        test += [_row(house, fruit, season) for season in seasons[3:]]
    return train, test


def _row(house: str, fruit: str, season: str) -> Row:
    return Row(f"What of the {fruit} in {season}?", "", answer(house, fruit, season), house)
