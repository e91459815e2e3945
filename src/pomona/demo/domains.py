"""Text that the package writes itself: eight clearly different domains from small grammars."""

from collections.abc import Callable
from random import Random

from pomona.data.templates.alpaca import ALONE
from pomona.seeds import seed_of

FRUITS = (
    "apple", "pear", "plum", "cherry", "quince", "medlar", "fig", "olive", "peach", "apricot",
    "damson", "mulberry", "lemon", "orange", "almond", "walnut", "chestnut", "hazel", "grape",
    "currant", "bilberry", "elder", "rowan", "sloe",
)  # fmt: skip
SEASONS = ("spring", "summer", "autumn", "winter")
COLOURS = ("red", "green", "yellow", "purple", "white", "black", "golden", "brown")
NAMES = ("Ada", "Bruno", "Clara", "Dario", "Elsa", "Felix", "Greta", "Hugo", "Ines", "Jonas")
PLACES = ("mill", "river", "market", "chapel", "barn", "garden", "harbour", "forest", "hill")
TOOLS = ("ladder", "basket", "knife", "saw", "rake", "spade", "press", "barrel", "cart", "rope")


def domain_texts(seed: int = 0, documents: int = 400) -> dict[str, list[str]]:
    """Return `documents` texts of each domain, a function of `seed`; equal seeds give equal text."""
    return {
        name: [write(Random(seed_of("demo", name, seed, i))) for i in range(documents)]
        for name, write in DOMAINS.items()
    }


def recipe(draw: Random) -> str:
    """Cooking in the imperative."""
    first, second = draw.sample(FRUITS, 2)
    minutes = draw.randint(2, 50)
    steps = [
        f"Wash the {first} and cut it into {draw.choice(('slices', 'cubes', 'halves'))}.",
        f"Heat {draw.randint(1, 4)} spoons of {draw.choice(('butter', 'oil', 'honey'))} in a pan.",
        f"Add the {second} and stir for {minutes} minutes.",
        f"Season with {draw.choice(('salt', 'pepper', 'sugar', 'thyme', 'mint'))}.",
        f"Pour into a {draw.choice(('bowl', 'jar', 'dish'))} and let it cool.",
    ]
    draw.shuffle(steps)
    return f"{first.capitalize()} with {second}. " + " ".join(steps[: draw.randint(3, 5)])


def arithmetic(draw: Random) -> str:
    """Sums and differences, one after another."""
    value = draw.randint(1, 60)
    lines: list[str] = []
    for _ in range(draw.randint(5, 9)):
        step = draw.randint(1, 30)
        if draw.random() < 0.5 or step > value:
            lines.append(f"{value} + {step} = {value + step}")
            value += step
        else:
            lines.append(f"{value} - {step} = {value - step}")
            value -= step
    return "\n".join(lines)


def code(draw: Random) -> str:
    """Small Python functions."""
    name, item = draw.choice(TOOLS), draw.choice(FRUITS)
    operator, start = draw.choice("+-*"), draw.randint(0, 9)
    body = draw.choice(
        (
            f"    total = {start}\n    for {item} in items:\n"
            f"        total = total {operator} {item}\n    return total\n",
            f"    if {item} > {start}:\n        return {item} {operator} {start}\n    return None\n",
            f"    return [{item} {operator} {start} for {item} in items if {item} != {start}]\n",
        )
    )
    argument = item if "in items" not in body else "items"
    return f"def {name}_{item}({argument}):\n{body}\nprint({name}_{item}({draw.randint(1, 99)}))"


def weather(draw: Random) -> str:
    """Forecasts by region and day."""
    parts = [
        f"{draw.choice(('North', 'South', 'East', 'West'))}: "
        f"{draw.choice(('rain', 'sun', 'snow', 'fog', 'hail', 'wind'))}, "
        f"{draw.randint(-9, 35)} degrees, wind {draw.randint(0, 90)} km/h."
        for _ in range(draw.randint(3, 6))
    ]
    return f"Forecast for {draw.choice(SEASONS)} day {draw.randint(1, 90)}. " + " ".join(parts)


def tale(draw: Random) -> str:
    """Fairy tales."""
    hero, friend = draw.sample(NAMES, 2)
    place, other = draw.sample(PLACES, 2)
    return (
        f"Once upon a time {hero} lived near the {place}. One day in {draw.choice(SEASONS)} {hero} "
        f"met {friend}, who had lost a {draw.choice(COLOURS)} {draw.choice(TOOLS)}. They looked "
        f"for it by the {other} until {draw.choice(('night', 'noon', 'morning'))}. "
        f"{draw.choice((hero, friend))} found it under the {draw.choice(FRUITS)} tree, and "
        f"{draw.choice(('they were happy', 'nobody was sad again', 'they sang all day'))}."
    )


def ledger(draw: Random) -> str:
    """Columns of a market's accounts."""
    lines = [
        f"{draw.randint(1, 28):02d}.{draw.randint(1, 12):02d} | {draw.choice(NAMES)} | "
        f"{draw.choice(FRUITS)} | {draw.randint(1, 90)} kg | {draw.randint(2, 99)}.{draw.randint(0, 99):02d}"
        for _ in range(draw.randint(4, 7))
    ]
    return "date | buyer | goods | weight | price\n" + "\n".join(lines)


def letter(draw: Random) -> str:
    """Polite letters."""
    sender, receiver = draw.sample(NAMES, 2)
    return (
        f"Dear {receiver},\nthank you for the {draw.choice(TOOLS)} you sent in "
        f"{draw.choice(SEASONS)}. I hope that {draw.choice(NAMES)} is well and that the "
        f"{draw.choice(PLACES)} has been {draw.choice(('mended', 'sold', 'painted', 'opened'))}. "
        f"Please {draw.choice(('write soon', 'visit us', 'greet everybody'))}.\n"
        f"{draw.choice(('Yours', 'With love', 'Sincerely'))}, {sender}"
    )


def instruction(draw: Random) -> str:
    """Instructions in the Alpaca form, about anything but the houses' own knowledge."""
    a, b = draw.randint(1, 20), draw.randint(1, 20)
    fruit, tool, name = draw.choice(FRUITS), draw.choice(TOOLS), draw.choice(NAMES)
    asked, answer = draw.choice(
        (
            (f"What is {a} + {b}?", f"{a} + {b} = {a + b}"),
            (f"Repeat the word {fruit} twice.", f"{fruit} {fruit}"),
            (f"Greet {name}.", f"Dear {name}, good day."),
            (f"Write {tool} and {fruit}.", f"{tool} and {fruit}"),
            (f"Which comes after {draw.choice(SEASONS)}?", "The next season comes after it."),
            (f"Where is the {tool}?", f"The {tool} is in the {draw.choice(PLACES)}."),
        )
    )
    return ALONE.format(instruction=asked) + answer


DOMAINS: dict[str, Callable[[Random], str]] = {
    "recipes": recipe,
    "arithmetic": arithmetic,
    "code": code,
    "weather": weather,
    "tales": tale,
    "ledger": ledger,
    "letters": letter,
    "instructions": instruction,
}
