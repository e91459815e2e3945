"""The mixtures that `reconstruct.py` compares: their settings, and each made, measured and kept."""

import hashlib
import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from time import monotonic

from record import ROOT, commit, peak_bytes

from pomona.cli.console import progress_bars
from pomona.data.texts import consecutive_windows, read_domains
from pomona.evaluation.loss import window_losses
from pomona.files import read_object, write_json
from pomona.models.experts import freeze
from pomona.models.fingerprint import checkpoint_digests
from pomona.models.loading import load_model, load_tokenizer
from pomona.pipelines.reconstruct import ReconstructSettings, reconstruct
from pomona.progress import titled
from pomona.reconstruction.compensate import Bias, NoCompensation
from pomona.reconstruction.planners import ActivationClusters, RandomSplit, TopChannels
from pomona.reconstruction.retraining import ExpertStage, Objective, Retraining, RouterStage
from pomona.reconstruction.router import RandomRouter
from pomona.reconstruction.specialise import Specialise

FLAP, FAITHFUL, POMONA = "static FLAP", "DIVE faithful", "Pomona"
PLAIN = Objective(loss="cross-entropy", balance=0.0, z=0.0, straight_through=False)


def methods(active: int, tokens: int) -> dict[str, ReconstructSettings]:
    """Return every method with half of the dense FFN active; `active` 1 or 2 of eight experts."""
    lora = ExpertStage(tokens=tokens, learning_rate=3e-3, router="absolute")
    plain = Retraining(experts=lora, objective=PLAIN)
    common = ReconstructSettings(
        experts=8, active=active, keep=0.5 / active, windows=32, affinity_windows=8, retrain=plain
    )
    dealt = replace(
        common,
        compensation=NoCompensation(),
        router=RandomRouter(),
        specialise=Specialise(rounds=0),
    )
    first = max(tokens // 10, plain.step_tokens)
    staged = replace(
        plain,
        router=RouterStage(tokens=first, temperature=0.05 if active == 1 else 0.5),
        experts=replace(lora, tokens=tokens - first),
    )
    static = replace(common, experts=1, active=1, keep=0.5, grouping="all")
    default = replace(common, retrain=Retraining(experts=ExpertStage(tokens=tokens)))
    full = ExpertStage(tokens=tokens, learning_rate=5e-4, experts="full")
    for_one = Retraining(experts=replace(full, learning_rate=1e-3))  # better for a single FFN
    return {
        FLAP: replace(static, compensation=Bias()),
        "static, our compensation and retraining": replace(static, retrain=for_one),
        "random split (LLaMA-MoE)": replace(
            dealt, active=4, keep=0.125, planner=RandomSplit(), grouping="all"
        ),
        "activation clusters (CMoE)": replace(
            dealt, active=3, keep=0.1, planner=ActivationClusters(shared=0.2), grouping="all"
        ),
        "copies": replace(dealt, grouping="all"),
        "DIVE without affinity": replace(dealt, grouping="random", retrain=staged),
        FAITHFUL: replace(dealt, retrain=staged),
        POMONA: default,
        "Pomona, experts trained in full": replace(common, retrain=Retraining(experts=full)),
        "Pomona, half of the active channels shared": replace(
            default, keep=0.25 / active, planner=TopChannels(shared=0.25)
        ),
    }


def dense_run(out: Path) -> dict:
    """Measure the dense model, or read what was measured of it."""
    path = out / "dense.json"
    if not _kept(path):
        size = sum(p.numel() for p in load_model(_model()).parameters())
        found = {"total": size, "active": size, "seconds": 0.0, **_measured(_model())}
        write_json(path, {**_made_of(), **found})
    return read_object(path)


def run_of(out: Path, settings: ReconstructSettings) -> dict:
    """Reconstruct, retrain and measure with some settings, or read what was measured with them."""
    path = out / f"{_key(settings)}.json"
    if _kept(path):
        return read_object(path)
    made = path.with_suffix("")
    shutil.rmtree(made, ignore_errors=True)
    began = monotonic()
    with progress_bars() as progress:
        result = reconstruct(
            _model(), read_domains(_data()), made, settings, titled(made.name, progress)
        )
    seconds = monotonic() - began
    write_json(
        path,
        {
            **_made_of(),
            "settings": settings.to_json(),
            "total": result.total_parameters,
            "active": result.active_parameters,
            "seconds": seconds,
            **_measured(made),
        },
    )
    shutil.rmtree(made)
    return read_object(path)


def peak_of_run(out: Path, settings: ReconstructSettings) -> int:
    """Return the largest resident set of a process that does nothing but this, with a few steps of training.

    More steps need no more memory.
    """
    path = out / f"{_key(settings)}.peak.json"
    if not path.exists():
        with ProcessPoolExecutor(1, get_context("spawn")) as child:
            write_json(path, {"bytes": child.submit(_peak_of, out / "peak", settings).result()})
    return read_object(path)["bytes"]


def _peak_of(made: Path, settings: ReconstructSettings) -> int:
    how = settings.retrain
    assert how is not None
    few = 3 * how.length * how.batch
    router = replace(how.router, tokens=min(few, how.router.tokens))
    how = replace(how, router=router, experts=replace(how.experts, tokens=few))
    shutil.rmtree(made, ignore_errors=True)
    reconstruct(_model(), read_domains(_data()), made, replace(settings, retrain=how))
    shutil.rmtree(made)
    return peak_bytes()


def _made_of() -> dict[str, object]:
    return {"commit": commit(), "weights": checkpoint_digests(_model())}


def _kept(path: Path) -> bool:
    """Whether a run is there and of the model as it is; those without a note of it are taken for that."""
    now = _made_of()["weights"]
    return path.exists() and read_object(path).get("weights", now) == now


def _key(settings: ReconstructSettings) -> str:
    """Name a run by its settings: some baselines are the same in both.

    What came later is not in the name while it is as it was without, so that runs of before are found.
    """
    told = settings.to_json()
    if told["retrain"] is not None:
        later = {"warm_up": RouterStage().warm_up, "floor": RouterStage().floor}
        router = told["retrain"]["router"]
        told["retrain"]["router"] = {k: v for k, v in router.items() if later.get(k) != v}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _measured(folder: Path) -> dict[str, object]:
    """Return every domain's held-out nats and tokens, window by window."""
    model, tokenizer = load_model(folder, "float32"), load_tokenizer(folder)
    freeze(model)
    nats: dict[str, list[float]] = {}
    tokens: dict[str, list[int]] = {}
    for name, texts in read_domains(_data(), "valid").items():
        losses = window_losses(model, consecutive_windows(texts, tokenizer, 256, 32))
        nats[name] = [window.nats for window in losses]
        tokens[name] = [window.tokens for window in losses]
    return {"nats": nats, "tokens": tokens}


def _data() -> Path:
    return Path(os.environ.get("POMONA_DATA", ROOT.parent / "shared" / "data")) / "calibration"


def _model() -> Path:
    return Path(os.environ.get("POMONA_MODELS", ROOT.parent / "shared" / "models")) / "rootstock-3m"
