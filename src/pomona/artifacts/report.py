"""One self-contained HTML page: finished runs side by side, no request to anywhere."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import pomona
from pomona.artifacts.finished import FinishedRun, load_runs
from pomona.artifacts.judgements import JudgedFile, read_judgements
from pomona.artifacts.page import document, heading, note, text
from pomona.artifacts.sections.answers import answers, summary
from pomona.artifacts.sections.convergence import convergence
from pomona.artifacts.sections.cost import cost
from pomona.artifacts.sections.experts import experts
from pomona.artifacts.sections.forgetting import forgetting
from pomona.artifacts.sections.holdings import holdings
from pomona.artifacts.sections.judged import judged
from pomona.artifacts.sections.newcomers import newcomers
from pomona.artifacts.sections.privacy import privacy
from pomona.artifacts.sections.tasks import tasks
from pomona.errors import PomonaError
from pomona.files import write_text


def write_report(
    paths: Sequence[Path],
    out: Path,
    baseline: str | None = None,
    judgements: Sequence[Path] = (),
) -> None:
    """Compare finished run directories on one page.

    Methods are tested against `baseline`, a method's name or "base"; without one all pairs are.
    `judgements` are files that `pomona judge` wrote. Raises `PomonaError` when a directory is not a
    finished run, the runs measured other clients, none is of the baseline, or a file is no judgement.
    """
    runs = load_runs(paths)
    clients = {tuple(sorted(run.results["base"]["clients"])) for run in runs}
    if len(clients) > 1:
        raise PomonaError(
            f"{paths[0]} and the other runs have different clients; report runs of one federation"
        )
    write_text(out, page(runs, baseline, read_judgements(judgements)))


def page(
    runs: Sequence[FinishedRun], baseline: str | None = None, judgements: Sequence[JudgedFile] = ()
) -> str:
    """Return the page's HTML."""
    sections = [
        summary(runs),
        answers(runs, baseline),
        holdings(runs),
        convergence(runs),
        experts(runs),
        forgetting(runs, baseline),
        newcomers(runs, baseline, judgements),
        tasks(runs, baseline),
        judged(judgements, runs, baseline),
        cost(runs),
        privacy(runs),
        _origin(runs),
    ]
    return document("Pomona report", sections)


def _origin(runs: Sequence[FinishedRun]) -> str:
    parts = [heading("where the figures come from")]
    for run in runs:
        versions = ", ".join(
            f"{name} {run.about[name]}" for name in ("pomona", "python", "torch", "transformers")
        )
        command = shlex.join(map(str, run.about.get("command", [])))
        parts.append(
            f"<details><summary>{text(run.method)}, seed {run.seed}: {text(str(run.path))}</summary>"
            f"<p class=soft>{text(versions)}</p><pre>{text(command)}</pre>"
            f"<pre>{text(run.recipe)}</pre></details>"
        )
    return "".join(parts) + note(f"Written by Pomona {pomona.__version__}.")
