"""Train the small dense Llama that the package ships, from text that the package writes itself.

    python scripts/train_demo_model.py [--out src/pomona/demo/model] [--steps 1500]

Deterministic for one thread and one machine; takes a few minutes on one core. Writes a Hugging Face
checkpoint (bfloat16), its tokenizer and training.json with the held-out loss of every domain.
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pomona.data.texts import consecutive_windows, encode_texts
from pomona.demo.domains import domain_texts
from pomona.evaluation.loss import text_loss

LENGTH, BATCH = 128, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).resolve().parent.parent / "src" / "pomona" / "demo" / "model"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--steps", type=int, default=1500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    texts = domain_texts(seed=0, documents=3000)
    tokenizer = train_tokenizer([text for domain in texts.values() for text in domain[:500]])
    model = LlamaForCausalLM(config_for(len(tokenizer)))
    train(model, windows_of(texts, tokenizer), options.steps)
    model.bfloat16().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    model.float().eval()
    held_out = {
        name: text_loss(model, consecutive_windows(domain, tokenizer, LENGTH, 32))
        for name, domain in domain_texts(seed=1, documents=200).items()
    }
    record = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": options.steps,
        "tokens": options.steps * BATCH * LENGTH,
        "heldout_nats_per_token": {name: round(loss, 3) for name, loss in held_out.items()},
    }
    (options.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=256,
    )


def config_for(vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def windows_of(texts: dict[str, list[str]], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Join all documents, each closed by the end-of-sequence token, in a shuffled order."""
    documents = encode_texts([text for domain in texts.values() for text in domain], tokenizer)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    joined = [token for i in order for token in (*documents[i].tolist(), tokenizer.eos_token_id)]
    return torch.tensor(joined[: len(joined) // LENGTH * LENGTH]).view(-1, LENGTH)


def train(model: LlamaForCausalLM, windows_BT: torch.Tensor, steps: int) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.05)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        progress = step / steps
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * min(1.0, step / 50) * (1 - 0.95 * progress)
        chosen = torch.randint(len(windows_BT), (BATCH,), generator=generator)
        loss = model(input_ids=windows_BT[chosen], labels=windows_BT[chosen]).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    main()
