"""The model card of a personal model: what it is made of, and what its federation measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pomona.artifacts.finished import FinishedRun, load_run
from pomona.artifacts.model_card import card_head
from pomona.artifacts.origin import read_origin
from pomona.artifacts.personal import PersonalModel
from pomona.models.loading import checkpoint_folder

_FIGURES = (("loss", "nats per answer token"), ("rouge_l", "ROUGE-L"), ("exact_match", "exact"))


def personal_card(
    personal: PersonalModel, run: Path | None = None, client: str | None = None, merged: bool = True
) -> str:
    """Return the README.md of an exported personal model; figures are those of a finished run, if given."""
    source = personal.source
    head = card_head(source, checkpoint_folder(source), "mixture-of-experts", "federated")
    whose = f"Personal model of {client}" if client else "Personal model"
    parts = ", ".join(_told(path) for path in personal.parts) or "nothing: it is the base itself"
    lora = "LoRA is merged" if merged else "LoRA lies beside, as PEFT folders"
    lines = [f"{head}# {whose}", "", f"{source} with {parts}. {lora}."]
    lines += ["The base model's licence and limits apply.", ""]
    if run is not None and client is not None:
        lines += _of_run(load_run(run), client)
    return "\n".join(lines) + "\n"


def _told(path: Path) -> str:
    origin = read_origin(path)
    form = f" (template {origin.template.get('kind')})" if origin else ""
    return f"`{path.name}`{form}"


def _of_run(run: FinishedRun, client: str) -> list[str]:
    data: Mapping[str, Any] = run.results["data"]
    clients = list(run.results["base"]["clients"])
    train, test = sum(data["train"][client]), sum(data["test"][client])
    lines = [
        f"Federated with {len(clients)} clients by the recipe `{run.method}`, seed {run.seed}. Its own part "
        f"was trained on {train} rows, which never left the client, and measured on {test} test rows.",
        "",
        f"| model | {' | '.join(told for _, told in _FIGURES)} |",
        "|---|---|---|---|",
    ]
    for model in ("base", "shared", "personal"):
        figures = (run.results[model] or {}).get("clients", {}).get(client)
        if figures is not None:
            lines.append(
                f"| {model} | {' | '.join(_figure(figures, key) for key, _ in _FIGURES)} |"
            )
    sent, received = _bytes(run.metrics, client)
    lines += ["", f"- sent to the client: {sent:,} bytes, from it: {received:,}"]
    spent = _epsilon(run.metrics, client)
    lines += [f"- differential privacy: {spent}"] if spent else []
    return lines


def _figure(figures: Mapping[str, Any], key: str) -> str:
    value = figures.get(key)
    return "–" if value is None else f"{value:.4f}"


def _bytes(metrics: Sequence[Mapping[str, Any]], client: str) -> tuple[int, int]:
    lines = [line for line in metrics if line["model"] == "communication"]
    sent, received = (
        sum(line.get(way, {}).get(client, 0) for line in lines) for way in ("sent", "received")
    )
    return sent, received


def _epsilon(metrics: Sequence[Mapping[str, Any]], client: str) -> str:
    """Return the last ε of the updates and of this client's rows."""
    told: list[str] = []
    for model, of in (("privacy", "of a client's update"), ("dp-sgd", "of a row")):
        lines = [
            line
            for line in metrics
            if line["model"] == model and line.get("client") in (None, client)
        ]
        if lines:
            last = lines[-1]
            told.append(f"ε = {last['epsilon']:.4g} {of} at δ = {last['delta']:g}")
    return ", ".join(told)
