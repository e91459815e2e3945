import pytest
import torch
from families import EXPERTS, FAMILIES, HIDDEN, TOP_K, VOCABULARY

from pomona.models.experts import ExpertSite, enable_checkpointing, find_expert_sites, freeze
from pomona.models.routing import count_routing, experts_call

CLIENTS, ROWS, LENGTH = 3, 2, 6


def batch(seed=0, rows=CLIENTS * ROWS):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, LENGTH), generator=generator)


def padded():
    mask = torch.ones(CLIENTS * ROWS, LENGTH, dtype=torch.bool)
    mask[1, 3:] = mask[4, 1:] = mask[5] = False
    return mask


def expected_counts(model, sites, ids, keep):
    """Count by a loop over every token's choices, from the routing each site was given."""
    seen = []
    hooks = [
        site.experts.register_forward_pre_hook(
            lambda _module, args, kwargs: seen.append((*args, *kwargs.values())[1]),
            with_kwargs=True,
        )
        for site in sites
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    counts = torch.zeros(len(sites), CLIENTS, EXPERTS, dtype=torch.int64)
    for layer, index in enumerate(seen):
        for token, choices in enumerate(index.tolist()):
            row, position = divmod(token, LENGTH)
            if keep[row, position]:
                for expert in choices:
                    counts[layer, row // ROWS, expert] += 1
    return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_equal_a_loop_over_tokens(family):
    model = FAMILIES[family]()
    sites = find_expert_sites(model)
    keep = padded()
    for mask in (None, keep, keep.long()):
        with count_routing(sites, CLIENTS, mask) as counts, torch.no_grad():
            model(input_ids=batch(), use_cache=False)
        seen = torch.ones_like(keep) if mask is None else keep
        assert counts.counts_LCE.dtype == torch.int64
        assert torch.equal(counts.counts_LCE, expected_counts(model, sites, batch(), seen))
        per_client = seen.view(CLIENTS, -1).sum(1) * TOP_K
        assert torch.equal(counts.counts_LCE.sum(2), per_client.expand(len(sites), -1))


def test_counts_of_a_cohort_are_those_of_its_clients_alone():
    model = FAMILIES["olmoe"]()
    sites = find_expert_sites(model)
    with torch.no_grad():
        with count_routing(sites, CLIENTS) as together:
            model(input_ids=batch(), use_cache=False)
        for client, rows in enumerate(batch().split(ROWS)):
            with count_routing(sites) as alone:
                model(input_ids=rows, use_cache=False)
            assert torch.equal(alone.counts_LCE[:, 0], together.counts_LCE[:, client])


def test_forward_passes_add_up_and_hooks_come_off():
    model = FAMILIES["gpt_oss"]()
    sites = find_expert_sites(model)
    with count_routing(sites) as counts, torch.no_grad():
        for seed in range(3):
            model(input_ids=batch(seed), use_cache=False)
    total = counts.counts_LCE.clone()
    assert total[0].sum() == 3 * CLIENTS * ROWS * LENGTH * TOP_K
    with torch.no_grad():
        model(input_ids=batch(), use_cache=False)
    assert torch.equal(counts.counts_LCE, total)
    assert not any(site.experts._forward_pre_hooks for site in sites)


def test_hooks_come_off_after_an_error():
    sites = find_expert_sites(FAMILIES["mixtral"]())
    with pytest.raises(KeyError), count_routing(sites):
        raise KeyError
    assert not any(site.experts._forward_pre_hooks for site in sites)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_recomputation_is_not_counted(family):
    totals = []
    for checkpointing in (False, True):
        model = FAMILIES[family]()
        freeze(model)
        calls = []
        if checkpointing:
            enable_checkpointing(model)
        sites = find_expert_sites(model)
        sites[0].experts.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        embedded = model.get_input_embeddings()(batch()).requires_grad_()
        with count_routing(sites, CLIENTS) as counts:
            model(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
        assert len(calls) == 1 + checkpointing
        totals.append(counts.counts_LCE)
    assert torch.equal(*totals)
    assert totals[0][0].sum() == CLIENTS * ROWS * LENGTH * TOP_K


def test_layers_of_different_width_are_filled_with_zeros():
    class Experts(torch.nn.Module):
        def forward(self, hidden, top_k_index, top_k_weights):
            return hidden

    sites = [ExpertSite(str(e), e, e, HIDDEN, 4, Experts(), None) for e in (2, 5)]
    index = torch.tensor([[0], [1], [1], [1]])
    with count_routing(sites, num_clients=2) as counts:
        for site in sites:
            site.experts(torch.zeros(4, HIDDEN), index, torch.ones(4, 1))
            site.experts(torch.zeros(4, HIDDEN), top_k_index=index, top_k_weights=torch.ones(4, 1))
    assert counts.counts_LCE.tolist() == [[[2, 2, 0, 0, 0], [0, 4, 0, 0, 0]]] * 2


@pytest.mark.parametrize(
    "names",
    [
        ("hidden_states", "top_k_index", "top_k_weights"),
        ("hidden_states", "router_indices", "routing_weights"),
    ],
)
def test_a_call_is_read_by_place_and_by_name(names):
    call = torch.zeros(4, HIDDEN), torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2)
    for by_place in range(4):
        named = dict(zip(names[by_place:], call[by_place:], strict=True))
        found = experts_call(call[:by_place], named)
        assert all(value is given for value, given in zip(found, call, strict=True))


def test_tokens_that_do_not_split_among_the_clients():
    model = FAMILIES["mixtral"]()
    with pytest.raises(RuntimeError), count_routing(find_expert_sites(model), num_clients=5):
        model(input_ids=batch(), use_cache=False)
