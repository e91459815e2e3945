"""The pipelines, each a file or a folder that narrates: reconstruct, federate, evaluate, judge."""
