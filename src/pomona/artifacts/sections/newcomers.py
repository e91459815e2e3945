"""Everything again for the clients that took part in no round and grafted when it was over."""

from collections.abc import Sequence

from pomona.artifacts.finished import FinishedRun
from pomona.artifacts.judgements import JudgedFile
from pomona.artifacts.page import heading, note
from pomona.artifacts.sections.answers import answers
from pomona.artifacts.sections.convergence import convergence
from pomona.artifacts.sections.cost import cost
from pomona.artifacts.sections.experts import experts
from pomona.artifacts.sections.forgetting import forgetting
from pomona.artifacts.sections.judged import judged
from pomona.artifacts.sections.tasks import tasks


def newcomers(
    runs: Sequence[FinishedRun], baseline: str | None, judgements: Sequence[JudgedFile]
) -> str:
    """Return the sections of the clients that are new in any of the runs, every method on them."""
    names = dict.fromkeys(name for run in runs for name in run.newcomers)
    everybody = set(runs[0].results["base"]["clients"])
    if not names or set(names) == everybody:  # then the page is about them already
        return ""
    own = [run.of(names) for run in runs]
    told = (
        f"{', '.join(names)}: in no round of the runs that name them as newcomers, where they trained what is "
        "private on what the others had shared, which they were sent once. The same figures as above, of these "
        "clients alone; FLOPs per token are those of all clients."
    )
    return "".join(
        (
            heading("new clients"),
            note(told),
            answers(own, baseline),
            convergence(own),
            experts(own),
            forgetting(own, baseline),
            tasks(own, baseline),
            judged(judgements, runs, baseline, names),
            cost(own),
        )
    )
