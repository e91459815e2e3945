"""Where tests find real models and data, and how many threads they use."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
_CACHE = tempfile.TemporaryDirectory(prefix="pomona-tests-")  # gone with this process
os.environ["POMONA_CACHE"] = _CACHE.name
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the network, and none waits for it


def _material(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable, ROOT.parent / "shared" / default))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set {variable} to run the tests on real material")
    return folder


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """Folder of real pretrained models (POMONA_MODELS)."""
    return _material("POMONA_MODELS", "models")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real text and instruction data (POMONA_DATA)."""
    return _material("POMONA_DATA", "data")


WORDS = [
    "red",
    "green",
    "blue",
    "apple",
    "pear",
    "plum",
    "tree",
    "leaf",
    "root",
    "seed",
    "rain",
    "sun",
]


def word_text(seed: int, words: int) -> str:
    """A reproducible nonsense text over a small vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(WORDS), (words,), generator=generator).tolist()
    return " ".join(WORDS[i] for i in index)


def now_and_then(often: Sequence, rarely: Sequence) -> list:
    """Values to parametrise with; the second ones only where slow tests run too."""
    return [*often, *(pytest.param(value, marks=pytest.mark.slow) for value in rarely)]


def save_tokenizer(folder: Path) -> int:
    """Train a small byte-level BPE and save it as transformers does; return its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([word_text(s, 200) for s in range(5)], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    wrapped.save_pretrained(folder)
    return len(wrapped)


def save_model(folder: Path, kind: str, **settings: object) -> Path:
    """Save a tiny random model of an architecture with its tokenizer."""
    import transformers

    vocabulary = save_tokenizer(folder)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
        **settings,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # they are born zero, and a lost one would not show
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def moe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Mixtral checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("moe")
    return save_model(
        folder, "Mixtral", intermediate_size=32, num_local_experts=4, num_experts_per_tok=2
    )


@pytest.fixture(scope="session")
def dense_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama checkpoint with a tokenizer."""
    return save_model(tmp_path_factory.mktemp("dense"), "Llama", intermediate_size=64)


@pytest.fixture(scope="session")
def rows_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of three categories, train.jsonl and test.jsonl."""
    import json

    folder = tmp_path_factory.mktemp("rows")
    for split, count in (("train", 10), ("test", 4)):
        rows = [
            {
                "instruction": word_text(1000 * len(split) + 10 * i + c, 5),
                "context": word_text(i, 4) if i % 2 else "",
                "response": word_text(7 * i + c, 3),
                "category": category,
            }
            for c, category in enumerate(("apples", "pears", "plums"))
            for i in range(count)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture
def settings(moe_dir: Path, rows_dir: Path):
    """A small federation of three clients."""
    from pomona.federation.clients import ClientData  # types are checked in what is imported later
    from pomona.federation.evaluation import Evaluation
    from pomona.federation.graft import Graft
    from pomona.federation.local import LocalTraining
    from pomona.federation.settings import FederateSettings
    from pomona.models.lora import LoRA

    return FederateSettings(
        model=str(moe_dir),
        data=ClientData(train=rows_dir / "train.jsonl", test=rows_dir / "test.jsonl"),
        rounds=3,
        max_length=96,
        adapter=LoRA(2, 4.0),
        graft=Graft(rank=2),
        local=LocalTraining(steps=2, batch=2),
        evaluation=Evaluation(every=2, rows=3, answers=2, new_tokens=4),
    )
