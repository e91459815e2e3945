"""The embedded default: a small dense model, text of eight domains, four houses that disagree."""
