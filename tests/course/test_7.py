"""Exercise 7: one update, against its formula in loops on a plain Hugging Face model, on one rank and on two.

Weights are random, so that every token has a gradient. Steps are those of gradient descent with a rate of LR: what the
weights lose is LR times the gradient.
"""
import functools
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(Path(__file__).parent)]

from make_model import make_model  # noqa: E402
from grpo import LOSSES  # noqa: E402
from model import encode_image, encode_observation, encode_prompt, load_policy  # noqa: E402
from ranks import on_ranks  # noqa: E402
from rollout import Rollout  # noqa: E402
from train import Config, even_micro_batches  # noqa: E402

LR = 0.05
BASE = {"max_turns": 3, "max_new_tokens": 20, "max_grad_norm": 1e6, "micro_batch_tokens": 150}
SHARES = slice(0, 5), slice(5, 6)  # of the rows, for two ranks


# ---- the rows ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model's folder, and six rows (rollout, advantage, reference log-probs): three prompts with two samples each, of
    one to three turns, the last two with an image. Sampled log-probs lie 0.4 nats at most from the scored ones."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = load_policy(str(ROOT / "data" / "model")).tokenizer
    for part in (make_model(tokenizer, seed=0), tokenizer, Qwen2VLImageProcessorPil()):
        part.save_pretrained(folder)
    policy, generator, rows = load_policy(str(folder)), torch.Generator().manual_seed(0), []
    plain = plain_model(folder)
    noise = torch.randint(256, (56, 84, 3), dtype=torch.uint8, generator=generator)
    picture = encode_image(policy, Image.fromarray(noise.numpy()))
    turns = [[3], [9, 4], [2, 2, 7], [6], [1], [5, 8]]
    for i, (lengths, advantage) in enumerate(zip(turns, [1.5, -1.0, 0.5, -0.25, 0.75, -2.0])):
        images = [picture] if i > 3 else []
        prompt = encode_prompt(policy, "Why? " * (1 + i // 2), *(images or [None]))
        ids, mask = list(prompt), [0] * len(prompt)
        for turn, length in enumerate(lengths):
            observation = encode_observation(policy, "So?", None) if turn else []
            action = torch.randint(700, (length - 1,), generator=generator).tolist() + [policy.end_id]
            ids += observation + action
            mask += [0] * len(observation) + [1] * length
        rollout = Rollout({}, ids, mask, [0.0] * len(ids), images)
        noise = torch.rand(2, len(ids), generator=generator) - 0.5
        with torch.no_grad():
            log_probs = plain_log_probs(plain, policy, rollout, 1.0)
        sampled, reference = [0.0] * len(ids), [0.0] * len(ids)
        for t, token in enumerate(ids):
            if mask[t]:
                scored = log_probs[t - 1, token].item()
                sampled[t], reference[t] = scored + 0.8 * noise[0, t].item(), scored + 1.6 * noise[1, t].item()
        rows.append((replace(rollout, logps=sampled), advantage, reference))
    return SimpleNamespace(folder=folder, policy=policy, rows=rows, temporary=tmp_path_factory)


def plain_model(folder):
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def plain_log_probs(model, policy, rollout, temperature):
    """Log-probs (T - 1, V) of what follows each token, of one sequence alone, over the ids that can be sampled."""
    ids, vision = torch.tensor([rollout.ids]), {}
    if rollout.images:
        vision = {"pixel_values": torch.cat([image.pixels for image in rollout.images]),
                  "image_grid_thw": torch.tensor([image.grid for image in rollout.images]),
                  "mm_token_type_ids": (ids == policy.image_id).int()}
    logits = model(input_ids=ids, use_cache=False, **vision).logits[0, :-1] / temperature
    kept = torch.ones(logits.shape[1], dtype=torch.bool)
    kept[policy.suppressed] = False
    return logits.masked_fill(~kept, -1e30).log_softmax(dim=1)


# ---- the formula ---------------------------------------------------------------------------------


def token_terms(log_probs, row, old, rules, config):
    """Of each token that was sampled: its part of the objective, KL, whether a clip cuts it, entropy, log-prob, distance from
    the sampler's; by the rules of exercises 4, 5 and 7 in force."""
    rollout, advantage, reference = row
    terms = []
    for t, token in enumerate(rollout.ids):
        if not rollout.action_mask[t]:
            continue
        logp, sampled = log_probs[t - 1, token], rollout.logps[t]
        if rules["7"] == "sampled_old":
            before = sampled
        else:
            before = old[len(terms)] if old else logp.item()
        ratio = torch.exp(logp - before)
        bounded = min(max(ratio.item(), 1 - config.clip_low), 1 + config.clip_high) * advantage
        gain, is_cut = ratio * advantage, False
        if bounded < ratio.item() * advantage:
            gain, is_cut = bounded, True
        if rules["4"] == "dual_clip" and advantage < 0 and ratio.item() > 3:
            gain, is_cut = 3 * advantage, True
        away = reference[t] - logp
        kl = away.square() / 2 if rules["4"] == "k2" else torch.exp(away) - away - 1
        if rules["4"] == "unbiased_kl":
            kl = ratio * kl
        p = log_probs[t - 1].detach().exp()
        entropy = -(p * log_probs[t - 1].detach()).sum().item()
        if rules["5"] == "collision":
            entropy = -math.log(p.square().sum().item())
        elif rules["5"] == "evenness":
            entropy /= math.log((p > 0).sum().item())
        terms.append((gain - config.beta * kl, kl.item(), float(is_cut), entropy, logp.item(),
                      abs(logp.item() - sampled)))
    return terms


def formula(world, rules, config, rows):
    """(metrics, what every parameter loses) of the whole update of all rows."""
    model = plain_model(world.folder)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    num_tokens = sum(sum(rollout.action_mask) for rollout, _, _ in rows)
    turns = 1 if config.mode == "step" else config.max_turns
    old, gap = [None] * len(rows), None
    for _ in range(config.updates_per_batch):
        loss, total, sums, distances = 0.0, 0.0, dict.fromkeys(("kl", "clipped", "entropy"), 0.0), []
        for i, row in enumerate(rows):
            log_probs = plain_log_probs(model, world.policy, row[0], config.temperature)
            terms = token_terms(log_probs, row, old[i], rules, config)
            length = math.sqrt(len(terms)) if rules["4"] == "sqrt_length" else len(terms)
            weight = {"grpo": 1 / (len(rows) * length), "dapo": 1 / num_tokens,
                      "dr_grpo": 1 / (len(rows) * turns * config.max_new_tokens)}[config.loss]
            part = -weight * sum(term[0] for term in terms)
            part.backward()
            loss += part.item()
            of_metrics = 1.0 if rules["7"] == "token_means" else weight
            for _, kl, is_cut, entropy, _, distance in terms:
                sums["kl"] += of_metrics * kl
                sums["clipped"] += of_metrics * is_cut
                sums["entropy"] += of_metrics * entropy
                total += of_metrics
                distances.append(distance)
            old[i] = old[i] or [term[4] for term in terms]
        if gap is None:
            gap = sum(distances) / num_tokens if rules["7"] == "sampled_old" else max(distances)
        gradients = [p.grad for p in model.parameters()]
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        with torch.no_grad():
            for p in model.parameters():
                if rules["7"] == "token_means":
                    p -= LR * p.grad.clamp(-config.max_grad_norm, config.max_grad_norm)
                else:
                    p -= LR * p.grad * min(1.0, config.max_grad_norm / norm)
                p.grad = None
    metrics = {"loss": loss, **{name: value / total for name, value in sums.items()}, "gap": gap, "tokens": num_tokens,
               "grad_norm": norm, "skipped": 0}
    return metrics, {name: start[name] - p.detach() for name, p in model.named_parameters()}


# ---- the student's update ------------------------------------------------------------------------


def whole(policy):
    return {name: p.full_tensor().detach().clone() for name, p in policy.model.named_parameters()}


def update_on_rank(update, folder, shares, config):
    """On a rank: the updates of shares[rank], a list of lists of rows, one after the other, on one policy.

    [(metrics, what every parameter has lost since the start, steps of the optimizer since the start)] after each.
    """
    policy = load_policy(str(folder), shard=True)
    optimizer, steps = torch.optim.SGD(policy.model.parameters(), lr=LR), []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    start, results = whole(policy), []
    for rows in shares[dist.get_rank()]:
        advantages = [advantage for _, advantage, _ in rows]
        batches, num_real = even_micro_batches(policy, [r for r, _, _ in rows], advantages, config.micro_batch_tokens)
        reference, _ = even_micro_batches(policy, [replace(r, logps=logps) for r, _, logps in rows], advantages,
                                          config.micro_batch_tokens)
        metrics = update(policy, optimizer, batches, num_real, [batch.sampled_logps for batch in reference], config)
        policy.model.reshard()
        now = whole(policy)
        results.append((dict(metrics), {name: start[name] - now[name] for name in now}, len(steps)))
    return results


class Updates:
    """What the student's update gives and what the formula gives, each computed once."""

    def __init__(self, world):
        self.world, self.expected, self.ran = world, {}, {}

    def __call__(self, update, rules, size, **flags):
        config = Config(**{**BASE, **flags})
        key, kept = (update, size, str(config)), str(replace(config, micro_batch_tokens=1))
        if kept not in self.expected:
            self.expected[kept] = formula(self.world, rules, config, self.world.rows)
        if key not in self.ran:
            rows = self.world.rows
            shares = [[rows]] if size == 1 else [[rows[share]] for share in SHARES]
            self.ran[key] = [results[0] for results in run_shares(self.world, update, shares, config)]
        return self.ran[key], self.expected[kept]


def run_shares(world, update, shares, config):
    """What `update_on_rank` returned on each rank."""
    folder = world.temporary.mktemp("ranks") / "group"
    return on_ranks(len(shares), folder, update_on_rank, update, world.folder, shares, config)


@pytest.fixture(scope="module")
def updates(world):
    return Updates(world)


@pytest.fixture
def updated(updates, student, rules):
    """updated(size, **flags): (what each rank's update gave, what the formula gives)."""
    return functools.partial(updates, student.update, rules)


def assert_moved(ranks, expected, what):
    """Every parameter lost what the formula says, on every rank. Fp32 in another order: 1e-4, and 2e-6 that rounding
    a weight leaves."""
    for rank, (_, lost, _) in enumerate(ranks):
        for name, wanted in expected[1].items():
            off = (lost[name] - wanted).norm() / wanted.norm()
            share = (lost[name] * wanted).sum() / wanted.square().sum()  # 1 if it is right
            assert (lost[name] - wanted).norm() <= 1e-4 * wanted.norm() + 2e-6, (
                f"{what}: on rank {rank} of {len(ranks)} {name} moved by {share:.4f} times the formula's step "
                f"(relative error {off:.1e})")


def assert_metrics(ranks, expected, names):
    for rank, (metrics, _, _) in enumerate(ranks):
        for name in names:
            assert name in metrics, f"the metrics lack {name!r}"
            assert metrics[name] == pytest.approx(expected[0][name], rel=2e-4, abs=1e-6), (
                f"{name} on rank {rank} of {len(ranks)}")


# ---- the step ------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_is_that_of_the_formula(updated, loss):
    ranks, expected = updated(1, loss=loss)
    assert expected[0]["grad_norm"] > 0.05
    assert_moved(ranks, expected, f"--loss {loss}")


@pytest.mark.parametrize("tokens", [1, 100_000])
def test_the_cut_into_micro_batches_changes_neither_step_nor_metrics(updated, tokens):
    ranks, expected = updated(1, micro_batch_tokens=tokens)
    assert_moved(ranks, expected, f"--micro_batch_tokens {tokens}")
    assert_metrics(ranks, expected, expected[0])


@pytest.mark.core
def test_two_ranks_with_unlike_shares_take_the_step_of_one(updated):
    """Two micro-batches on the first rank; on the second one, and one that only keeps the ranks in step."""
    ranks, expected = updated(2)
    assert_moved(ranks, expected, "two ranks, five rollouts and one")


def test_later_steps_keep_the_old_log_probs(updated):
    """Three optimizer steps on the same rollouts: ratios leave 1, and the clip cuts."""
    ranks, expected = updated(1, updates_per_batch=3)
    assert 0.1 < expected[0]["clipped"] < 0.9
    assert_moved(ranks, expected, "--updates_per_batch 3")


@pytest.mark.parametrize("flag, value", [("temperature", 0.7), ("beta", 0.5), ("clip_low", 0.02), ("clip_high", 0.8)])
def test_a_flag_reaches_the_step(updated, flag, value):
    ranks, expected = updated(1, updates_per_batch=2 if "clip" in flag else 1, **{flag: value})
    assert_moved(ranks, expected, f"--{flag} {value}")


def test_in_step_mode_dr_grpo_divides_by_the_length_of_one_turn(updated):
    """As --mode step has one turn, however many an episode may take."""
    ranks, expected = updated(1, loss="dr_grpo", mode="step")
    assert_moved(ranks, expected, "--loss dr_grpo --mode step")


@pytest.mark.core
@pytest.mark.parametrize("size", [1, 2])
def test_a_large_gradient_is_cut(updated, rule, size):
    """As the rule says; by what all micro-batches and ranks give together."""
    largest = 0.002 if rule == "token_means" else 0.1
    ranks, expected = updated(size, max_grad_norm=largest)
    assert expected[0]["grad_norm"] > 0.1
    assert_moved(ranks, expected, f"--max_grad_norm {largest}")
    assert_metrics(ranks, expected, ["grad_norm"])


# ---- metrics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo"])
def test_metrics_are_those_of_the_whole_batch(updated, loss):
    ranks, expected = updated(1, loss=loss)
    assert expected[0]["kl"] > 0.01
    assert_metrics(ranks, expected, ["loss", "kl", "entropy", "tokens", "grad_norm", "skipped"])


def test_metrics_are_those_of_the_last_step(updated):
    ranks, expected = updated(1, updates_per_batch=3)
    assert_metrics(ranks, expected, ["loss", "kl", "clipped", "entropy", "grad_norm"])


def test_the_gap_is_measured_before_the_first_step(updated):
    ranks, expected = updated(1, updates_per_batch=3)
    assert 0.1 < expected[0]["gap"] < 0.5
    assert_metrics(ranks, expected, ["gap"])


def test_metrics_are_the_same_on_all_ranks_and_of_all_ranks(updated):
    ranks, expected = updated(2)
    (one, _, _), (other, _, _) = ranks
    assert one == other, "ranks report different metrics"
    assert_metrics(ranks, expected, expected[0])


# ---- numbers that are not finite -----------------------------------------------------------------


def with_advantage(rows, advantage):
    return [(rollout, advantage, reference) for rollout, _, reference in rows]


def assert_nothing_moved(result, rank):
    metrics, lost, steps = result
    assert metrics["skipped"] == 1, f"rank {rank} does not count the step as skipped"
    assert all(not moved.any() for moved in lost.values()), f"rank {rank} moved weights"
    assert not steps, f"rank {rank} let the optimizer take a step"


def test_all_ranks_skip_a_step_that_is_not_finite_on_one(world, student):
    good, bad = world.rows[:2], with_advantage(world.rows[4:], math.inf)
    config = Config(**BASE, updates_per_batch=2)
    for rank, [result] in enumerate(run_shares(world, student.update, [[good], [bad]], config)):
        assert not math.isfinite(result[0]["loss"])
        assert_nothing_moved(result, rank)


def test_a_gradient_can_overflow_where_the_loss_does_not(world, student):
    """Its norm is infinite in fp32, as it adds up squares."""
    [[result]] = run_shares(world, student.update, [[with_advantage(world.rows, 1e25)]], Config(**BASE, beta=0.0))
    assert math.isfinite(result[0]["loss"]) and not math.isfinite(result[0]["grad_norm"])
    assert_nothing_moved(result, 0)


def test_the_update_after_a_skipped_one_is_as_if_alone(world, student, updated):
    bad = with_advantage(world.rows, math.inf)
    [[_, after]] = run_shares(world, student.update, [[bad, world.rows]], Config(**BASE))
    [alone], _ = updated(1)
    assert after[0] == pytest.approx(alone[0], rel=1e-6), "metrics"
    for name, wanted in alone[1].items():
        assert torch.equal(after[1][name], wanted), f"{name} moved otherwise"
