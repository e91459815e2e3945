"""A client: the shared adapter comes, its own goes back; the model stays in the worker, or is loaded anew."""

import json
from functools import cache
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peers.peft_loop import train, with_adapter
from peft import PeftModel

from pomona.models.loading import load_model

app = ClientApp()


@app.train()
def train_client(message: Message, context: Context) -> Message:
    folder = Path(str(context.run_config["folder"]))
    about = json.loads((folder / "work.json").read_text("utf-8"))
    client = int(context.node_config["partition-id"])
    batches = torch.load(folder / f"{client}.pt")
    shared = message.content["arrays"].to_torch_state_dict()
    model = _kept(folder) if about["keeps_model"] else _loaded(folder)
    adapter, losses = train(model, shared, batches, about["rate"])
    # each client counts once, whatever its rows
    metrics = MetricRecord({"client": client, "losses": losses, "num-examples": 1})
    reply = RecordDict({"arrays": ArrayRecord(adapter), "metrics": metrics})
    return Message(content=reply, reply_to=message)


@cache
def _kept(folder: Path) -> PeftModel:
    return _loaded(folder)


def _loaded(folder: Path) -> PeftModel:
    about = json.loads((folder / "work.json").read_text("utf-8"))
    torch.set_num_threads(about["threads"])
    model = load_model(Path(about["model"]), "float32")
    return with_adapter(model, about["rank"], about["alpha"], about["targets"])
