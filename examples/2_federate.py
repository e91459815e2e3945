"""Personal models for several clients: `python examples/2_federate.py MIXTURE [CLIENTS] OUT`.

CLIENTS holds NAME.train.jsonl and NAME.test.jsonl; without it, the demo's four houses that disagree. What a
recipe says in TOML is a dataclass here.
"""

import sys
from pathlib import Path

import pomona
from pomona.artifacts.report import write_report
from pomona.demo.story import write_clients
from pomona.federation.clients import ClientData
from pomona.federation.evaluation import Evaluation
from pomona.federation.graft import Graft
from pomona.federation.local import LocalTraining
from pomona.federation.settings import FederateSettings
from pomona.models.lora import LoRA

mixture, *given, out = sys.argv[1:]
clients = Path(given[0]) if given else Path(out) / "clients"
if not given:
    write_clients(clients, seed=0)

settings = FederateSettings(
    model=mixture,
    data=ClientData(folder=clients),
    rounds=3,
    max_length=96,
    adapter=LoRA(rank=8),
    graft=Graft(rank=8),
    local=LocalTraining(steps=6, batch=6, learning_rate=1e-2),
    evaluation=Evaluation(every=3, rows=12, answers=2, new_tokens=24),
)
run = pomona.federate(settings, Path(out) / "run", tell=print)
for model in ("base", "shared", "personal"):
    losses = run.results[model]["clients"]
    print(model, {name: round(own["loss"], 3) for name, own in losses.items()})
write_report([run.path], Path(out) / "report.html")
