"""Records and text: formats, templates, examples, windows."""
