from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

import octavo
from octavo import reference
from octavo.kernels.moe import route
from octavo.testing import assert_accurate, check_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_loops(
    logits,
    top_k,
    scoring_func="softmax",
    renormalize=True,
    correction_bias=None,
    num_expert_group=None,
    topk_group=None,
    routed_scaling_factor=1.0,
    num_shared_experts=0,
):
    """Routing of finite logits in float64, an expert at a time."""
    weights, ids = [], []
    for row in logits.double().cpu().numpy():
        exponentials = np.exp(row - row.max())
        scores = sigmoid(row) if scoring_func == "sigmoid" else exponentials / exponentials.sum()
        choice = row if correction_bias is None else scores + correction_bias.double().cpu().numpy()
        allowed = list(range(len(row)))
        if num_expert_group is not None:
            size = len(row) // num_expert_group
            groups = [sorted(choice[g * size : (g + 1) * size], reverse=True) for g in range(num_expert_group)]
            of_group = [g[0] if correction_bias is None else sum(g[:2]) for g in groups]
            best = sorted(range(num_expert_group), key=lambda g: (-of_group[g], g))[:topk_group]
            allowed = [e for e in allowed if e // size in best]
        chosen = sorted(allowed, key=lambda e: (-choice[e], e))[:top_k]
        weight = scores[chosen]
        if renormalize:
            weight = weight / weight.sum()
        weights.append([*(weight * routed_scaling_factor), *[1.0] * num_shared_experts])
        ids.append(chosen + list(range(len(row), len(row) + num_shared_experts)))
    width = top_k + num_shared_experts
    return torch.tensor(weights).view(-1, width).double(), torch.tensor(ids).view(-1, width).int()


def check(logits, top_k, **options):
    """Ids to the bit, weights by the rule, where plain is the formula in fp32, of the logits as they are."""
    weights, ids = octavo.moe_route(logits, top_k, **options)
    exact, expected = by_loops(logits, top_k, **options)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    assert weights.is_contiguous() and ids.is_contiguous()
    assert torch.equal(ids.cpu(), expected)
    plain = torch.ones_like(exact, dtype=torch.float32)
    x = logits.float().cpu()
    scores = x.sigmoid() if options.get("scoring_func") == "sigmoid" else x.softmax(-1)
    chosen = scores.gather(1, expected[:, :top_k].long())
    if options.get("renormalize", True):
        chosen = chosen / chosen.sum(-1, keepdim=True)
    plain[:, :top_k] = chosen * options.get("routed_scaling_factor", 1.0)
    assert_accurate(weights.cpu(), exact, plain)


MIXTRAL = dict(renormalize=True)
QWEN2 = dict(renormalize=False)
DEEPSEEK_V2 = dict(renormalize=False, num_expert_group=8, topk_group=3, routed_scaling_factor=16.0)
DEEPSEEK_V3 = dict(scoring_func="sigmoid", num_expert_group=8, topk_group=4, routed_scaling_factor=2.5)


@pytest.mark.parametrize(
    ("experts", "top_k", "options"),
    [
        (8, 2, MIXTRAL),
        (60, 4, QWEN2),
        (64, 6, QWEN2),
        (128, 8, MIXTRAL),
        (160, 6, DEEPSEEK_V2 | dict(num_shared_experts=2)),
        (256, 8, DEEPSEEK_V3 | dict(bias=True, num_shared_experts=1)),
        (256, 8, DEEPSEEK_V3 | dict(bias=True, renormalize=False)),
        (384, 8, dict(scoring_func="sigmoid", bias=True, num_expert_group=1, topk_group=1)),
        (512, 10, MIXTRAL),
        (512, 22, dict(bias=True, num_expert_group=64, topk_group=9)),
        (1, 1, QWEN2),
        (3, 3, dict(scoring_func="sigmoid")),
        (6, 2, dict(num_expert_group=6, topk_group=3, bias=True)),
        (9, 5, dict(num_expert_group=3, topk_group=2, bias=True, scoring_func="sigmoid")),
    ],
)
@pytest.mark.parametrize("tokens", [1, 33])
def test_routing_of_models(device, dtype, tokens, experts, top_k, options):
    logits = (2 * torch.randn(tokens, experts, device=device)).to(dtype)
    options = dict(options)
    if options.pop("bias", False):
        options["correction_bias"] = torch.randn(experts, device=device) / 10
    check(logits, top_k, **options)


@given(
    tokens=st.integers(0, 40),
    groups=st.integers(1, 7),
    size=st.integers(1, 9),
    data=st.data(),
    renormalize=st.booleans(),
    scoring_func=st.sampled_from(["softmax", "sigmoid"]),
    num_shared_experts=st.integers(0, 2),
)
def test_ties_go_to_the_lower_id(tokens, groups, size, data, renormalize, scoring_func, num_shared_experts):
    topk_group = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, topk_group * size))
    logits = torch.randint(-2, 3, (tokens, groups * size + 3), device=DEVICE).half()[:, :-3]  # rows with a gap
    logits[logits == 0] *= -1.0  # which is no other number
    check(
        logits,
        top_k,
        renormalize=renormalize,
        scoring_func=scoring_func,
        num_expert_group=groups,
        topk_group=topk_group,
        num_shared_experts=num_shared_experts,
    )
    check(logits, top_k, renormalize=renormalize, scoring_func=scoring_func)


def test_zeros_of_either_sign_are_equal(device):
    logits = torch.tensor([[-0.0, 0.0, -0.0, 0.0], [0.0, -0.0, 1.0, -0.0]], device=device)
    _, ids = octavo.moe_route(logits, 3)
    assert ids.tolist() == [[0, 1, 2], [2, 0, 1]]


def test_a_bias_chooses_and_does_not_weigh(device):
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]], device=device)
    bias = torch.tensor([-9.0, 0.0, 0.0, 9.0], device=device)
    weights, ids = octavo.moe_route(logits, 2, scoring_func="sigmoid", renormalize=False, correction_bias=bias)
    assert ids.tolist() == [[3, 1]]
    torch.testing.assert_close(weights[0], torch.tensor([0.0, 2.0], device=device).sigmoid())


def test_far_logits_are_told_apart(device):
    """Their softmax is 0 for all but one, and their sigmoid 1 for some: logits are compared, and weigh exactly."""
    logits = torch.tensor([[-300.0, -200.0, 500.0, -250.0, 400.0]], device=device)
    for scoring_func in ("softmax", "sigmoid"):
        weights, ids = octavo.moe_route(logits, 4, scoring_func=scoring_func)
        assert ids.tolist() == [[2, 4, 1, 3]]
        assert weights.isfinite().all() and weights.sum() == 1
    within = dict(num_expert_group=5, topk_group=1)
    weights, _ = octavo.moe_route(logits[:, [0, 0, 0, 0, 0]], 1, **within)
    assert weights.tolist() == [[1.0]]


def test_infinities_and_nan(device, dtype):
    """Ids stay valid and distinct; a NaN makes the weights of its row NaN, and no others."""
    inf, nan = torch.inf, torch.nan
    rows = [
        ([1.0, nan, 2.0, 0.0], [2, 0, 3], [nan] * 3),
        ([nan, nan, nan, nan], [0, 1, 2], [nan] * 3),
        ([nan, -inf, -inf, -inf], [0, 1, 2], [nan] * 3),
        ([-inf, 0.0, -inf, 0.0], [1, 3, 0], [0.5, 0.5, 0.0]),
        ([0.0, 0.0, -inf, 0.0], [0, 1, 3], [1 / 3] * 3),
        ([inf, 0.0, 1.0, 2.0], [0, 3, 2], [nan] * 3),
        ([-inf, -inf, -inf, -inf], [0, 1, 2], [nan] * 3),
    ]
    logits = torch.tensor([logits for logits, _, _ in rows], device=device, dtype=dtype)
    weights, ids = octavo.moe_route(logits, 3)
    assert ids.tolist() == [ids for _, ids, _ in rows]
    expected = torch.tensor([weights for _, _, weights in rows], device=device)
    torch.testing.assert_close(weights, expected, equal_nan=True)
    options = dict(renormalize=False, scoring_func="sigmoid", num_shared_experts=1)
    weights, ids = octavo.moe_route(logits, 3, **options)
    assert ids[:, :3].tolist() == [ids for _, ids, _ in rows] and (ids[:, 3] == 4).all()
    assert weights[:3, :3].isnan().all() and weights[3:, :3].isfinite().all() and (weights[:, 3] == 1).all()
    assert weights[5, 0] == 1 and (weights[6, :3] == 0).all()
    weights, _ = octavo.moe_route(logits[6:], 3, scoring_func="sigmoid")
    assert (weights == 0).all(), "nothing divided by nothing is nothing"


def test_nan_in_a_group_counts_as_the_least(device):
    nan = torch.nan
    logits = torch.tensor([[nan, nan, 3.0, -5.0, 1.0, 2.0]], device=device)
    for bias in (None, torch.zeros(6, device=device)):
        _, ids = octavo.moe_route(logits, 3, correction_bias=bias, num_expert_group=3, topk_group=2)
        # By its best expert the second group is best; softmax of a NaN is NaN for all, so with a bias all are equal.
        assert ids.tolist() == ([[2, 5, 4]] if bias is None else [[0, 1, 2]])
    bias = torch.tensor([nan, 9.0, 0.0, 0.0, 0.0, 0.0], device=device)
    options = dict(scoring_func="sigmoid", correction_bias=bias, num_expert_group=3, topk_group=2)
    weights, ids = octavo.moe_route(torch.zeros(1, 6, device=device), 4, **options)
    assert ids.tolist() == [[2, 3, 4, 5]] and weights.tolist() == [[0.25] * 4]


def test_no_tokens(device):
    weights, ids = octavo.moe_route(torch.zeros(0, 8, device=device), 2, num_shared_experts=1)
    assert weights.shape == ids.shape == (0, 3)


def routed_by(router, options, logits):
    """What a router of transformers makes of these logits, by descending weight."""
    module = router(SimpleNamespace(hidden_size=logits.shape[1], **options))
    module.weight.data = torch.eye(logits.shape[1])
    if "bias" in options:
        module.e_score_correction_bias.data = options["bias"]
    with torch.no_grad():
        _, weights, ids = module(logits)
    order = weights.sort(dim=-1, descending=True).indices
    return weights.gather(1, order), ids.gather(1, order)


def test_reference_against_mixtral():
    logits = torch.randn(50, 8)
    weights, ids = routed_by(MixtralTopKRouter, dict(num_experts_per_tok=2, num_local_experts=8), logits)
    mine, my_ids = reference.moe.moe_route(logits, 2, "softmax", True, None, None, None, 1.0, 0)
    assert torch.equal(my_ids, ids.int())
    torch.testing.assert_close(mine, weights)


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_reference_against_deepseek_v2(method):
    logits = torch.randn(50, 60)
    options = dict(num_experts_per_tok=6, num_experts=60, routed_scaling_factor=16.0, topk_method=method)
    weights, ids = routed_by(DeepseekV2TopkRouter, options | dict(n_group=6, topk_group=2), logits)
    groups = (6, 2) if method == "group_limited_greedy" else (None, None)
    mine, my_ids = reference.moe.moe_route(logits, 6, "softmax", False, None, *groups, 16.0, 0)
    assert torch.equal(my_ids, ids.int())
    torch.testing.assert_close(mine, weights)


@pytest.mark.parametrize("renormalize", [True, False])
def test_reference_against_deepseek_v3(renormalize):
    logits, bias = torch.randn(50, 48), torch.randn(48) / 5
    options = dict(num_experts_per_tok=5, num_local_experts=48, routed_scaling_factor=2.5, n_group=4, topk_group=2)
    weights, ids = routed_by(DeepseekV3TopkRouter, options | dict(norm_topk_prob=renormalize, bias=bias), logits)
    mine, my_ids = reference.moe.moe_route(logits, 5, "sigmoid", renormalize, bias, 4, 2, 2.5, 0)
    order = mine.sort(dim=-1, descending=True).indices
    assert torch.equal(my_ids.gather(1, order), ids.int())
    torch.testing.assert_close(mine.gather(1, order), weights)
    assert not torch.equal(order, torch.arange(5).expand(50, 5)), "the bias has a say in the order"


@pytest.mark.parametrize("options", [MIXTRAL, DEEPSEEK_V3 | dict(num_shared_experts=1)])
def test_reference_against_the_loops(options):
    logits, bias = torch.randn(20, 48), None
    if options is not MIXTRAL:
        bias = torch.randn(48) / 10
    names = "scoring_func", "renormalize", "correction_bias", "num_expert_group", "topk_group"
    defaults = dict(zip(names, ("softmax", True, None, None, None), strict=True))
    options = defaults | dict(routed_scaling_factor=1.0, num_shared_experts=0) | options | dict(correction_bias=bias)
    weights, ids = reference.moe.moe_route(logits, 6, **options)
    exact, expected = by_loops(logits, 6, **options)
    assert torch.equal(ids, expected)
    torch.testing.assert_close(weights.double(), exact, rtol=1e-5, atol=1e-6)


def test_opcheck_and_compile(device):
    logits, bias = torch.randn(4, 12, device=device), torch.randn(12, device=device)
    check_op("moe_route", octavo.moe_route, (logits, 2, "softmax", True, None, None, None, 1.0, 0), logits, 2)
    options = dict(scoring_func="sigmoid", correction_bias=bias, num_expert_group=3, topk_group=2, num_shared_experts=1)
    args = (logits, 2, "sigmoid", True, bias, 3, 2, 1.0, 1)
    check_op("moe_route", octavo.moe_route, args, logits, 2, **options)


@pytest.mark.gpu
def test_graph_capture_and_replay():
    logits = torch.randn(70, 128, device="cuda", dtype=torch.bfloat16)
    octavo.moe_route(logits, 8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights, ids = octavo.moe_route(logits, 8)
    logits.copy_(torch.randn_like(logits))
    graph.replay()
    expected = octavo.moe_route(logits, 8)
    assert torch.equal(weights, expected[0]) and torch.equal(ids, expected[1])


@pytest.mark.gpu
def test_rows_beyond_int32():
    logits = torch.empty(2, 2**31 + 64, device="cuda", dtype=torch.float16)[:, :64]
    logits.normal_()
    weights, ids = octavo.moe_route(logits, 6)
    expected = octavo.moe_route(logits.contiguous(), 6)
    assert torch.equal(weights, expected[0]) and torch.equal(ids, expected[1])


@pytest.mark.gpu
def test_a_row_does_not_depend_on_the_others():
    logits = torch.randn(8192, 256, device="cuda", dtype=torch.bfloat16)
    weights, ids = octavo.moe_route(logits, 8)
    for rows in (slice(0, 1), slice(77, 140), slice(8000, None)):
        alone = octavo.moe_route(logits[rows], 8)
        assert torch.equal(weights[rows], alone[0]) and torch.equal(ids[rows], alone[1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(router_logits=torch.zeros(2, 12).int()), TypeError, "router_logits: dtype int32 is not accepted"),
        (dict(router_logits=torch.zeros(12)), ValueError, r"router_logits: shape \(12,\) has 1 dimensions; expected 2"),
        (dict(router_logits=torch.zeros(12, 2).t()), ValueError, "router_logits: the last dimension has stride 2"),
        (
            dict(router_logits=torch.zeros(2, 0)),
            ValueError,
            r"router_logits: shape \(2, 0\); expected 1 to 512 experts",
        ),
        (dict(router_logits=torch.zeros(2, 513)), ValueError, r"shape \(2, 513\); expected 1 to 512 experts"),
        (dict(top_k=0), ValueError, r"top_k: 0; expected 1 to the number of experts \(12\)"),
        (dict(top_k=13), ValueError, r"top_k: 13; expected 1 to the number of experts \(12\)"),
        (dict(scoring_func="relu"), ValueError, r"scoring_func: 'relu'; expected one of \('softmax', 'sigmoid'\)"),
        (dict(correction_bias=torch.zeros(12).half()), TypeError, "correction_bias: dtype float16 is not accepted"),
        (dict(correction_bias=torch.zeros(11)), ValueError, r"correction_bias: shape \(11,\); expected \(12,\)"),
        (dict(correction_bias=torch.zeros(24)[::2]), ValueError, r"correction_bias: strides \(2,\)"),
        (dict(correction_bias=torch.zeros(12, device="meta")), ValueError, "correction_bias: on meta"),
        (dict(topk_group=None), ValueError, "num_expert_group: 3, topk_group: None; expected both, or neither"),
        (dict(num_expert_group=None), ValueError, "num_expert_group: None, topk_group: 2; expected both, or neither"),
        (dict(num_expert_group=5), ValueError, "num_expert_group: 5; expected a divisor of the 12 experts"),
        (dict(num_expert_group=0), ValueError, "num_expert_group: 0; expected a divisor"),
        (dict(topk_group=0), ValueError, r"topk_group: 0; expected 1 to num_expert_group \(3\)"),
        (dict(topk_group=4), ValueError, r"topk_group: 4; expected 1 to num_expert_group \(3\)"),
        (dict(top_k=9), ValueError, r"top_k: 9; expected at most 8, the experts of topk_group \(2\) groups"),
        (dict(num_shared_experts=-1), ValueError, "num_shared_experts: -1; expected a number of at least 0"),
    ],
)
def test_errors(change, error, message):
    args = dict(router_logits=torch.zeros(2, 12), top_k=2, num_expert_group=3, topk_group=2)
    with pytest.raises(error, match=message):
        octavo.moe_route(**args | change)


def launches(dtype):
    """Every tile choice that ships, on meta tensors: tests/test_compile.py compiles them."""
    for experts, top_k, groups, shared in (
        (8, 2, None, 0),
        (60, 4, None, 1),
        (128, 8, None, 0),
        (160, 6, 8, 2),
        (256, 8, 8, 0),
        (512, 22, 64, 0),
    ):
        logits = torch.empty(9, experts, device="meta", dtype=dtype)
        for scoring_func, renormalize, biased in (
            ("softmax", True, False),
            ("softmax", False, False),
            ("softmax", False, True),
            ("sigmoid", True, True),
            ("sigmoid", False, False),
        ):
            bias = torch.empty(experts, device="meta") if biased else None
            limits = (None, None) if groups is None else (groups, 3)
            route._moe_route_cuda(logits, top_k, scoring_func, renormalize, bias, *limits, 2.5, shared)
