import pytest
import torch
from families import EXPERTS, FAMILIES, HIDDEN, LAYERS, SPARSE_LAYERS, WIDTH, double, llama, llama4
from peft import LoraConfig, get_peft_model
from torch import nn

from pomona.errors import PomonaError
from pomona.models.experts import DenseExpert, ExpertSite, find_expert_sites

TOKENS = 11


def tokens(count=TOKENS, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, HIDDEN, generator=generator, dtype=torch.float64)


def is_view(part, whole):
    return part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def by_hand(expert: DenseExpert, site: ExpertSite, x):
    """The FFN from its weights alone; only GPT-OSS has another activation than silu(gate) · up."""
    gate = x @ expert.gate.T + (0 if expert.gate_bias is None else expert.gate_bias)
    up = x @ expert.up.T + (0 if expert.up_bias is None else expert.up_bias)
    if hasattr(site.experts, "limit"):
        limit, alpha = site.experts.limit, site.experts.alpha
        assert (gate > limit).any() and (up.abs() > limit).any(), "the clamp is not tested"
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + 1
        h = gate * torch.sigmoid(alpha * gate) * up
    else:
        h = nn.functional.silu(gate) * up
    return h @ expert.down.T + (0 if expert.down_bias is None else expert.down_bias)


def test_seventeen_families_are_covered():
    assert len(FAMILIES) == 17


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_have_the_sizes_and_numbers_of_the_layers(family):
    model = FAMILIES[family]()
    sites = find_expert_sites(model)
    assert [site.layer for site in sites] == SPARSE_LAYERS.get(family, list(range(LAYERS)))
    for site in sites:
        assert (site.num_experts, site.hidden_size, site.width) == (EXPERTS, HIDDEN, WIDTH)
        assert model.get_submodule(site.name) is site.experts


@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_computes_what_the_fused_module_computes(family):
    sites = find_expert_sites(double(family))
    x = tokens()
    for site in sites:
        for index in range(site.num_experts):
            chosen = torch.full((TOKENS, 1), index)
            fused = site.experts(x, chosen, torch.ones(TOKENS, 1, dtype=x.dtype))
            assert fused.abs().max() > 0.1
            expert = site.expert(index)
            torch.testing.assert_close(site.apply(x, index), fused, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(by_hand(expert, site, x), fused, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_computes_what_grouped_products_compute(family):
    model = FAMILIES[family]()
    model.set_experts_implementation("grouped_mm")
    site, x = find_expert_sites(model)[0], tokens().float()
    fused = site.experts(x, torch.full((TOKENS, 1), 3), torch.ones(TOKENS, 1))
    torch.testing.assert_close(site.apply(x, 3), fused, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_weights_are_views(family):
    site = find_expert_sites(FAMILIES[family]())[0]
    expert = site.expert(1)
    assert expert.gate.shape == expert.up.shape == (WIDTH, HIDDEN)
    assert expert.down.shape == (HIDDEN, WIDTH)
    assert is_view(expert.gate, site.experts.gate_up_proj)
    assert is_view(expert.up, site.experts.gate_up_proj)
    assert is_view(expert.down, site.experts.down_proj)


@pytest.mark.parametrize("family", FAMILIES)
def test_weighted_experts_sum_to_the_layers_own_output(family):
    """Over the routing that the model itself computed, token by token."""
    model = double(family)
    seen = {}

    def keep(module, args, kwargs, output):
        seen[module] = (*args, *kwargs.values(), output)

    sites = find_expert_sites(model)
    for site in sites:
        site.experts.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 17).view(2, 7))
    assert len(seen) == len(sites)
    for site in sites:
        x, index, weight, output = seen[site.experts]
        assert x.shape == output.shape == (14, HIDDEN) and index.shape == weight.shape == (14, 2)
        every = torch.stack([site.apply(x, e) for e in range(site.num_experts)], dim=1)
        picked = every.gather(1, index.unsqueeze(2).expand(-1, -1, HIDDEN))
        expected = (picked * weight.unsqueeze(2)).sum(1)
        torch.testing.assert_close(output, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_router_rows_give_the_routers_logits(family):
    model = double(family)
    site = find_expert_sites(model)[0]
    rows = torch.stack([site.router_row(e) for e in range(site.num_experts)])
    assert rows.shape == (EXPERTS, HIDDEN)
    seen = []
    inner = getattr(site.router, "wg", site.router)  # Hunyuan's router wraps its matrix
    inner.register_forward_hook(lambda _module, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        model(input_ids=torch.arange(3, 17).view(2, 7))
    x, output = seen[0]
    logits = output[0] if isinstance(output, tuple) else output
    bias = getattr(site.router, "bias", None) if family == "gpt_oss" else None
    expected = x.reshape(-1, HIDDEN).to(rows.dtype) @ rows.T + (0 if bias is None else bias)
    torch.testing.assert_close(
        logits.reshape(expected.shape).to(rows.dtype), expected, atol=1e-5, rtol=1e-5
    )


def test_down_without_its_bias():
    site = find_expert_sites(double("gpt_oss"))[0]
    h = torch.randn(5, WIDTH, dtype=torch.float64)
    bias = site.down(h, 2) - site.down(h, 2, bias=False)
    torch.testing.assert_close(bias, site.experts.down_proj_bias[2].expand(5, -1))
    assert bias.abs().max() > 0.1


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "hunyuan_v1_moe"])
@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": "all-linear"},
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
    ],
    ids=["attention", "all-linear", "experts"],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_a_peft_wrapped_model_has_the_same_sites(family, adapter):
    plain = find_expert_sites(FAMILIES[family]())
    wrapped = get_peft_model(FAMILIES[family](), LoraConfig(r=EXPERTS, **adapter))
    sites = find_expert_sites(wrapped)
    assert [(s.name, s.layer, s.width) for s in sites] == [
        (s.name, s.layer, s.width) for s in plain
    ]
    for site, other in zip(sites, plain, strict=True):
        torch.testing.assert_close(site.router_row(1), other.router_row(1), rtol=0, atol=0)
        torch.testing.assert_close(site.expert(2).down, other.expert(2).down, rtol=0, atol=0)
    calls = []
    sites[0].experts.register_forward_hook(lambda *_: calls.append(1))
    wrapped(input_ids=torch.arange(3, 9).view(1, 6))
    assert calls == [1]


def test_a_dense_model_is_refused():
    with pytest.raises(
        PomonaError, match=r"LlamaForCausalLM has no mixture-of-experts layer.*recon"
    ):
        find_expert_sites(llama())
    wrapped = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(PomonaError, match="LlamaForCausalLM has no mixture"):
        find_expert_sites(wrapped)


def test_llama4_is_refused():
    with pytest.raises(PomonaError, match=r"Llama4ForCausalLM.*experts\(tokens·E, D\).*Mixtral"):
        find_expert_sites(llama4())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda experts: setattr(experts, "has_gate", False), "no gate projection"),
        (lambda experts: setattr(experts, "has_post_expert_norm", True), "normalise their output"),
        (lambda experts: experts.to(torch.float8_e4m3fn), "quantised to torch.float8_e4m3fn"),
    ],
)
def test_experts_that_are_no_plain_gated_ffn_are_refused(change, words):
    model = FAMILIES["mixtral"]()
    change(model.model.layers[1].mlp.experts)
    with pytest.raises(PomonaError, match=words):
        find_expert_sites(model)
