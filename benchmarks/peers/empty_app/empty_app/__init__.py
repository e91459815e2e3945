"""Rounds in which nothing is trained: what Flower's deployment itself takes."""
