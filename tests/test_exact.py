"""The loss against every sequence that can be sampled, written out in loops from the papers' formulas; no model.

Three tokens, of which 2 ends a sequence, and at most two tokens: seven sequences. A batch that is an expectation holds every
sequence, or every group of three of them (343), weighted by its probability, so that no estimate is left to chance: what our
functions add up must be the number, and the gradient, that automatic differentiation of the enumerated sum gives.
"""
import itertools
import math
import statistics

import pytest
import torch

from grpo import group_advantages, kl_k3, policy_loss, token_weights

END, G, MAX_TOKENS, BETA = 2, 3, 2, 0.3
SEQUENCES = [(2,), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
REWARDS = [0.25, 1.0, 0.0, 2.0, -0.5, 0.75, 1.0]  # exact in float32
LOSSES = ["grpo", "dr_grpo", "dapo"]
# What the update knows of the policy that sampled: (it is another one, clip_low, clip_high). DAPO's range is asymmetric.
ON_POLICY, NO_CLIP, CLIP = (False, 0.2, 0.28), (True, 1.0, math.inf), (True, 0.2, 0.28)


def table(seed):
    """A policy: logits of the next token (3, 3) at the start, after 0, and after 1. float64: only formulas can differ."""
    return torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def token_logps(laws, sequence):
    """log p of each token of a sequence given those before it."""
    return [laws[0 if t == 0 else 1 + sequence[0]][token] for t, token in enumerate(sequence)]


def padded(laws):
    """The same of all sequences as our functions take them: log-probs (7, 2), 0.0 after the end."""
    return torch.stack([torch.stack([*token_logps(laws, s), torch.zeros((), dtype=torch.float64)][:2]) for s in SEQUENCES])


MASK = torch.tensor([[t < len(s) for t in range(2)] for s in SEQUENCES])  # (7, 2)


@pytest.fixture(scope="module")
def policies():
    """(logits, laws) of the policy that learns, and the laws of the one that sampled and of the reference."""
    logits = table(1).requires_grad_()
    return logits, logits.log_softmax(dim=1), table(2).log_softmax(dim=1), table(3).log_softmax(dim=1)


def chances(laws):
    """Probability of each sequence."""
    return [math.exp(sum(token_logps(laws.tolist(), s))) for s in SEQUENCES]


def test_the_sequences_are_all_there_are(policies):
    assert [sum(chances(laws)) for laws in policies[1:]] == pytest.approx([1.0] * 3, abs=1e-12)


# ------------------------------------------------------------------------------------------------------------------ KL


def exact_kl(p, q):
    """sum over sequences of p log p/q, in nats."""
    return sum(chance * (sum(token_logps(p.tolist(), s)) - sum(token_logps(q.tolist(), s)))
               for chance, s in zip(chances(p), SEQUENCES))


def test_the_estimates_add_up_to_the_divergence_of_the_sequences(policies):
    # Per sequence k3 is not p log p/q, but given its past each token's k3 has the expectation of its k1, and so has the sum.
    _, policy, other, reference = policies
    for p, q in itertools.permutations([policy.detach(), other, reference], 2):
        weights = torch.tensor(chances(p), dtype=torch.float64)[:, None] * MASK
        assert (weights * kl_k3(padded(p), padded(q))).sum().item() == pytest.approx(exact_kl(p, q), abs=1e-12)


def test_the_directions_of_the_divergence_differ(policies):
    _, policy, _, reference = policies
    assert abs(exact_kl(policy, reference) - exact_kl(reference, policy)) > 0.03


def test_the_logged_kl_is_the_divergence_and_the_loss_its_multiple(policies):
    _, policy, _, reference = policies
    logps, weights = padded(policy.detach()), torch.tensor(chances(policy), dtype=torch.float64)[:, None] * MASK
    loss, sums = policy_loss(logps, torch.zeros(7, dtype=torch.float64), weights, ref_logps=padded(reference), beta=BETA)
    assert sums["kl"].item() == pytest.approx(exact_kl(policy, reference), abs=1e-12)
    assert loss.item() == pytest.approx(0.3 * exact_kl(policy, reference), abs=1e-12)


# ----------------------------------------------------------------------------------------------------------- objective


def enumerated(loss, case, laws, old_laws, ref_laws):
    """The objective, its KL and its clipped share: expectations over all groups of G that `old_laws` can sample.

    In loops over groups, sequences and tokens: arXiv 2402.03300 eq. 3 and 4 (`grpo`), 2503.20783 (`dr_grpo`: no std, a
    constant length), 2503.14476 eq. 8 (`dapo`: the mean over all tokens of the group, two clips).
    """
    _, low, high = case
    old, chance, totals = old_laws.tolist(), chances(old_laws), [0.0, 0.0, 0.0]
    ratios = [[(p - o).exp() for p, o in zip(token_logps(laws, s), token_logps(old, s))] for s in SEQUENCES]
    kls = [[(q - p).exp() - (q - p) - 1 for p, q in zip(token_logps(laws, s), token_logps(ref_laws.tolist(), s))]
           for s in SEQUENCES]
    for group in itertools.product(range(len(SEQUENCES)), repeat=G):
        rewards = [REWARDS[i] for i in group]
        scale = 1.0 if loss == "dr_grpo" else statistics.stdev(rewards) + 1e-4
        for i in group:
            advantage = (REWARDS[i] - statistics.mean(rewards)) / scale
            share = {"grpo": 1 / (G * len(SEQUENCES[i])), "dr_grpo": 1 / (G * MAX_TOKENS),
                     "dapo": 1 / sum(len(SEQUENCES[j]) for j in group)}[loss]
            weight = math.prod(chance[j] for j in group) * share
            for ratio, kl in zip(ratios[i], kls[i]):
                cut = advantage > 0 and ratio > 1 + high or advantage < 0 and ratio < 1 - low
                bounded = (1 + high if advantage > 0 else 1 - low) if cut else ratio
                for n, value in enumerate((bounded * advantage - BETA * kl, kl, cut)):
                    totals[n] = totals[n] + weight * value
    return totals


def ours(loss, case, logps, old_logps, ref_logps, chance):
    """The same from our functions: every group is an update of its own. A loss, so the objective's sign is turned."""
    other, low, high = case
    totals = [0.0, 0.0, 0.0]
    for group in itertools.product(range(len(SEQUENCES)), repeat=G):
        rows = list(group)
        [advantages] = group_advantages(torch.tensor([[REWARDS[i] for i in group]]), loss)
        weights = token_weights(MASK[rows], loss, num_rollouts=G, num_tokens=int(MASK[rows].sum()),
                                max_action_tokens=MAX_TOKENS)
        value, sums = policy_loss(logps[rows], advantages, weights, old_logps=old_logps[rows] if other else None,
                                  ref_logps=ref_logps[rows], beta=BETA, clip_low=low, clip_high=high)
        weight = math.prod(chance[i] for i in group)
        totals = [total + weight * part for total, part in zip(totals, (value, sums["kl"], sums["clipped"]))]
    return totals


@pytest.mark.parametrize("case", [ON_POLICY, NO_CLIP, CLIP], ids=["on policy", "no clip", "clip"])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_gradient_and_metrics_are_those_of_the_enumerated_objective(policies, loss, case):
    logits, laws, other_laws, ref_laws = policies
    old_laws = other_laws if case[0] else laws.detach()
    objective, kl, clipped = enumerated(loss, case, laws, old_laws, ref_laws)
    value, our_kl, our_clipped = ours(loss, case, padded(laws), padded(old_laws), padded(ref_laws), chances(old_laws))
    [wanted] = torch.autograd.grad(-objective, logits, retain_graph=True)
    [gradient] = torch.autograd.grad(value, logits, retain_graph=True)
    # Weights and advantages are float32: a relative error of 1e-7 each.
    assert (gradient - wanted).abs().max() <= 1e-6 * wanted.abs().max() and wanted.abs().max() > 0.02
    assert value.item() == pytest.approx(-objective.item(), rel=1e-6) and abs(value.item()) > 0.01
    assert our_kl.item() == pytest.approx(kl.item(), rel=1e-6)
    assert float(our_clipped) == pytest.approx(float(clipped), rel=1e-6)
    assert (clipped > 0.1) == (case == CLIP)


def test_ratios_leave_the_clip_range_on_both_sides_and_stay_within_it(policies):
    _, laws, other_laws, _ = policies
    ratios = (padded(laws) - padded(other_laws)).exp()[MASK]
    assert (ratios < 0.8).sum() >= 2 and (ratios > 1.28).sum() >= 2
    assert ((ratios > 0.8) & (ratios < 1.2)).sum() >= 2


def test_dr_grpo_is_the_gradient_of_the_expected_reward(policies):
    """On policy and without KL, over groups it is (G - 1) / (G · max_action_tokens) of it: its own reward is in the mean."""
    logits, laws, _, _ = policies
    reward = sum(sum(token_logps(laws, s)).exp() * r for s, r in zip(SEQUENCES, REWARDS))  # p inside the derivative
    [wanted] = torch.autograd.grad(reward, logits, retain_graph=True)
    chance, logps, total = chances(laws), padded(laws), 0.0
    for group in itertools.product(range(len(SEQUENCES)), repeat=G):
        rows = list(group)
        [advantages] = group_advantages(torch.tensor([[REWARDS[i] for i in group]]), "dr_grpo")
        weights = token_weights(MASK[rows], "dr_grpo", num_rollouts=G, num_tokens=0, max_action_tokens=MAX_TOKENS)
        total = total + math.prod(chance[i] for i in group) * policy_loss(logps[rows], advantages, weights)[0]
    [gradient] = torch.autograd.grad(total, logits, retain_graph=True)
    assert (gradient + wanted * (3 - 1) / (3 * 2)).abs().max() <= 1e-6 * wanted.abs().max() and wanted.abs().max() > 0.05


# ---------------------------------------------------------------------------------------------------------- invariance


def update_of(groups, loss):
    """(loss, kl, clipped, gradient of the log-probs) of one update; groups: lists of places in SEQUENCES, one a prompt."""
    rows = [i for group in groups for i in group]
    logps = padded(table(1).log_softmax(dim=1))[rows].requires_grad_()  # (P·G, 2)
    advantages = group_advantages(torch.tensor([[REWARDS[i] for i in group] for group in groups]), loss).flatten()
    weights = token_weights(MASK[rows], loss, num_rollouts=len(rows), num_tokens=int(MASK[rows].sum()),
                            max_action_tokens=MAX_TOKENS)
    value, sums = policy_loss(logps, advantages, weights, old_logps=padded(table(2).log_softmax(dim=1))[rows],
                              ref_logps=padded(table(3).log_softmax(dim=1))[rows], beta=BETA)
    value.backward()
    return torch.stack([value.detach(), sums["kl"], sums["clipped"]]), logps.grad


@pytest.mark.parametrize("loss", LOSSES)
def test_the_order_of_prompts_and_of_samples_changes_nothing(loss):
    sums, gradient = update_of([[0, 1, 5], [4, 3, 2]], loss)
    turned_sums, turned = update_of([[2, 4, 3], [5, 0, 1]], loss)
    assert torch.allclose(turned_sums, sums, rtol=1e-6, atol=0)
    places = [4, 5, 3, 1, 2, 0]  # where the rollouts of the first update stand in the second
    assert torch.allclose(turned[places], gradient, rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_that_holds_every_prompt_twice_is_the_same_update(loss):
    sums, gradient = update_of([[0, 1, 5], [4, 3, 2]], loss)
    twice_sums, twice = update_of([[0, 1, 5], [4, 3, 2], [0, 1, 5], [4, 3, 2]], loss)
    assert torch.allclose(twice_sums, sums, rtol=1e-6, atol=0)
    assert torch.allclose(twice[:6] + twice[6:], gradient, rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", [ON_POLICY, CLIP], ids=["on policy", "clip"])
@pytest.mark.parametrize("loss", LOSSES)
def test_equal_rewards_give_a_policy_gradient_of_exactly_zero(loss, case):
    logits = table(1).requires_grad_()
    logps = padded(logits.log_softmax(dim=1))
    advantages = group_advantages(torch.full((1, 7), 0.1 + 0.2), loss).flatten()
    weights = token_weights(MASK, loss, num_rollouts=7, num_tokens=13, max_action_tokens=MAX_TOKENS)
    old_logps = padded(table(2).log_softmax(dim=1)) if case[0] else None
    value, _ = policy_loss(logps, advantages, weights, old_logps=old_logps)
    value.backward()
    assert value.item() == 0.0
    assert logits.grad.tolist() == [[0.0] * 3] * 3


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("filler", [0.0, -math.inf, math.nan])
def test_a_rollout_without_action_tokens_is_counted_and_gives_no_nan(loss, filler):
    logps = torch.tensor([[-1.0, -2.0], [filler, filler]], requires_grad=True)
    mask = torch.tensor([[True, True], [False, False]])
    weights = token_weights(mask, loss, num_rollouts=2, num_tokens=2, max_action_tokens=2)
    value, sums = policy_loss(logps, torch.tensor([0.5, -0.5]), weights, old_logps=logps.detach().clone(),
                              ref_logps=logps.detach().clone(), beta=BETA)
    value.backward()
    share = {"grpo": 0.25, "dr_grpo": 0.25, "dapo": 0.5}[loss]  # of a token: half a rollout of two, one of 2 · 2, of 2
    assert value.item() == -share  # 2 tokens of advantage 0.5
    assert logps.grad.tolist() == [[-share / 2, -share / 2], [0.0, 0.0]]
    assert not sums["clipped"].item()
