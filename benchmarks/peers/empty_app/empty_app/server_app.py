"""A server that asks all nodes, round after round, and notes how long they take to answer."""

import json
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    nodes, rounds = int(context.run_config["nodes"]), int(context.run_config["rounds"])
    while len(list(grid.get_node_ids())) < nodes:
        time.sleep(0.5)
    seconds: list[float] = []
    for round_ in range(rounds):
        began = time.perf_counter()
        content = RecordDict({"config": ConfigRecord({"round": round_})})
        messages = [Message(content, node, MessageType.TRAIN) for node in grid.get_node_ids()]
        replies = list(grid.send_and_receive(messages))
        if len(replies) != nodes or any(reply.has_error() for reply in replies):
            raise RuntimeError("not every node has answered")
        seconds.append(time.perf_counter() - began)
    Path(str(context.run_config["out"])).write_text(json.dumps(seconds), "utf-8")
