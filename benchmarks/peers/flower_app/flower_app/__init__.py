"""A round of federated LoRA as one writes it with Flower, PEFT and transformers."""
