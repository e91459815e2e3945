"""Dense families: what a config.json leaves out keeps the meaning it has in its own family."""

import json

import pytest
import torch
from conftest import save_model
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

from pomona.errors import PomonaError
from pomona.models.dense import DENSE_FAMILIES, dense_family
from pomona.models.dense.mixtral import PARTS
from pomona.models.weights import Checkpoint, write_sharded

CLASSES = {"llama": "Llama", "mistral": "Mistral"}
# Keys of the dense config.json whose defaults are not Mixtral's, or that older files spell otherwise.
DEFAULTED = [
    (),
    ("rope_parameters",),
    ("rms_norm_eps",),
    ("num_key_value_heads",),
    ("sliding_window",),
    ("max_position_embeddings",),
    ("tie_word_embeddings",),
    ("head_dim",),
]


def as_one_expert(folder, out):
    """Write the dense checkpoint as a mixture of two equal experts, each the whole FFN."""
    checkpoint = Checkpoint.open(folder)
    family = dense_family(checkpoint)
    config = checkpoint.config

    def tensors():
        for name in checkpoint.files:
            prefix, mlp, part = name.partition(".mlp.")
            if not mlp:
                yield name, checkpoint.tensor(name)
                continue
            layer = int(prefix.rpartition(".")[2])
            for e in range(2):
                named = PARTS[part.removesuffix(".weight")]
                yield (
                    family.expert.format(layer=layer, expert=e, part=named),
                    checkpoint.tensor(name),
                )
        for layer in range(config["num_hidden_layers"]):
            yield family.router.format(layer=layer), torch.zeros(2, config["hidden_size"])

    out.mkdir()
    write_sharded(out, tensors())
    made = family.container(config, 2, 1, config["intermediate_size"])
    (out / "config.json").write_text(json.dumps(made))
    return made


def same_logits(a, b):
    tokens = torch.randint(3, 300, (2, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (AutoModelForCausalLM.from_pretrained(p)(tokens).logits for p in (a, b))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", DENSE_FAMILIES)
@pytest.mark.parametrize("absent", DEFAULTED, ids=lambda keys: "".join(keys) or "none")
def test_keys_a_config_leaves_out_keep_their_family_s_default(tmp_path, kind, absent):
    heads = {"llama": 4, "mistral": 8}[kind]  # as many key-value heads as silence means there
    settings = {
        "num_attention_heads": heads,
        "num_key_value_heads": heads if "num_key_value_heads" in absent else 2,
        "hidden_size": 8 * heads,
    }
    folder = save_dense(tmp_path / "dense", kind, settings, absent)
    made = as_one_expert(folder, tmp_path / "out")
    same_logits(tmp_path / "out", folder)
    dense = AutoConfig.from_pretrained(folder)
    mixture = AutoConfig.from_pretrained(tmp_path / "out")
    assert isinstance(mixture, MixtralConfig)
    for key in ("rope_parameters", "rms_norm_eps", "num_key_value_heads", "tie_word_embeddings"):
        assert getattr(mixture, key) == getattr(dense, key), key
    assert mixture.sliding_window == getattr(dense, "sliding_window", None)
    assert made["output_router_logits"] is False


def save_dense(folder, kind, settings, absent):
    import transformers
    from conftest import save_tokenizer

    folder.mkdir()
    config = getattr(transformers, f"{CLASSES[kind]}Config")(
        vocab_size=save_tokenizer(folder),
        num_hidden_layers=2,
        intermediate_size=40,
        initializer_range=0.2,
        **settings,
    )
    torch.manual_seed(0)
    getattr(transformers, f"{CLASSES[kind]}ForCausalLM")(config).float().save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in raw.items() if key not in absent})
    )
    return folder


def test_old_spelling_of_the_rotary_settings_is_understood(tmp_path):
    folder = save_model(tmp_path / "dense", "Llama", intermediate_size=40)
    raw = json.loads((folder / "config.json").read_text())
    del raw["rope_parameters"]
    raw |= {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (folder / "config.json").write_text(json.dumps(raw))
    made = as_one_expert(folder, tmp_path / "out")
    assert made["rope_parameters"]["rope_theta"] == 5e4
    assert made["rope_parameters"]["factor"] == 2.0
    same_logits(tmp_path / "out", folder)


def test_a_sliding_window_stays_at_work(tmp_path):
    folder = save_model(tmp_path / "dense", "Mistral", intermediate_size=40, sliding_window=8)
    assert as_one_expert(folder, tmp_path / "out")["sliding_window"] == 8
    same_logits(tmp_path / "out", folder)


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias"])
def test_biases_have_no_home_in_the_container(tmp_path, key):
    folder = save_model(tmp_path / "dense", "Llama", intermediate_size=40, **{key: True})
    with pytest.raises(PomonaError, match=f"{key} is true"):
        dense_family(Checkpoint.open(folder))


def test_other_kinds_are_refused_with_those_that_work(moe_dir, tmp_path):
    works = ", ".join(DENSE_FAMILIES)
    with pytest.raises(PomonaError, match=f"mixture of experts already, not dense; .* {works}"):
        dense_family(Checkpoint.open(moe_dir))
    folder = save_model(tmp_path / "dense", "Qwen2", intermediate_size=40)
    with pytest.raises(PomonaError, match=f'model type "qwen2" is not supported; .* {works}'):
        dense_family(Checkpoint.open(folder))
