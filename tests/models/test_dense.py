"""Dense families: what a config.json leaves out keeps the meaning it has in its own family."""

import json

import pytest
import torch
from conftest import save_model
from transformers import AutoConfig, AutoModelForCausalLM

from pomona.errors import PomonaError
from pomona.models.dense import (
    DENSE_FAMILIES,
    GatedFFN,
    MixtureLayer,
    MixtureSizes,
    container_of,
    dense_family,
)
from pomona.models.weights import Checkpoint, write_sharded

CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
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


def as_mixture(folder, out, shared=0):
    """Write the dense checkpoint as two equal experts, each the whole FFN but what is shared."""
    checkpoint = Checkpoint.open(folder)
    family, config = dense_family(checkpoint), checkpoint.config
    width = config["intermediate_size"] - shared
    sizes = MixtureSizes(2, 1, width, shared)
    container = container_of(family, sizes)

    def ffn(layer, channels):
        gate, up, down = (
            checkpoint.tensor(f"{family.mlp.format(layer=layer)}.{part}_proj.weight")
            for part in ("gate", "up", "down")
        )
        return GatedFFN(gate[channels], up[channels], down[:, channels].contiguous())

    def tensors():
        yield from ((n, checkpoint.tensor(n)) for n in checkpoint.files if ".mlp." not in n)
        for layer in range(config["num_hidden_layers"]):
            router = torch.zeros(2, config["hidden_size"])
            experts = [ffn(layer, slice(shared, None))] * 2
            common = ffn(layer, slice(0, shared)) if shared else None
            yield from container.tensors(layer, MixtureLayer(router, experts, common))

    out.mkdir()
    write_sharded(out, ((name, tensor.clone()) for name, tensor in tensors()))
    made = container.config(config, sizes)
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
    # As many key-value heads as silence means there.
    heads = {"llama": 4, "mistral": 8, "qwen2": 32, "qwen3": 32}[kind]
    settings = {
        "num_attention_heads": heads,
        "num_key_value_heads": heads if "num_key_value_heads" in absent else 2,
        "hidden_size": 8 * heads,
    }
    folder = save_dense(tmp_path / "dense", kind, settings, absent)
    made = as_mixture(folder, tmp_path / "out")
    same_logits(tmp_path / "out", folder)
    dense = AutoConfig.from_pretrained(folder)
    mixture = AutoConfig.from_pretrained(tmp_path / "out")
    container = {"qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}.get(kind, "mixtral")
    assert mixture.model_type == container
    for key in ("rope_parameters", "rms_norm_eps", "num_key_value_heads", "tie_word_embeddings"):
        assert getattr(mixture, key) == getattr(dense, key), key
    if kind != "qwen2":  # without a window, Qwen2 says null and Qwen2-MoE says 0
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
    made = as_mixture(folder, tmp_path / "out")
    assert made["rope_parameters"]["rope_theta"] == 5e4
    assert made["rope_parameters"]["factor"] == 2.0
    same_logits(tmp_path / "out", folder)


def test_a_sliding_window_stays_at_work(tmp_path):
    folder = save_model(tmp_path / "dense", "Mistral", intermediate_size=40, sliding_window=8)
    assert as_mixture(folder, tmp_path / "out")["sliding_window"] == 8
    same_logits(tmp_path / "out", folder)


WINDOW = {"use_sliding_window": True, "sliding_window": 8}


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3"])
@pytest.mark.parametrize(("first", "windowed"), [(0, True), (2, False)], ids=["all", "none"])
def test_a_window_in_all_layers_or_in_none_stays_so(tmp_path, kind, first, windowed):
    """`max_window_layers` is the first layer that has one."""
    given = WINDOW | {"max_window_layers": first, "intermediate_size": 40}
    folder = save_model(tmp_path / "dense", kind, **given)
    wide = save_model(tmp_path / "wide", kind, intermediate_size=40)
    tokens = torch.randint(3, 300, (1, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        narrow, plain = (
            AutoModelForCausalLM.from_pretrained(p)(tokens).logits for p in (folder, wide)
        )
    assert torch.equal(narrow, plain) != windowed  # the window is felt, or there is none
    as_mixture(folder, tmp_path / "out")
    same_logits(tmp_path / "out", folder)


MIXED = [{"max_window_layers": 1}, {"layer_types": ["sliding_attention", "full_attention"]}]


@pytest.mark.parametrize("mixed", MIXED, ids=["first", "types"])
def test_a_window_in_some_layers_stays_there_or_is_refused(tmp_path, mixed):
    """Qwen2-MoE knows it layer by layer, Qwen3-MoE does not; what is only pruned stays itself."""
    given = WINDOW | mixed | {"intermediate_size": 40}
    folder = save_model(tmp_path / "two", "Qwen2", **given)
    as_mixture(folder, tmp_path / "out")
    same_logits(tmp_path / "out", folder)
    folder = save_model(tmp_path / "three", "Qwen3", **given)
    with pytest.raises(
        PomonaError, match=r"Qwen3-MoE, .* has a sliding window in all layers or none"
    ):
        as_mixture(folder, tmp_path / "refused")
    config, single = Checkpoint.open(folder).config, MixtureSizes(1, 1, 24)
    assert container_of(DENSE_FAMILIES["qwen3"], single).config(config, single) == (
        config | {"intermediate_size": 24}
    )


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias"])
def test_biases_have_no_home_in_the_container(tmp_path, key):
    folder = save_model(tmp_path / "dense", "Llama", intermediate_size=40, **{key: True})
    with pytest.raises(PomonaError, match=f"{key} is true"):
        dense_family(Checkpoint.open(folder))


def test_other_kinds_are_refused_with_those_that_work(moe_dir, tmp_path):
    works = ", ".join(DENSE_FAMILIES)
    with pytest.raises(PomonaError, match=f"mixture of experts already, not dense; .* {works}"):
        dense_family(Checkpoint.open(moe_dir))
    folder = save_model(tmp_path / "dense", "Gemma", intermediate_size=40)
    with pytest.raises(PomonaError, match=f'model type "gemma" is not supported; .* {works}'):
        dense_family(Checkpoint.open(folder))


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_shared_channels_give_the_same_function(tmp_path, kind, tied):
    settings = {"sliding_window": None} if kind == "Mistral" else {}
    folder = save_model(
        tmp_path / "dense", kind, intermediate_size=40, tie_word_embeddings=tied, **settings
    )
    as_mixture(folder, tmp_path / "out", shared=16)
    same_logits(tmp_path / "out", folder)


def test_what_no_container_holds_is_refused(tmp_path):
    qwen3, llama = DENSE_FAMILIES["qwen3"], DENSE_FAMILIES["llama"]
    with pytest.raises(PomonaError, match="Qwen3-MoE has no shared expert; use shared 0"):
        container_of(qwen3, MixtureSizes(4, 2, 8, shared=4))
    with pytest.raises(PomonaError, match="Mixtral has no home for a bias"):
        container_of(llama, MixtureSizes(4, 2, 8, biased=True))
    single = MixtureSizes(1, 1, 8, biased=True)
    with pytest.raises(PomonaError, match="qwen3 has no home for a bias on down_proj"):
        container_of(qwen3, single).config({"model_type": "qwen3"}, single)
    folder = save_model(tmp_path / "dense", "Mistral", intermediate_size=40, sliding_window=8)
    with pytest.raises(PomonaError, match="no sliding window"):
        as_mixture(folder, tmp_path / "out", shared=8)


def test_llama3_rotary_scaling_is_kept(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    folder = save_model(tmp_path / "dense", "Llama", intermediate_size=40, rope_parameters=scaling)
    for shared in (0, 8):
        made = as_mixture(folder, tmp_path / f"out{shared}", shared)
        assert made["rope_parameters"] == scaling
        same_logits(tmp_path / f"out{shared}", folder)
