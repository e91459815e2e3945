"""Rehearsal: what the base says by itself is what a tuned model is held to, so that less is forgotten.

Nobody has the text that a base was pretrained on, but the base can be asked for some. Its own samples as
material: Huang et al., "Mitigating Catastrophic Forgetting in Large Language Models with Self-Synthesized
Rehearsal", ACL 2024. Its old distributions as targets: Li & Hoiem, "Learning without Forgetting", ECCV 2016.
No row of a client is in it, and clients with the same seed and base rehearse the same texts without sending
any.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as fn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pomona.data.examples import Example
from pomona.errors import PomonaError
from pomona.models.frozen_experts import as_generation_knows
from pomona.models.placement import device_of
from pomona.seeds import numpy_generator, seed_of
from pomona.shapes import PerClient

_SAID_AT_ONCE = 128
_SCORED_AT_ONCE = 32
_NEVER = -1e4  # the logarithm of a share that is nothing


@dataclass(frozen=True)
class Rehearsal:
    """Adds `weight` · KL(base ‖ tuned) on texts of the base to every client's loss of every step.

    Attributes:
        weight: Of the divergence beside the answers' loss.
        rows: Texts per client and step.
        texts: How many the base samples once, before the first round.
        length: Tokens of a text.
        top: The likeliest next tokens, whose probability is kept; the others count together.
    """

    weight: float = 1.0
    rows: int = 1
    texts: int = 256
    length: int = 64
    top: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise PomonaError(
                f"rehearsal weight {self.weight} is not positive; use for example 1.0, or leave [rehearsal] out"
            )
        for name, least in (("rows", 1), ("texts", 1), ("length", 2), ("top", 1)):
            if getattr(self, name) < least:
                raise PomonaError(
                    f"rehearsal {name} {getattr(self, name)} is too small; use {least} or more"
                )

    def begin(self, model: PreTrainedModel, first: int, seed: int) -> "Rehearsed":
        """Let the untuned model say its texts, each after the token `first`; the same for the same seed."""
        starts = torch.full((self.texts, 1), first).split(_SAID_AT_ONCE)
        said = torch.cat([self._sampled(model, own, seed, i) for i, own in enumerate(starts)])
        scored = [_likeliest(model, ids_BT, self.top) for ids_BT in said.split(_SCORED_AT_ONCE)]
        index, share = (torch.cat(parts) for parts in zip(*scored, strict=True))
        return Rehearsed(self, said, index, share)

    @torch.no_grad()
    def _sampled(
        self, model: PreTrainedModel, first_B1: Int[Tensor, "B 1"], seed: int, batch: int
    ) -> Int[Tensor, "B T"]:
        config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.length - 1,
            min_new_tokens=self.length - 1,
            pad_token_id=0,
        )
        device = device_of(model)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), as_generation_knows(model):
            torch.manual_seed(seed_of(seed, "rehearsal", batch))
            said = model.generate(  # pyright: ignore[reportCallIssue] - typed as a module
                input_ids=first_B1.to(device),
                attention_mask=torch.ones_like(first_B1).to(device),
                generation_config=config,
            )
        return said.cpu()


def first_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return what a text begins with: the beginning- or else the end-of-sequence token.

    Raises `PomonaError` when the tokenizer has neither.
    """
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    first = next((token for token in known if token is not None), None)
    if first is None:
        raise PomonaError(
            "the tokenizer has neither a beginning- nor an end-of-sequence token that a text of [rehearsal] "
            "could begin with; give it one, or leave [rehearsal] out"
        )
    return cast(int, first)


@dataclass(frozen=True)
class Rehearsed:
    """The texts of a base [texts, length] and what it expected to come next, position by position.

    index [texts, length − 1, top]: the likeliest tokens; share [texts, length − 1, top + 1]: the logarithms
    of their probabilities and, last, of all the others together.
    """

    settings: Rehearsal
    ids: Int[Tensor, "X T"] = field(repr=False)
    index: Int[Tensor, "X P K"] = field(repr=False)
    share: Float[Tensor, "X P J"] = field(repr=False)

    def drawn(
        self, seed: int | str, round_: int, client: str, first: int, last: int
    ) -> list[list[int]]:
        """Return the numbers of the texts of a client's steps `first` … `last` − 1 of a round."""
        generator = numpy_generator(seed, "rehearsal", round_, client)
        texts = generator.integers(len(self.ids), size=(last, self.settings.rows))
        return texts[first:].tolist()

    def losses(self, model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> PerClient:
        """Return weight · KL(base ‖ model) per token [C] on each client's texts, clients one after another."""
        flat = [text for own in texts for text in own]
        logits_XPV = _next_logits(model, self.ids[flat].to(device_of(model)))
        return self.losses_of(logits_XPV, texts)

    def losses_of(
        self, logits_XPV: Float[Tensor, "X P V"], texts: Sequence[Sequence[int]]
    ) -> PerClient:
        """Return weight · KL(base ‖ model) per token [C] where the model has said what comes next."""
        flat, device = [text for own in texts for text in own], logits_XPV.device
        found = coarse(logits_XPV.float(), self.index[flat].to(device))
        kl_XPJ = fn.kl_div(found, self.share[flat].to(device), reduction="none", log_target=True)
        return self.settings.weight * kl_XPJ.sum(-1).view(len(texts), -1).mean(1)

    def examples(self, texts: Sequence[int]) -> list[Example]:
        """Return texts as rows of which every token but the first is to be predicted."""
        return [Example(tuple(ids), 1) for ids in self.ids[list(texts)].tolist()]


@torch.no_grad()
def _likeliest(
    model: PreTrainedModel, ids_BT: Int[Tensor, "B T"], top: int
) -> tuple[Tensor, Tensor]:
    logits = _next_logits(model, ids_BT.to(device_of(model)))
    index = logits.topk(min(top, logits.shape[-1] - 1)).indices
    return index.int().cpu(), coarse(logits, index).cpu()


def _next_logits(model: PreTrainedModel, ids_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B P V"]:
    """Return the logits of every token but the first, float32."""
    output = model(input_ids=ids_BT, use_cache=False)
    return output.logits[:, :-1].float()


def coarse(
    logits_BPV: Float[Tensor, "B P V"], index_BPK: Int[Tensor, "B P K"]
) -> Float[Tensor, "B P J"]:
    """Return log-probabilities of some tokens and, last, of all the others together [B, P, K + 1]."""
    index_BPK = index_BPK.long()
    total_BP1 = logits_BPV.logsumexp(-1, keepdim=True)
    others_BP1 = logits_BPV.scatter(-1, index_BPK, -math.inf).logsumexp(-1, keepdim=True)
    kept_BPJ = torch.cat([logits_BPV.gather(-1, index_BPK), others_BP1], -1)
    return (kept_BPJ - total_BP1).clamp(min=_NEVER)
