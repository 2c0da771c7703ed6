"""GRPO against values worked out by hand and expectations enumerated over small vocabularies; no
model.
"""
import itertools
import math

import pytest
import torch

from grpo import group_advantages, kl_k3, policy_loss, token_logps, token_weights

NONE = torch.tensor([], dtype=torch.int64)  # nothing suppressed
# Two distributions over three tokens. KL(P||Q) = 0.5 ln(0.5/0.1) + 0.3 ln 1 + 0.2 ln(0.2/0.6) and
# KL(Q||P), in nats.
P, Q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.3, 0.6])
KL_PQ, KL_QP = 0.584997, 0.498224


# --------------------------------------------------------------------------------------- advantages


def test_advantages_are_deviations_over_the_sample_standard_deviation():
    # Means 0.25 and 2, deviations squared 0.75 and 2 over G - 1 = 3 and 2: std 0.5 and 1, plus
    # 1e-4.
    assert torch.allclose(group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]])),
                          torch.tensor([[0.75 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001,
                                         -0.25 / 0.5001]]), atol=1e-6)
    assert torch.allclose(group_advantages(torch.tensor([[1.0, 2.0, 3.0]])),
                          torch.tensor([[-0.99990, 0.0, 0.99990]]), atol=1e-6)  # 1 / 1.0001


def test_the_constant_in_the_denominator_is_1e_minus_4():
    # std 0.001 / sqrt(2): the constant is a seventh of it. Rewards are float32, hence the
    # tolerance.
    half = 0.0005 / (0.001 / math.sqrt(2) + 1e-4)
    assert torch.allclose(group_advantages(torch.tensor([[0.001, 0.0]])),
                          torch.tensor([[half, -half]]), atol=1e-4)


def test_dr_grpo_only_subtracts_the_mean():
    assert group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 0.0, 2.0, 0.0]]),
                            "dr_grpo").tolist() == [[0.75, -0.25, -0.25, -0.25],
                                                    [1.0, -1.0, 1.0, -1.0]]


def test_dapo_has_the_advantages_of_grpo():
    rewards = torch.tensor([[1.0, 0.0, 0.5], [0.2, 0.2, 0.9]])
    assert group_advantages(rewards, "dapo").equal(group_advantages(rewards, "grpo"))


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.1 + 0.2, 1 / 3, 1e-3, -0.7, 1e6 + 0.1])
@pytest.mark.parametrize("size", [2, 3, 7, 8])
def test_equal_rewards_get_exactly_zero(reward, size, loss):
    assert group_advantages(torch.full((1, size), reward), loss).tolist() == [[0.0] * size]


def test_float64_rewards_give_float32_advantages():
    assert group_advantages(torch.tensor([[1.0, 0.0]], dtype=torch.float64)).dtype == torch.float32


def test_rewards_are_left_as_they_were():
    rewards = torch.tensor([[0.3, 0.3, 0.3], [1.0, 0.0, 0.0]])
    group_advantages(rewards)
    assert rewards.equal(torch.tensor([[0.3, 0.3, 0.3], [1.0, 0.0, 0.0]]))


@pytest.mark.parametrize("shape", [(4, 1), (1, 1), (4,), (4, 0)])
def test_a_group_of_one_is_refused(shape):
    with pytest.raises(ValueError, match=r"samples >= 2.*--group_size"):
        group_advantages(torch.zeros(shape))


def test_groups_are_rows_so_two_equal_prompts_do_not_merge():
    # Merged, the two groups would have mean 0.5 and four advantages of +-0.87; as rows nobody
    # differs from their group.
    assert group_advantages(torch.tensor([[1.0, 1.0], [0.0, 0.0]])).tolist() == [
        [0.0, 0.0], [0.0, 0.0]]


def test_a_group_does_not_see_the_others():
    alone = group_advantages(torch.tensor([[0.2, 0.9, 0.4]]))
    beside = group_advantages(torch.tensor([[50.0, -3.0, 7.0], [0.2, 0.9, 0.4], [0.0, 0.0, 0.0]]))
    assert beside[1].equal(alone[0])


# -------------------------------------------------------------------------------------- token_logps


def random_case(num_tokens=7, vocabulary=11, width=5):
    """float64, so that a difference of formula cannot hide behind rounding."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, width, generator=rng, dtype=torch.float64, requires_grad=True)
    lm_head = torch.randn(vocabulary, width, generator=rng, dtype=torch.float64, requires_grad=True)
    return hidden, lm_head, torch.tensor([0, 1, 10, 1, 7, 6, 0])[:num_tokens]


def plain_logps(hidden, lm_head, targets, temperature, kept):
    """The same by slicing: only the kept rows of the head take part."""
    log_probs = torch.log_softmax(hidden @ lm_head[kept].T / temperature, dim=1)
    return log_probs[torch.arange(len(targets)),
               torch.tensor([kept.index(t) for t in targets.tolist()])], log_probs


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("suppressed", [[], [2], [2, 3, 9]])
def test_logps_and_gradients_are_those_of_a_softmax_over_the_kept_ids_at_the_temperature(
        temperature, suppressed):
    hidden, lm_head, targets = random_case()
    kept = [i for i in range(11) if i not in suppressed]
    logps, entropy = token_logps(hidden, lm_head, targets, temperature=temperature,
                                 suppressed=torch.tensor(suppressed, dtype=torch.int64), chunk=3)
    expected, log_probs = plain_logps(hidden, lm_head, targets, temperature, kept)
    upstream = torch.linspace(-1, 1, 7, dtype=torch.float64)
    got = torch.autograd.grad((logps * upstream).sum(), (hidden, lm_head))
    wanted = torch.autograd.grad((expected * upstream).sum(), (hidden, lm_head))
    assert torch.allclose(logps, expected, atol=1e-12)
    assert torch.allclose(entropy, -(log_probs.exp() * log_probs).sum(dim=1), atol=1e-12)
    for a, b in zip(got, wanted):
        assert torch.allclose(a, b, atol=1e-12)
    assert got[1][suppressed].abs().sum() == 0


def test_logps_are_float32_and_entropy_has_no_gradient():
    hidden, lm_head, targets = random_case()
    logps, entropy = token_logps(hidden.bfloat16(), lm_head.bfloat16(), targets, temperature=1.0,
                                 suppressed=NONE)
    assert (logps.dtype, entropy.dtype) == (torch.float32, torch.float32)
    assert logps.requires_grad and not entropy.requires_grad


@pytest.mark.parametrize("chunk", [1, 2, 6, 7, 100])
def test_the_chunk_changes_no_value_and_no_gradient(chunk):
    results = []
    for size in (chunk, 7):
        hidden, lm_head, targets = random_case()
        logps, entropy = token_logps(hidden, lm_head, targets, temperature=0.7,
                                     suppressed=torch.tensor([3]), chunk=size)
        (logps * torch.linspace(-1, 1, 7)).sum().backward()
        results.append((logps, entropy, hidden.grad, lm_head.grad))
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-12)  # sums of float64 in another order


def test_no_more_than_a_chunk_of_logits_exists_at_a_time():
    hidden, lm_head, targets = random_case()
    kept = []
    with torch.profiler.profile(record_shapes=True) as profile:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t,
                                                      lambda t: t):
            logps, _ = token_logps(hidden, lm_head, targets, temperature=1.0, suppressed=NONE,
                                   chunk=3)
        logps.sum().backward()
    products = [event.input_shapes[0] for event in profile.events() if event.name == "aten::linear"]
    # logits of the forward pass; once more on the way back
    assert products == [[3, 5], [3, 5], [1, 5]] * 2
    assert all([7, 11] not in event.input_shapes for event in profile.events())
    # hidden, head, targets, suppressed: none has N·V numbers
    assert kept == [(7, 5), (11, 5), (7,), (0,)]


def test_in_bfloat16_the_gradient_of_the_head_is_added_up_over_chunks_in_float32():
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(2048, 16, generator=rng).bfloat16().requires_grad_()
    lm_head = torch.randn(50, 16, generator=rng).bfloat16().requires_grad_()
    targets, upstream = torch.randint(50, (2048,), generator=rng), torch.randn(2048, generator=rng)
    errors = []
    for chunk in (2048, 32):  # one product, and the sum of 64
        gradients = []
        for dtype in (torch.bfloat16, torch.float64):
            logps, _ = token_logps(hidden.to(dtype), lm_head.to(dtype), targets, temperature=1.0,
                                   suppressed=NONE, chunk=chunk)
            gradients.append(torch.autograd.grad((logps * upstream).sum(), lm_head)[0].double())
        errors.append(((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item())
    # added up in bfloat16, it would be twice as far off
    assert errors[0] < 0.005 and errors[1] < 1.1 * errors[0]


@pytest.mark.parametrize("chunk", [2, 7])
def test_the_gradients_are_those_of_finite_differences(chunk):
    hidden, lm_head, targets = random_case()
    def logps(hidden, lm_head):
        return token_logps(hidden, lm_head, targets, temperature=0.7,
                           suppressed=torch.tensor([2, 9]), chunk=chunk)[0]
    assert torch.autograd.gradcheck(logps, (hidden, lm_head))  # float64


def test_a_head_that_is_also_the_embedding_gets_both_gradients():
    _, head, targets = random_case()
    results = []
    for log_probs in (
        lambda h: token_logps(h, head, targets, temperature=1.0, suppressed=NONE, chunk=2)[0],
        lambda h: torch.log_softmax(h @ head.T, dim=1).gather(1, targets[:, None])[:, 0]):
        results.append(torch.autograd.grad(log_probs(head[targets.roll(1)].sin()).sum(), head)[0])
    assert torch.allclose(*results, atol=1e-12)  # float64


def test_no_tokens_give_empty_results_that_can_be_differentiated():
    hidden, lm_head, targets = random_case(num_tokens=0)
    logps, entropy = token_logps(hidden.float(), lm_head.float(), targets, temperature=1.0,
                                 suppressed=NONE)
    assert (logps.shape, entropy.shape, logps.dtype, entropy.dtype) == (
        (0,), (0,), torch.float32, torch.float32)
    logps.sum().backward()
    assert hidden.grad.shape == (0, 5)


@pytest.mark.parametrize("logits, temperature, suppressed, expected", [
    ([0.0, 0.0, 0.0, 0.0], 1.0, [], math.log(4)),
    ([0.0, 0.0, 0.0, 0.0], 1.0, [3], math.log(3)),
    ([5.0, 0.0, 0.0, 0.0], 1.0, [0, 1], math.log(2)),
    # one id is left: certain, and no NaN from 0 · -inf
    ([5.0, 1.0, 2.0, 9.0], 1.0, [0, 1, 2], 0.0),
    ([math.log(9), 0.0, -1e4, -1e4], 1.0, [], 0.325083),  # 0.9 and 0.1
    ([math.log(9), 0.0, -1e4, -1e4], 2.0, [], 0.562335),  # the same flattened to 0.75 and 0.25
])
def test_entropy_is_that_of_the_distribution_that_is_sampled(logits, temperature, suppressed, expected):
    _, entropy = token_logps(
        torch.ones(1, 1), torch.tensor(logits)[:, None], torch.tensor([3]), temperature=temperature,
        suppressed=torch.tensor(suppressed, dtype=torch.int64))
    assert entropy.item() == pytest.approx(expected, abs=1e-5)


# ----------------------------------------------------------------------------------------------- KL


def test_the_two_divergences_differ_so_their_direction_can_be_told():
    assert (P * (P / Q).log()).sum().item() == pytest.approx(KL_PQ, abs=1e-6)
    assert (Q * (Q / P).log()).sum().item() == pytest.approx(KL_QP, abs=1e-6)


def test_the_estimate_has_the_expectation_kl_of_policy_to_reference_under_the_policy():
    assert (P * kl_k3(P.log(), Q.log())).sum().item() == pytest.approx(KL_PQ, abs=1e-6)
    assert (Q * kl_k3(Q.log(), P.log())).sum().item() == pytest.approx(KL_QP, abs=1e-6)


def test_single_estimates_are_literal():
    # p = 0.5, q = 0.1: 0.2 + ln 5 - 1. p = 0.2, q = 0.6: 3 - ln 3 - 1.
    assert kl_k3(P.log(), Q.log()).tolist() == pytest.approx([0.809438, 0.0, 0.901388], abs=1e-6)


def test_k3_is_never_negative_and_zero_only_where_the_two_agree():
    logps = torch.linspace(-8, 0, 33)
    estimates = kl_k3(logps[:, None], logps[None, :])
    assert (estimates >= 0).all()
    assert (estimates == 0).equal(torch.eye(33, dtype=torch.bool))


# ------------------------------------------------------------------------------------------ weights

# 4, 1 and 0 action tokens
RAGGED = torch.tensor([[0, 1, 1, 0, 1, 1], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()


@pytest.mark.parametrize("loss, expected", [
    # a third a rollout, shared out
    ("grpo", [[0, 1 / 12, 1 / 12, 0, 1 / 12, 1 / 12], [0, 0, 1 / 3, 0, 0, 0], [0] * 6]),
    # a fifth a token
    ("dapo", [[0, 1 / 5, 1 / 5, 0, 1 / 5, 1 / 5], [0, 0, 1 / 5, 0, 0, 0], [0] * 6]),
    # 3 rollouts of at most 10
    ("dr_grpo", [[0, 1 / 30, 1 / 30, 0, 1 / 30, 1 / 30], [0, 0, 1 / 30, 0, 0, 0], [0] * 6]),
])
def test_weights_of_ragged_rollouts(loss, expected):
    weights = token_weights(RAGGED, loss, num_rollouts=3, num_tokens=5, max_action_tokens=10)
    assert weights.dtype == torch.float32
    assert weights.flatten().tolist() == pytest.approx([w for row in expected for w in row],
                                                       rel=1e-6)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
def test_weights_take_their_counts_from_the_whole_update_and_not_from_the_rows_at_hand(loss):
    counts = {"num_rollouts": 3, "num_tokens": 5, "max_action_tokens": 10}
    whole = token_weights(RAGGED, loss, **counts)
    assert torch.cat([token_weights(RAGGED[i:i + 1], loss, **counts)
                      for i in range(3)]).equal(whole)


def test_an_update_without_any_action_token_weighs_nothing():
    for loss in ("grpo", "dapo", "dr_grpo"):
        weights = token_weights(torch.zeros(2, 3).bool(), loss, num_rollouts=2, num_tokens=0,
                                max_action_tokens=4)
        assert weights.tolist() == [[0.0] * 3] * 2


def test_the_mask_is_left_as_it_was():
    mask = torch.tensor([[0.0, 1.0, 1.0]])
    token_weights(mask, "grpo", num_rollouts=1, num_tokens=2, max_action_tokens=3)
    assert mask.tolist() == [[0.0, 1.0, 1.0]]


def test_an_unknown_loss_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="'gspo'.*grpo, dr_grpo, dapo"):
        token_weights(RAGGED, "gspo", num_rollouts=3, num_tokens=5, max_action_tokens=10)


# --------------------------------------------------------------------------------------------- loss


def losses_of(advantage, ratio, **clips):
    """(loss, gradient, clipped share) of one token of weight 1 whose probability went from 0.2 to
    ratio · 0.2.
    """
    old = torch.tensor([[math.log(0.2)]])
    logps = (old + math.log(ratio)).requires_grad_()
    loss, sums = policy_loss(logps, torch.tensor([advantage]), torch.ones(1, 1), old_logps=old,
                             **clips)
    loss.backward()
    return loss.item(), logps.grad.item(), sums["clipped"].item()


@pytest.mark.parametrize("advantage, ratio, loss, gradient, clipped", [
    (2.0, 1.0, -2.0, -2.0, 0.0),
    (2.0, 1.25, -2.5, -2.5, 0.0),  # within 1 + 0.3
    (2.0, 1.5, -2.6, 0.0, 1.0),  # above: worth no more, and no gradient
    # below, where the minimum is the plain term: the way back stays open
    (2.0, 0.5, -1.0, -1.0, 0.0),
    (-2.0, 1.5, 3.0, 3.0, 0.0),  # above, with a negative advantage: the full penalty
    (-2.0, 0.95, 1.9, 1.9, 0.0),
    (-2.0, 0.85, 1.8, 0.0, 1.0),  # below 1 - 0.1: no reason to go further down
    (-2.0, 0.5, 1.8, 0.0, 1.0),
])
def test_clipping_at_0_9_and_1_3(advantage, ratio, loss, gradient, clipped):
    assert losses_of(
        advantage, ratio, clip_low=0.1,
        clip_high=0.3) == pytest.approx((loss, gradient, clipped), abs=1e-5)


def test_the_clips_are_0_2_unless_set():
    assert losses_of(1.0, 1.5)[0] == pytest.approx(-1.2, abs=1e-5)
    assert losses_of(-1.0, 0.5)[0] == pytest.approx(0.8, abs=1e-5)


def test_a_batch_used_once_has_ratio_one_and_the_gradient_of_the_log_probs():
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -0.5]], requires_grad=True)
    weights = torch.tensor([[0.25, 0.25], [0.5, 0.0]])
    loss, sums = policy_loss(logps, torch.tensor([2.0, -1.0]), weights)
    loss.backward()
    assert loss.item() == -0.5  # -(0.25 · 2 + 0.25 · 2 - 0.5 · 1)
    assert logps.grad.tolist() == [[-0.5, -0.5], [0.5, 0.0]]
    assert (sums["kl"].item(), sums["clipped"].item()) == (0.0, 0.0)


def test_kl_and_clipped_share_are_weighted_as_the_loss():
    logps, ref = torch.tensor([[0.5, 0.2, 0.3]]).log(), torch.tensor([[0.1, 0.6, 0.3]]).log()
    loss, sums = policy_loss(logps, torch.tensor([1.0]), torch.tensor([[0.5, 0.25, 0.25]]),
                             ref_logps=ref, beta=0.04,
                             old_logps=torch.tensor([[0.25, 0.2, 0.3]]).log())
    kl = 0.5 * 0.809438 + 0.25 * 0.901388  # k3 of the tokens above, agreement costs nothing
    assert sums["kl"].item() == pytest.approx(kl, abs=1e-5)
    assert sums["clipped"].item() == 0.5  # the first token went from 0.25 to 0.5
    assert loss.item() == pytest.approx(-(0.5 * 1.2 + 0.25 + 0.25) + 0.04 * kl, abs=1e-5)


def sequence_logps(log_probs):
    """Log-probs (9, 2) of the nine sequences of two tokens out of three.

    log_probs (4, 3): first token, next after 0, 1, 2.
    """
    return torch.stack([torch.stack([log_probs[0, a], log_probs[1 + a, b]])
                        for a, b in itertools.product(range(3), repeat=2)])


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_gradient_is_that_of_the_enumerated_objective(beta):
    # Nine sequences, each in the batch with its probability as weight: the batch *is* the
    # expectation. Its gradient must be that of the expected reward, with p inside the derivative.
    # The k3 term, on policy, has the gradient of KL(reference || policy) at every prefix, prefixes
    # weighted as visited: sum p (1 - q/p) dlog p = -sum q dlog p.
    rng = torch.Generator().manual_seed(1)
    table = torch.randn(4, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    log_probs, reference = table.log_softmax(dim=1), torch.randn(4, 3, generator=rng,
                                                            dtype=torch.float64).log_softmax(dim=1)
    logps = sequence_logps(log_probs)
    rewards = torch.tensor([1.0, 0.0, 0.3, 0.0, -0.5, 2.0, 0.0, 0.7, 0.1], dtype=torch.float64)
    chance = logps.sum(dim=1).exp()  # (9,)
    # (4,) of the empty prefix and of the three others
    visits = torch.cat([torch.ones(1), log_probs[0].detach().exp()])
    divergence = (reference.exp() * (reference - log_probs)).sum(dim=1)  # (4,)
    objective = (chance * rewards).sum() - beta * (visits * divergence).sum()
    (wanted,) = torch.autograd.grad(-objective, table, retain_graph=True)

    advantages = rewards - (chance.detach() * rewards).sum()  # a baseline changes nothing
    loss, _ = policy_loss(logps, advantages, chance.detach()[:, None].expand(9, 2),
                          ref_logps=sequence_logps(reference), beta=beta)
    (gradient,) = torch.autograd.grad(loss, table)
    assert torch.allclose(gradient, wanted, atol=1e-12)  # float64
    assert wanted.abs().max() > 0.05  # there is something to agree on


def test_raising_the_log_prob_of_a_rewarded_token_lowers_the_loss():
    old = torch.log(torch.tensor([[0.5], [0.5]]))
    better = torch.log(torch.tensor([[0.55], [0.45]]))  # the first rollout was good, the second bad
    losses = [policy_loss(logps, torch.tensor([1.0, -1.0]), torch.full((2, 1), 0.5),
                          old_logps=old)[0].item() for logps in (old, better)]
    assert losses == pytest.approx([0.0, -0.1], abs=1e-6)


def test_descent_raises_good_tokens_and_lowers_bad_ones():
    # two rollouts of one token, each with its own distribution
    table = torch.zeros(2, 3, requires_grad=True)
    logps = torch.log_softmax(table, dim=1)[:, :1]
    policy_loss(logps, torch.tensor([1.0, -1.0]), torch.full((2, 1), 0.5))[0].backward()
    after = torch.softmax(table.detach() - table.grad, dim=1)[:, 0]
    assert after[0] > 1 / 3 > after[1]


def test_the_kl_term_pulls_the_policy_towards_the_reference():
    table = P.log().clone().requires_grad_()
    distances = []
    for _ in range(100):  # no reward, only KL; every token weighted by its probability
        logps = torch.log_softmax(table, dim=0)[:, None]  # (3, 1): three rollouts of one token
        loss, _ = policy_loss(logps, torch.zeros(3), logps.detach().exp(),
                              ref_logps=Q.log()[:, None], beta=1.0)
        distances.append((logps.exp() * (logps - Q.log()[:, None])).sum().item())
        (gradient,) = torch.autograd.grad(loss, table)
        table = (table.detach() - 0.5 * gradient).requires_grad_()
    assert distances[0] == pytest.approx(KL_PQ, abs=1e-6)
    assert distances[-1] < 0.01


# --------------------------------------------------------------------------------- cuts and padding


def rollouts():
    """Five rollouts of 6, 3, 5, 1 and 0 action tokens: (log-probs, old, reference, advantage) of
    each.
    """
    rng = torch.Generator().manual_seed(2)
    def draw(n):
        return -3 * torch.rand(n, generator=rng, dtype=torch.float64)
    return [(draw(n), draw(n), draw(n), a) for n, a in zip([6, 3, 5, 1, 0],
                                                           [1.3, -0.4, -0.9, 0.6, 2.0])]


def padded(rows, side, extra, filler):
    """One micro-batch: rows padded by `filler` to the longest of them plus extra."""
    length = max(len(row[0]) for row in rows) + extra
    def pad(values, fill):
        rest = values.new_full((length - len(values),), fill)
        return torch.cat([rest, values] if side == "left" else [values, rest])
    mask = torch.stack([pad(torch.ones_like(row[0]), 0) for row in rows]).bool()
    logps, old, ref = (torch.stack([pad(row[i], filler) for row in rows]) for i in range(3))
    return logps, old, ref, torch.tensor([row[3] for row in rows], dtype=torch.float64), mask


def whole_update(pieces, loss, side="right", extra=1, filler=0.0):
    """(loss, kl, clipped, gradient of every action token) of an update cut into pieces, lists of
    indices of rollouts.
    """
    rows = rollouts()
    for row in rows:
        row[0].requires_grad_()
    total = []
    for piece in pieces:
        logps, old, ref, advantages, mask = padded([rows[i] for i in piece], side, extra, filler)
        weights = token_weights(mask, loss, num_rollouts=5, num_tokens=15, max_action_tokens=8)
        value, sums = policy_loss(logps, advantages, weights, old_logps=old, ref_logps=ref,
                                  beta=0.04)
        value.backward()
        total.append(torch.stack([value.detach(), sums["kl"], sums["clipped"]]))
    return torch.stack(total).sum(dim=0), torch.cat([row[0].grad for row in rows])


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("cut", [
    {"pieces": [[0], [1], [2], [3], [4]]}, {"pieces": [[0, 1, 2], [3, 4]]}, {"pieces": [[4, 2, 0, 3, 1]]},
    {"pieces": [[3, 0], [4], [1, 2]]}, {"pieces": [[0, 1, 2, 3, 4]], "extra": 9},
    {"pieces": [[0, 1, 2, 3, 4]], "side": "left"}, {"pieces": [[0, 1], [2, 3, 4]], "filler": -7.0}])
def test_loss_metrics_and_gradient_do_not_depend_on_cut_order_or_padding(cut, loss):
    sums, gradient = whole_update([[0, 1, 2, 3, 4]], loss)
    cut_sums, cut_gradient = whole_update(**cut, loss=loss)
    assert torch.allclose(cut_sums, sums, atol=1e-12)  # sums of float64 in another order
    assert torch.allclose(cut_gradient, gradient, atol=1e-12)


def test_the_whole_update_is_the_mean_over_rollouts_of_the_mean_over_tokens():
    by_hand = 0.0
    for logps, old, ref, advantage in rollouts():
        terms = [
            min(math.exp(p - o) * advantage, min(max(math.exp(p - o), 0.8), 1.2) * advantage) - 0.04
            * (math.exp(r - p) - (r - p) - 1)
            for p, o, r in zip(logps.tolist(), old.tolist(), ref.tolist())]
        by_hand -= sum(terms) / max(len(terms), 1) / 5
    # weights are float32
    assert whole_update(
        [[0, 1], [2, 3, 4]], "grpo")[0][0].item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("filler", [math.inf, -math.inf, math.nan])
def test_infinities_and_nans_outside_the_mask_poison_nothing(filler):
    sums, gradient = whole_update([[0, 1], [2, 3, 4]], "grpo")
    poisoned_sums, poisoned_gradient = whole_update([[0, 1], [2, 3, 4]], "grpo", filler=filler)
    assert poisoned_sums.equal(sums)
    assert poisoned_gradient.equal(gradient)


@pytest.mark.parametrize("filler", [math.inf, -math.inf, math.nan, -1e4])
def test_masked_tokens_get_a_gradient_of_exactly_zero(filler):
    logps = torch.tensor([[-1.0, filler]], requires_grad=True)
    loss, _ = policy_loss(logps, torch.tensor([1.0]), torch.tensor([[1.0, 0.0]]), beta=0.04,
                          old_logps=torch.tensor([[-1.0, -1.0]]),
                          ref_logps=torch.tensor([[-1.0, -2.0]]))
    loss.backward()
    assert loss.item() == -1.0
    assert logps.grad.tolist() == [[-1.0, 0.0]]


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
def test_a_micro_batch_without_action_tokens_adds_exactly_zero(loss):
    logps = torch.zeros(2, 3, requires_grad=True)
    weights = token_weights(torch.zeros(2, 3).bool(), loss, num_rollouts=5, num_tokens=15,
                            max_action_tokens=8)
    value, sums = policy_loss(logps, torch.tensor([1.0, -1.0]), weights,
                              ref_logps=torch.full((2, 3), -1.0), beta=0.04)
    value.backward()
    assert (value.item(), sums["kl"].item(), sums["clipped"].item()) == (0.0, 0.0, 0.0)
    assert logps.grad.tolist() == [[0.0] * 3] * 2
