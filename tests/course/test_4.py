"""Tests of exercise 4, the loss: kl_k3, token_weights and policy_loss.

Expected values come from three places: by hand; from `term` and `weight` below, which treat one token at a time in
plain floats, slopes included; and from every sequence of two tokens out of three, which makes a batch an expectation.
"""
import contextlib
import itertools
import math
from typing import NamedTuple

import pytest
import torch

LOSSES = ["grpo", "dapo", "dr_grpo"]
# Probabilities of three tokens under the policy and under the reference.
P, Q = [0.5, 0.3, 0.2], [0.1, 0.3, 0.6]


# -------------------------------------------------------------------------------------------------------------- oracle


def estimate(rule, p, q):
    """(KL estimate of one token, its slope in p) for log-probs p of the policy and q of the reference."""
    if rule == "k2":
        return (q - p) ** 2 / 2, p - q
    return math.exp(q - p) - (q - p) - 1, 1 - math.exp(q - p)


def term(rule, p, old, q, advantage, *, beta, low, high):
    """(objective of one token, its slope in p, its KL, whether a clip cuts its gradient)."""
    ratio = math.exp(p - old)
    value, slope, is_cut = ratio * advantage, ratio * advantage, False
    if advantage > 0 and ratio > 1 + high:
        value, slope, is_cut = (1 + high) * advantage, 0.0, True
    elif advantage < 0 and ratio < 1 - low:
        value, slope, is_cut = (1 - low) * advantage, 0.0, True
    elif advantage < 0 and ratio > 3 and rule == "dual_clip":
        value, slope, is_cut = 3 * advantage, 0.0, True
    kl, kl_slope = estimate(rule, p, q)
    if rule == "unbiased_kl":
        kl, kl_slope = ratio * kl, ratio * kl + ratio * kl_slope
    return value - beta * kl, slope - beta * kl_slope, kl, is_cut


def weight(rule, loss, length, *, num_rollouts, num_tokens, max_action_tokens):
    """Weight of each action token of a rollout of this length."""
    if loss == "grpo":
        return 1 / num_rollouts / (math.sqrt(length) if rule == "sqrt_length" else length)
    return 1 / num_tokens if loss == "dapo" else 1 / num_rollouts / max_action_tokens


def close(got, wanted, rel=2e-5):
    """Equal but for the rounding of float32."""
    got, wanted = torch.as_tensor(got).double(), torch.as_tensor(wanted).double()
    return got.shape == wanted.shape and bool((got - wanted).abs().max() <= rel * wanted.abs().max() + 1e-7)


# ------------------------------------------------------------------------------------------------------------------ KL


@pytest.mark.core
def test_kl_of_single_tokens(student, rule):
    # p = 0.5, q = 0.1: 0.2 + ln 5 - 1; or (ln 5)² / 2. p = 0.2, q = 0.6: 3 - ln 3 - 1; or (ln 3)² / 2.
    expected = [1.295145, 0.0, 0.603474] if rule == "k2" else [0.809438, 0.0, 0.901388]
    got = student.kl_k3(torch.tensor(P).log(), torch.tensor(Q).log())
    assert close(got, expected), f"KL of tokens with p = {P}, q = {Q}: got {got.tolist()}"
    logps = torch.linspace(-8, 0, 33)
    got = student.kl_k3(logps[:, None], logps[None, :])  # (33, 33)
    assert got.min() >= -1e-6, "an estimate is negative"
    assert got.diagonal().abs().max() <= 1e-6, "two policies that agree have a KL"
    assert (got + torch.eye(33)).min() > 1e-3, "two policies that differ have none"


# Every sequence of two tokens out of three, each as often as the policy samples it: the batch is the expectation.
PAIRS = list(itertools.product(range(3), repeat=2))


def laws(seed):
    """Logits (4, 3) of a policy of two tokens: of the first, and of the second after token 0, 1, 2. float64."""
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_pairs(log_probs):
    """Log-probs (9, 2) of all sequences, float32."""
    return torch.stack([torch.stack([log_probs[0, a], log_probs[1 + a, b]]) for a, b in PAIRS]).float()


def chances(log_probs):
    """Probability of every sequence (9, 2), the same for both tokens, without a gradient: weights of an expectation."""
    return torch.exp(of_pairs(log_probs.detach()).sum(dim=1, keepdim=True)).expand(9, 2)


def test_kl_of_all_sequences_is_the_divergence(student, rule):
    p, q = laws(1).log_softmax(dim=1), laws(2).log_softmax(dim=1)
    wanted = 0.0
    for (a, b), (chance, _) in zip(PAIRS, chances(p).tolist()):
        ratios = [(p[0, a] - q[0, a]).item(), (p[1 + a, b] - q[1 + a, b]).item()]
        wanted += chance * sum(x * x / 2 if rule == "k2" else x for x in ratios)  # k3 is unbiased, k2 is not
    loss, sums = student.policy_loss(of_pairs(p), torch.zeros(9), chances(p), ref_logps=of_pairs(q), beta=0.5)
    assert close(sums["kl"], wanted), "the KL over all sequences, each weighted by its probability under the policy"
    assert close(loss, 0.5 * wanted), "without advantages the loss is beta · KL"


@pytest.mark.core
def test_gradient_of_the_kl_over_all_sequences(student, rule):
    logits = laws(1).requires_grad_()
    p, q = logits.log_softmax(dim=1), laws(2).log_softmax(dim=1)
    visits = torch.cat([torch.ones(1), p[0].exp().detach()])  # (4,): how often each distribution is sampled from
    # On policy k3 has the gradient of KL(reference || policy); k2 and ratio · k3 that of KL(policy || reference).
    if rule in ("k2", "unbiased_kl"):
        divergence = (p.exp() * (p - q)).sum(dim=1)
    else:
        divergence = (q.exp() * (q - p)).sum(dim=1)
    [wanted] = torch.autograd.grad(2.0 * (visits * divergence).sum(), logits, retain_graph=True)
    loss, _ = student.policy_loss(of_pairs(p), torch.zeros(9), chances(p), ref_logps=of_pairs(q), beta=2.0)
    [got] = torch.autograd.grad(loss, logits)
    assert close(got, wanted), "the gradient of beta · KL, with respect to the policy's logits"


# ------------------------------------------------------------------------------------------------------------- weights

# 4, 1 and 0 action tokens: a rollout without any counts as a rollout.
RAGGED = torch.tensor([[0, 1, 1, 0, 1, 1], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
COUNTS = {"num_rollouts": 3, "num_tokens": 5, "max_action_tokens": 10}


@pytest.mark.core
@pytest.mark.parametrize("loss", LOSSES)
def test_weights_of_ragged_rollouts_by_hand(student, rule, loss):
    # grpo: a third a rollout, shared by its tokens. dapo: a fifth a token. dr_grpo: 3 rollouts of at most 10.
    one, other = {"grpo": (1 / 12, 1 / 3), "dapo": (1 / 5, 1 / 5), "dr_grpo": (1 / 30, 1 / 30)}[loss]
    if rule == "sqrt_length" and loss == "grpo":
        one = 1 / 6  # a third by the root of 4
    got = student.token_weights(RAGGED, loss, **COUNTS)
    assert got.dtype == torch.float32
    assert close(got, [[0, one, one, 0, one, one], [0, 0, other, 0, 0, 0], [0] * 6]), f"{loss}: got {got.tolist()}"


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_are_of_the_whole_update_and_not_of_the_micro_batch(student, rule, loss):
    counts = {"num_rollouts": 40, "num_tokens": 170, "max_action_tokens": 12}
    for mask in (RAGGED, RAGGED[:1], RAGGED[1:2], torch.cat([RAGGED, torch.zeros_like(RAGGED)], dim=1)):
        wanted = [[weight(rule, loss, sum(row), **counts) if is_action else 0.0 for is_action in row]
                  for row in mask.tolist()]
        got = student.token_weights(mask, loss, **counts)
        assert close(got, wanted), f"{loss}: {len(mask)} rows of {mask.shape[1]} tokens, 40 rollouts in the update"


@pytest.mark.parametrize("loss", LOSSES)
def test_rollouts_without_action_tokens_weigh_nothing(student, loss):
    got = student.token_weights(torch.zeros(2, 3).bool(), loss, num_rollouts=2, num_tokens=0, max_action_tokens=4)
    assert got.tolist() == [[0.0] * 3] * 2, f"{loss}: an update without any action token"


@pytest.mark.parametrize("loss", LOSSES)
def test_the_mask_is_not_changed(student, loss):
    mask = RAGGED.clone()
    student.token_weights(mask, loss, **COUNTS)
    numbers = RAGGED.float()
    with contextlib.suppress(TypeError, RuntimeError, IndexError):  # a function of bools alone is as good
        student.token_weights(numbers, loss, **COUNTS)
    assert mask.equal(RAGGED) and numbers.equal(RAGGED.float()), "whoever counts the mask later counts something else"


# ---------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.core
def test_clipping_of_one_token_by_hand(student, rule):
    far = (6.0, 0.0, 1) if rule == "dual_clip" else (8.0, 8.0, 0)
    for advantage, ratio, wanted in [  # wanted: loss, gradient, clipped; clips at 0.9 and 1.3
            (2.0, 1.0, (-2.0, -2.0, 0)),
            (2.0, 1.25, (-2.5, -2.5, 0)),
            (2.0, 1.5, (-2.6, 0.0, 1)),  # good, and probable enough: no more to gain
            (2.0, 4.0, (-2.6, 0.0, 1)),
            (2.0, 0.5, (-1.0, -1.0, 0)),  # good, but less probable than before: the way back stays open
            (-2.0, 0.95, (1.9, 1.9, 0)),
            (-2.0, 0.85, (1.8, 0.0, 1)),  # bad, and improbable enough
            (-2.0, 0.5, (1.8, 0.0, 1)),
            (-2.0, 1.5, (3.0, 3.0, 0)),  # bad, but more probable than before: the full penalty
            (-2.0, 4.0, far)]:
        old = torch.tensor([[math.log(0.2)]])
        logps = (old + math.log(ratio)).requires_grad_()
        loss, sums = student.policy_loss(logps, torch.tensor([advantage]), torch.ones(1, 1), old_logps=old,
                                         clip_low=0.1, clip_high=0.3)
        loss.backward()
        got = (loss.item(), logps.grad.item(), float(sums["clipped"]))
        assert got == pytest.approx(wanted, abs=1e-5), f"advantage {advantage}, ratio {ratio}: loss, gradient, clipped"


@pytest.mark.core
def test_a_batch_that_is_used_once_has_the_gradient_of_its_log_probs(student):
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -0.5]], requires_grad=True)
    loss, sums = student.policy_loss(logps, torch.tensor([2.0, -1.0]), torch.tensor([[0.25, 0.25], [0.5, 0.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(-0.5, abs=1e-6), "-(0.25 · 2 + 0.25 · 2 - 0.5 · 1)"
    assert close(logps.grad, [[-0.5, -0.5], [0.5, 0.0]]), "minus weight times the rollout's advantage"
    assert (float(sums["kl"]), float(sums["clipped"])) == (0.0, 0.0), "nothing was clipped, and there is no reference"


@pytest.mark.core
def test_gradient_of_the_expected_reward(student):
    """On policy, over all sequences, the gradient is that of the expected reward: p is inside the derivative there."""
    logits = laws(3).requires_grad_()
    log_probs = logits.log_softmax(dim=1)
    rewards = torch.tensor([1.0, 0.0, 0.25, 0.0, -0.5, 2.0, 0.0, 0.75, 0.125])
    expected = sum((log_probs[0, a] + log_probs[1 + a, b]).exp() * r for (a, b), r in zip(PAIRS, rewards.tolist()))
    [wanted] = torch.autograd.grad(-expected, logits, retain_graph=True)
    baseline = expected.item()  # changes nothing in expectation
    loss, _ = student.policy_loss(of_pairs(log_probs), rewards - baseline, chances(log_probs))
    [got] = torch.autograd.grad(loss, logits)
    assert wanted.abs().max() > 0.05 and close(got, wanted), "descent does not climb the expected reward"


class Sample(NamedTuple):
    """A rollout: log-probs of its action tokens under three policies, and how many observations follow each."""
    logps: list
    old: list
    ref: list
    advantage: float


def samples():
    """Five rollouts of 6, 3, 5, 1 and 0 action tokens; ratios from 0.2 to 5."""
    rng = torch.Generator().manual_seed(4)
    rollouts = []
    for length, advantage in zip([6, 3, 5, 1, 0], [1.3, -0.4, -0.9, 0.6, 2.0]):
        old, ref = ((-3 * torch.rand(length, generator=rng) - 2).tolist() for _ in range(2))
        logps = [o + d for o, d in zip(old, (1.6 * (2 * torch.rand(length, generator=rng) - 1)).tolist())]
        rollouts.append(Sample(logps, old, ref, advantage))
    return rollouts


COUNTS_OF_SAMPLES = {"num_rollouts": 5, "num_tokens": 15, "max_action_tokens": 8}


def tensors(rollouts, filler, extra):
    """A micro-batch (logps, old, ref, advantages, mask); after every second action token stands an observation."""
    width = max(len(s.logps) + len(s.logps) // 2 for s in rollouts) + extra
    mask = torch.zeros(len(rollouts), width, dtype=torch.bool)
    values = torch.full((3, len(rollouts), width), filler)
    for b, sample in enumerate(rollouts):
        for t in range(len(sample.logps)):
            mask[b, t + t // 2] = True
            values[:, b, t + t // 2] = torch.tensor([sample.logps[t], sample.old[t], sample.ref[t]])
    return *values, torch.tensor([s.advantage for s in rollouts]), mask


def update(student, rule, loss, pieces, *, filler=0.0, extra=1, beta=0.3, low=0.2, high=0.28):
    """(loss, kl, clipped) and the gradient of every action token, of an update that is cut into pieces."""
    everything = samples()
    totals, gradients = torch.zeros(3), {}
    for piece in pieces:
        logps, old, ref, advantages, mask = tensors([everything[i] for i in piece], filler, extra)
        logps.requires_grad_()
        weights = torch.zeros(mask.shape)
        for row, is_action in zip(weights, mask):
            row[is_action] = weight(rule, loss, max(1, int(is_action.sum())), **COUNTS_OF_SAMPLES)
        given = weights.clone()
        value, sums = student.policy_loss(logps, advantages, weights, old_logps=old, ref_logps=ref, beta=beta,
                                          clip_low=low, clip_high=high)
        value.backward()
        assert weights.equal(given), "the weights are needed again for other metrics"
        assert (logps.grad[~mask] == 0).all(), "padding or an observation has a gradient"
        totals += torch.stack([torch.as_tensor(x).detach().float() for x in (value, sums["kl"], sums["clipped"])])
        gradients |= {i: row[kept] for i, row, kept in zip(piece, logps.grad, mask)}
    return totals, torch.cat([gradients[i] for i in range(5)])


def by_loops(rule, loss, *, beta=0.3, low=0.2, high=0.28):
    """The same from `term` and `weight`."""
    totals, slopes = [0.0, 0.0, 0.0], []
    for sample in samples():
        for p, old, q in zip(sample.logps, sample.old, sample.ref):
            w = weight(rule, loss, len(sample.logps), **COUNTS_OF_SAMPLES)
            objective, slope, kl, is_cut = term(rule, p, old, q, sample.advantage, beta=beta, low=low, high=high)
            totals = [total + w * x for total, x in zip(totals, (-objective, kl, is_cut))]
            slopes.append(-w * slope)
    return totals, slopes


@pytest.mark.parametrize("loss", LOSSES)
def test_a_whole_update_token_by_token(student, rule, loss):
    totals, gradient = update(student, rule, loss, [[0, 1, 2, 3, 4]])
    wanted, slopes = by_loops(rule, loss)
    assert close(totals[0], wanted[0]), f"{loss}: the loss"
    assert close(totals[1], wanted[1]), f"{loss}: the KL, weighted as the loss is"
    assert close(totals[2], wanted[2]), f"{loss}: the clipped share, weighted as the loss is"
    assert close(gradient, slopes), f"{loss}: the gradient of the action tokens"


@pytest.mark.parametrize("loss", LOSSES)
def test_an_update_in_micro_batches_is_the_same(student, rule, loss):
    wanted, slopes = update(student, rule, loss, [[0, 1, 2, 3, 4]])
    assert slopes.abs().max() > 0, f"{loss}: no gradient at all"
    for pieces, extra in [([[0], [1], [2], [3], [4]], 0), ([[0, 1, 2], [3, 4]], 0), ([[4, 2, 0, 3, 1]], 9)]:
        totals, gradient = update(student, rule, loss, pieces, extra=extra)
        assert close(totals, wanted), f"{loss}: rollouts {pieces}, {extra} columns of padding: loss, KL, clipped"
        assert close(gradient, slopes), f"{loss}: rollouts {pieces}, {extra} columns of padding: gradient"


@pytest.mark.parametrize("filler", [math.inf, -math.inf, math.nan, -1e4])
def test_what_stands_in_padding_does_not_matter(student, rule, filler):
    wanted, slopes = update(student, rule, "grpo", [[0, 1, 2], [3, 4]])
    totals, gradient = update(student, rule, "grpo", [[0, 1, 2], [3, 4]], filler=filler)
    assert close(totals, wanted), f"padding of {filler} in place of 0: loss, KL, clipped"
    assert close(gradient, slopes) and slopes.abs().max() > 0, f"padding of {filler} in place of 0: gradient"


def test_beta_scales_the_kl_in_the_loss_and_not_in_the_metric(student, rule):
    without, with_kl, twice = (update(student, rule, "grpo", [[0, 1, 2, 3, 4]], beta=beta)[0] for beta in (0.0, 0.3, 0.6))
    assert without[1] > 0.1 and close(without[1:], with_kl[1:]), "KL and clipped share do not depend on beta"
    assert close(with_kl[0] - without[0], 0.3 * without[1]), "with beta = 0.3 the loss is higher by 0.3 KL"
    assert close(twice[0] - without[0], 0.6 * without[1]), "with beta = 0.6 it is higher by 0.6 KL"
