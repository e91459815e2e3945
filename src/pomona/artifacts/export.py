"""A personal model as one checkpoint: stock where a family holds it, else with a little code beside it."""

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from pomona.artifacts import modeling_personal
from pomona.artifacts.mixture import copy_tokenizer
from pomona.artifacts.personal import PersonalModel, load_base, put_on
from pomona.errors import PomonaError
from pomona.federation.merged import GatedExpert, concatenated, grown_experts, merge_lora
from pomona.files import atomic_folder, write_text
from pomona.models.loading import Dtype, checkpoint_folder
from pomona.models.weights import Checkpoint, save_model

CODE = "modeling_personal.py"
Kind = Literal["stock", "qwen2-moe", "code"]


@dataclass(frozen=True)
class Exported:
    """What became of a personal model.

    `kind` "stock": a checkpoint of the base's own family; "qwen2-moe": of that one; "code": one that is loaded
    with `trust_remote_code=True`. `parts` are what was merged, `beside` PEFT folders in it that were not.
    """

    folder: Path
    kind: Kind
    architecture: str
    parameters: int
    parts: Sequence[str] = ()
    beside: Sequence[str] = ()


def export_personal(
    personal: PersonalModel, out: Path, merge: bool = True, dtype: Dtype = "auto", card: str = ""
) -> Exported:
    """Write a base with a client's parts as a checkpoint folder.

    A mixture like Mixtral with one private expert per layer becomes a Qwen2-MoE, whose gated shared expert it
    is; without private experts the family stays. Everything else keeps its family and gets `CODE`, which
    transformers runs with `trust_remote_code=True`. Without `merge` LoRA lies beside as PEFT folders. `dtype`
    "auto" is that of the base, `card` the README.md. Raises `PomonaError` for parts that no checkpoint holds.
    """
    base, state = put_on(load_base(personal.source, personal.device), personal)
    grown = grown_experts(base, state)
    beside: dict[str, Path] = {}
    if merge:
        merge_lora(base, state)
    else:
        named = {"adapter": personal.adapter, "personal": personal.personal}
        beside = {name: path for name, path in named.items() if path is not None}
    kind: Kind
    kind, model = _container(base.model, grown)
    folder = checkpoint_folder(personal.source)
    wanted = Checkpoint.open(folder).dtype() if dtype == "auto" else getattr(torch, dtype)
    model.to(dtype=wanted)  # pyright: ignore[reportCallIssue] - typed as a module's
    with atomic_folder(out) as partial:
        save_model(model, partial)
        copy_tokenizer(folder, partial)
        if kind == "code":
            write_text(partial / CODE, _code(type(base.model).__name__))
        for name, path in beside.items():
            shutil.copytree(path, partial / name)
        if card:
            write_text(partial / "README.md", card)
    parameters = sum(p.numel() for p in model.parameters())
    parts = [path.name for path in personal.parts if path not in beside.values()]
    return Exported(out, kind, _architecture(kind, base.model), parameters, parts, list(beside))


def _architecture(kind: Kind, model: PreTrainedModel) -> str:
    return Qwen2MoeForCausalLM.__name__ if kind == "qwen2-moe" else type(model).__name__


def _container(
    model: PreTrainedModel, grown: Mapping[str, Sequence[GatedExpert]]
) -> tuple[Kind, PreTrainedModel]:
    if not grown:
        return "stock", model
    single = {name: concatenated(own) for name, own in grown.items()}
    ones = {name: own for name, own in single.items() if own is not None and own.b is None}
    if len(ones) == len(grown) and _like_mixtral(model):
        return "qwen2-moe", _as_qwen2_moe(model, ones)
    return "code", _with_code(model, grown)


def _like_mixtral(model: PreTrainedModel) -> bool:
    config = cast(Any, model.config)
    return config.model_type == "mixtral" and config.sliding_window is None


def _as_qwen2_moe(model: PreTrainedModel, grown: Mapping[str, GatedExpert]) -> PreTrainedModel:
    """Return a Mixtral with a gated expert more as the Qwen2-MoE that it is: the same names, and a few more."""
    old = cast(Any, model.config)
    width = next(iter(grown.values())).gate.shape[0]
    config = Qwen2MoeConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        intermediate_size=old.intermediate_size,
        num_hidden_layers=old.num_hidden_layers,
        num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_key_value_heads,
        hidden_act=old.hidden_act,
        max_position_embeddings=old.max_position_embeddings,
        rms_norm_eps=old.rms_norm_eps,
        rope_parameters=old.rope_parameters,
        tie_word_embeddings=old.tie_word_embeddings,
        moe_intermediate_size=old.intermediate_size,
        shared_expert_intermediate_size=width,
        num_experts=old.num_local_experts,
        num_experts_per_tok=old.num_experts_per_tok,
        norm_topk_prob=True,
        router_aux_loss_coef=old.router_aux_loss_coef,
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
        pad_token_id=old.pad_token_id,
    )
    if old.head_dim:
        config.head_dim = old.head_dim  # a field of Mixtral's alone; the attention reads it in both
    with torch.device("meta"):
        made = Qwen2MoeForCausalLM(config)
    tensors = dict(model.state_dict())
    for name, own in grown.items():
        block = name.removesuffix(".experts")
        # σ(0) is one half
        down_DW = own.down if own.w is not None else 2 * own.down
        gate_D = own.w if own.w is not None else torch.zeros(old.hidden_size)
        tensors |= {
            f"{block}.shared_expert.gate_proj.weight": own.gate,
            f"{block}.shared_expert.up_proj.weight": own.up,
            f"{block}.shared_expert.down_proj.weight": down_DW,
            f"{block}.shared_expert_gate.weight": gate_D[None],
        }
    for name, parameter in made.named_parameters():
        if name.endswith("_proj.bias"):
            tensors[name] = torch.zeros(parameter.shape)
    return _filled(made, tensors)


def _with_code(
    model: PreTrainedModel, grown: Mapping[str, Sequence[GatedExpert]]
) -> PreTrainedModel:
    config = cast(Any, type(model.config).from_dict(model.config.to_dict()))
    config.private_experts = {
        name: [
            {"width": len(one.gate), "gate": one.w is not None, "bias": one.b is not None}
            for one in own
        ]
        for name, own in grown.items()
    }
    config.auto_map = {"AutoModelForCausalLM": f"{Path(CODE).stem}.PersonalForCausalLM"}
    with torch.device("meta"):
        made = modeling_personal.with_private_experts(type(model))(config)
    tensors = dict(model.state_dict())
    for number, own in enumerate(grown.values()):
        for i, one in enumerate(own):
            prefix = f"grafts.{number}.{i}"
            tensors |= {
                f"{prefix}.gate_proj.weight": one.gate,
                f"{prefix}.up_proj.weight": one.up,
                f"{prefix}.down_proj.weight": one.down,
            }
            if one.w is not None:
                tensors[f"{prefix}.gate.weight"] = one.w[None]
            if one.b is not None:
                tensors[f"{prefix}.gate.bias"] = one.b[None]
    return _filled(made, tensors)


def _filled(made: PreTrainedModel, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """Give a model on the meta device its weights."""
    missing, foreign = made.load_state_dict(dict(tensors), strict=False, assign=True)
    tied = {name for name in missing if name == "lm_head.weight"}
    if set(missing) - tied or foreign:
        raise PomonaError(
            f"{type(made).__name__} does not hold this model: {[*missing, *foreign][:3]} do not match"
        )
    made.tie_weights()
    return made


def _code(architecture: str) -> str:
    """Return the code beside a checkpoint: the module of this package, for one family."""
    spec = importlib.util.find_spec(modeling_personal.__name__)
    assert spec is not None and spec.origin is not None
    text = Path(spec.origin).read_text("utf-8")
    text = text.replace("import torch\nfrom torch import nn\n", _IMPORTS.format(architecture), 1)
    return f"{text}\n\nPersonalForCausalLM = with_private_experts({architecture})\n"


_IMPORTS = "import torch\nfrom torch import nn\nfrom transformers import {}\n"
