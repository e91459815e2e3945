"""The folder that `flwr run` is given: `python -m pomona.flower.app` prints where it is."""
