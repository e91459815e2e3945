"""FlexLoRA: average the products B · A, which is what the clients' models contain, then factorise.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", NeurIPS 2024 (arXiv 2402.11505), section 3. FedAvg's mean(B) · mean(A) is not the mean of
the clients' updates; this is, up to the rank that is kept. Clients may have any ranks.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pomona.federation.strategies.fedavg import weighted_mean
from pomona.federation.strategies.protocol import ServerState
from pomona.federation.update import Part, Update


@dataclass(frozen=True)
class FlexLoRA:
    """Returns the best approximation of Σ rows · B · A / Σ rows that has the server's rank.

    The factor alpha / rank is the same constant for every client and stays in front. A gets
    orthonormal rows and B the singular values, so that A keeps about the size that LoRA gives it at
    birth. Fused experts [E, R, in] are factorised each by itself. Tensors that are no pair of factors
    are averaged by rows.
    """

    @property
    def shares(self) -> Part:
        """The whole adapter."""
        return "adapter"

    def init(self, shared: Mapping[str, Tensor]) -> ServerState:
        """There is nothing to remember."""
        return ServerState(shared)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the factors of the mean product; without updates the state stays as it was."""
        # By name: the SVD of a sum in another order would differ where singular values are equal.
        sent = sorted(updates, key=lambda update: update.client)
        if not sent:
            return state
        paired = _projections(state.shared)
        factors = {f"{name}.lora_{f}" for name in paired for f in "AB"}
        rest = [
            Update(u.client, u.rows, {n: v for n, v in u.shared.items() if n not in factors})
            for u in sent
        ]
        shared = weighted_mean(rest)
        for name in paired:
            a_RI, b_OR = _mean_product(name, sent, state.shared[f"{name}.lora_A"])
            shared |= {f"{name}.lora_A": a_RI, f"{name}.lora_B": b_OR}
        return ServerState({name: shared[name] for name in state.shared})


def _projections(shared: Mapping[str, Tensor]) -> list[str]:
    """Return the names of which both factors are shared."""
    names = [name.removesuffix(".lora_A") for name in shared if name.endswith(".lora_A")]
    return [name for name in names if f"{name}.lora_B" in shared]


def _mean_product(name: str, updates: Sequence[Update], old_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Return A [R, in] and B [out, R] of one projection's mean product, in the old A's dtype.

    Of experts, [E, R, in] and [E, out, R].

    Where the clients' ranks together are fewer than R, the rows of A that are left stay the old
    ones beside zeros in B: they change nothing and can still learn.
    """
    rows = sum(update.rows for update in updates)
    a_KI = torch.cat([update.shared[f"{name}.lora_A"].double() for update in updates], -2)
    b_OK = torch.cat(
        [update.shared[f"{name}.lora_B"].double() * (update.rows / rows) for update in updates], -1
    )
    rank = old_RI.shape[-2]
    found_RI, found_OR = truncated_product(b_OK, a_KI, rank)
    found = found_RI.shape[-2]
    a_RI = torch.cat([found_RI, old_RI[..., found:, :].double()], -2)
    b_OR = torch.cat([found_OR, found_OR.new_zeros(*b_OK.shape[:-1], rank - found)], -1)
    return a_RI.to(old_RI.dtype), b_OR.to(old_RI.dtype)


def truncated_product(b_OK: Tensor, a_KI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A [≤ rank, in], B [out, ≤ rank] with B · A nearest to `b_OK` · `a_KI`, or a batch of them.

    QR of both stacks leaves an SVD of at most K × K; the product [out, in] is never made. The largest
    entry of every row of A is positive, which settles the sign that an SVD leaves open.
    """
    basis_OQ, left_QK = torch.linalg.qr(b_OK)
    basis_IP, right_PK = torch.linalg.qr(a_KI.mT)
    u_QS, sigma_S, v_SP = torch.linalg.svd(left_QK @ right_PK.mT, full_matrices=False)
    a_RI = (v_SP @ basis_IP.mT)[..., :rank, :]
    b_OR = (basis_OQ @ (u_QS * sigma_S.unsqueeze(-2)))[..., :rank]
    sign_R1 = a_RI.gather(-1, a_RI.abs().argmax(-1, keepdim=True)).sign()
    return a_RI * sign_R1, b_OR * sign_R1.mT
