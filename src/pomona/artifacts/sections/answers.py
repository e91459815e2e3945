"""How well clients are answered: every measure per client, method and model, and its differences."""

from collections.abc import Sequence

from pomona.artifacts import figures
from pomona.artifacts.finished import FinishedRun
from pomona.artifacts.measures import MEASURES, Measure, measured
from pomona.artifacts.page import figure, heading, matrix, note, number, span, table, text
from pomona.artifacts.table import (
    BASE,
    Difference,
    Line,
    compare,
    differences,
    line_of,
    methods_of,
)


def summary(runs: Sequence[FinishedRun]) -> str:
    """Return the page's first sentences: whose mean and whose worst client are best."""
    base, *methods = compare(runs, "loss")
    best = min(methods, key=lambda line: line.mean.mean)
    fairest = min(methods, key=lambda line: line.worst)
    return (
        f"<p>{len(base.clients)} clients, {len(runs)} runs. Lowest mean answer loss: "
        f"<strong>{text(best.method)}</strong>, {best.mean.mean:.3f} nats per token "
        f"(95 % interval {best.mean.low:.3f} to {best.mean.high:.3f}); the untuned base has "
        f"{base.mean.mean:.3f}. Lowest loss of the worst client: "
        f"<strong>{text(fairest.method)}</strong>, {fairest.worst:.3f}.</p>"
    )


def answers(runs: Sequence[FinishedRun], baseline: str | None) -> str:
    """Return a section per measure."""
    return "".join(_measure(runs, measure, baseline) for measure in measured(runs))


def _measure(runs: Sequence[FinishedRun], measure: str, baseline: str | None) -> str:
    how, lines = MEASURES[measure], compare(runs, measure)
    return "".join(
        (
            heading(str(how)),
            _lines(lines, how.digits),
            note(
                "Worst: the client served worst. Spread: standard deviation over the clients. "
                "Intervals: bootstrap over test rows, clients kept apart; Student's over three or "
                "more seeds."
            ),
            _shared(runs, measure),
            _differences(differences(runs, measure, baseline), how.digits, baseline),
            _plot(lines, how),
        )
    )


def _plot(lines: Sequence[Line], how: Measure) -> str:
    """Draw the clients, but not twice: perplexity is the loss by another name."""
    if how.transform is not None:
        return note("From answers.jsonl.")
    rows = {line.method: line.clients.values() for line in lines}
    cells = matrix("method", rows, list(lines[0].clients))
    return figure(figures.per_client(lines, how.title), "Per client. From answers.jsonl.", cells)


def _lines(lines: Sequence[Line], digits: int) -> str:
    clients = list(lines[0].clients)
    header = ["method", *clients, "mean", "95 % over rows", "95 % over seeds", "worst", "spread"]
    body = [
        [
            line.method,
            *(number(line.clients[name], digits) for name in clients),
            number(line.mean.mean, digits),
            span(line.mean.low, line.mean.high, digits),
            span(line.over_seeds.low, line.over_seeds.high, digits) if line.over_seeds else "–",
            number(line.worst, digits),
            number(line.spread, digits),
            "–" if line.method == BASE else ", ".join(map(str, line.seeds)),
        ]
        for line in lines
    ]
    return table([*header, "seeds"], body)


def _shared(runs: Sequence[FinishedRun], measure: str) -> str:
    """Return the shared models of those methods whose clients are served by one of their own."""
    lines = [
        line_of(f"{method}, shared", group, "shared", measure)
        for method, group in methods_of(runs).items()
        if group[0].served == "personal" and group[0].results["shared"]
    ]
    if not lines:
        return ""
    told = "The shared model alone, as it would serve each client."
    return note(told) + _lines(lines, MEASURES[measure].digits)


def _differences(found: Sequence[Difference], digits: int, baseline: str | None) -> str:
    if not found:
        return ""
    header = ["difference of means", "value", "95 % over rows", "p", "p, Holm"]
    seeded = any(one.seeds for one in found)
    body = [
        [
            f"{one.first} − {one.second}",
            number(one.rows.difference.mean, digits, "+"),
            span(one.rows.difference.low, one.rows.difference.high, digits, "+"),
            _p(one.rows.p_value),
            _p(one.corrected),
            *(_seeds(one, digits) if seeded else ()),
        ]
        for one in found
    ]
    told = (
        f"{'All pairs' if baseline is None else f'Each method against {baseline}'}: paired bootstrap "
        "over the same test rows, clients kept apart"
        + ("; over seeds, Student's paired test of the means" if seeded else "")
        + f". Holm: corrected for {len(found)} comparisons of this measure."
    )
    more = ["95 % over seeds", "p over seeds", "p over seeds, Holm"] if seeded else []
    return table([*header, *more], body) + note(told)


def _seeds(one: Difference, digits: int) -> list[str]:
    if one.seeds is None or one.corrected_seeds is None:
        return ["–"] * 3
    low, high = one.seeds.difference.low, one.seeds.difference.high
    return [span(low, high, digits, "+"), _p(one.seeds.p_value), _p(one.corrected_seeds)]


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else "< 0.0001"
