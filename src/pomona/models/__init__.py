"""Models as transformers has them: expert sites, LoRA, dense families, weight I/O."""
