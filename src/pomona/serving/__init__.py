"""Personal models that answer: in a terminal, or behind an OpenAI-compatible endpoint."""
