"""Pomona as an app of Flower: what Flower packs names what is installed."""
