"""Make a mixture of experts of a dense model: `python examples/1_reconstruct.py [MODEL DOMAINS] OUT`.

Without a model and domains of your own, those of the demo.
"""

import json
import sys
from pathlib import Path

import pomona
from pomona.demo.domains import domain_texts
from pomona.demo.story import MODEL


def demo_domains(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in domain_texts(seed=2, documents=40).items():
        lines = "\n".join(json.dumps({"text": text}) for text in texts)
        (folder / f"{name}.jsonl").write_text(lines, "utf-8")
    return folder


*given, out = sys.argv[1:]
model, domains = given or (MODEL, demo_domains(Path(out) / "domains"))
sizes = {"experts": 4, "active": 2, "keep": 0.5}
calibration = {} if given else {"windows": 32, "length": 128, "affinity_windows": 4}
made = pomona.reconstruct(model, domains, Path(out) / "mixture", **sizes, **calibration)
print(f"{made.container}: {made.total_parameters:,} parameters, {made.active_parameters:,} active")
for number, group in enumerate(made.plan.groups):
    print(f"expert {number} was pruned for {', '.join(group)}")
