"""The only room that knows Flower: its SuperLink and SuperNode carry our messages between sites."""

import os

# Before anything of Flower is imported: nothing is reported to anybody, no version is asked for.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
# Chunks of messages are what a coordinator has in memory, several at a time; Flower's have 5 MiB.
os.environ.setdefault("FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", str(1 << 19))
