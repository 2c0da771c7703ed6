"""One batch of the laptop model, scored and differentiated with one mistake at a time: python tests/course/one_batch.py

The rollouts are those of the first step of the default run on one rank (seed 0, 8 prompts x 8 samples). For each mistake it
prints what the metrics of that step would show: the gap, the loss, the norm of the gradient, and the cosine between this
gradient and the right one. A change of what is sampled has rollouts of its own. Some minutes.
"""
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import grpo  # noqa: E402
import model as model_module  # noqa: E402
from data.tasks import load_task_files  # noqa: E402
from grpo import group_advantages, policy_loss, token_weights  # noqa: E402
from model import action_logps, encode_text, load_policy  # noqa: E402
from reward import WEIGHTS, weighted_sum  # noqa: E402
from rollout import micro_batches, roll_out  # noqa: E402
from tools import CodeTool, SearchTool, Tools  # noqa: E402
from train import Config, all_reward_parts, task_at  # noqa: E402

CONFIG = Config(tasks=str(ROOT / "data/offline/train.json"), corpus=f"sqlite:{ROOT / 'data/offline/corpus.sqlite'}")


def play(policy, temperature=1.0, prompts=8):
    """(rollouts, rewards) of the first step."""
    tasks = load_task_files(CONFIG.tasks, "episode")
    torch.manual_seed(0)
    with CodeTool(1) as code:
        rollouts, _ = roll_out(policy, [task_at(tasks, n, CONFIG) for n in range(prompts)],
                               Tools(code, SearchTool(CONFIG.corpus)), CONFIG.limits(), group_size=8, temperature=temperature)
    return rollouts, [weighted_sum(parts, WEIGHTS) for parts in all_reward_parts(rollouts, CONFIG, None)]


def measure(policy, rollouts, advantages, *, tokens=8192, loss="grpo", temperature=1.0, per_batch=False,
            change=None):
    """(gap, loss, action tokens, flat gradient, micro-batches) of an update.

    per_batch: each micro-batch has counts of its own, and the gradient is their mean. change: of each batch.
    """
    batches = micro_batches(policy, rollouts, advantages, tokens)
    batches = [change(batch) if change else batch for batch in batches]
    policy.model.zero_grad()
    gap, total = 0.0, 0.0
    for batch in batches:
        counted = [batch] if per_batch else batches
        logps, _ = action_logps(policy, batch, temperature)
        weights = token_weights(batch.action_mask, loss, num_rollouts=sum(len(b.advantages) for b in counted),
                                num_tokens=sum(int(b.action_mask.sum()) for b in counted), max_action_tokens=384)
        value, _ = policy_loss(logps, batch.advantages, weights / (len(batches) if per_batch else 1))
        value.backward()
        total += value.item()
        gap = max(gap, (logps - batch.sampled_logps)[batch.action_mask].abs().max().item())
    gradient = torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])
    return gap, total, sum(int(b.action_mask.sum()) for b in batches), gradient, len(batches)


def all_tokens(batch):
    """Observations are trained on, too."""
    lengths = torch.tensor([size for _, samples in batch.segments for size in samples])
    return replace(batch, action_mask=torch.arange(batch.targets.shape[1]) < lengths[:, None])


def no_end(policy):
    """The end token is no target."""
    return lambda batch: replace(batch, action_mask=batch.action_mask & (batch.targets != policy.end_id))


def from_neighbour(batch):
    """The first token of a sample is predicted by what stands before it in the row."""
    predictors, place, b = batch.predictors.clone(), 0, 0
    for prompt, samples in batch.segments:
        place += prompt
        for size in samples:
            predictors[b, 0], place, b = place - 1, place + size, b + 1
    return replace(batch, predictors=predictors)


def later_tokens(query, key, value, segments, scaling):
    """Attention without the triangle: a sample sees its own future."""
    with patch.object(torch.Tensor, "tril", lambda mask, diagonal: mask):
        return grpo.packed_attention(query, key, value, segments, scaling)


def retokenised(policy, rollouts):
    """(turns whose text is tokenised into other ids than were sampled, all turns)."""
    turns = []
    for rollout in rollouts:
        ends = [t for t, token in enumerate(rollout.ids) if token == policy.end_id and rollout.action_mask[t]]
        for end in ends:
            start = end
            while rollout.action_mask[start - 1]:
                start -= 1
            ids = rollout.ids[start:end]
            turns.append(encode_text(policy, policy.tokenizer.decode(ids)) != ids)
    return sum(turns), len(turns)


def main():
    """Print the table."""
    policy = load_policy(str(ROOT / "data/model"))
    rollouts, rewards = play(policy)
    by_prompt = torch.tensor(rewards).view(-1, 8)
    advantages = group_advantages(by_prompt).flatten().tolist()
    logits_scored = grpo._log_probs
    right = measure(policy, rollouts, advantages)

    def show(name, measured, other=right):
        gap, loss, tokens, gradient, n = measured
        cosine = "" if other is None else f"{torch.cosine_similarity(gradient, other[3], dim=0):.4f}"
        print(f"{name:<44}{gap:>9.1e}{loss:>10.4f}{tokens:>7}{gradient.norm():>10.4f} {cosine:>8}{n:>4}", flush=True)

    print(f"{'':<44}{'gap':>9}{'loss':>10}{'tokens':>7}{'grad_norm':>10} {'cosine':>8}  micro-batches")
    show("right", right)
    print("turns whose text has other ids when it is tokenised again: {} of {}".format(*retokenised(policy, rollouts)))
    dapo = measure(policy, rollouts, advantages, loss="dapo")
    show("right, dapo", dapo, dapo)
    show("right, in small micro-batches", measure(policy, rollouts, advantages, tokens=1000))
    for loss, best in (("grpo", right), ("dapo", dapo)):
        for tokens in (1000, 500):
            show(f"{loss}, counts per micro-batch, {tokens}",
                 measure(policy, rollouts, advantages, tokens=tokens, loss=loss, per_batch=True), best)
    show("rewards without a mean", measure(policy, rollouts, rewards))
    whole = (by_prompt - by_prompt.mean()) / (by_prompt.std() + 1e-4)
    show("mean and std of the whole batch", measure(policy, rollouts, whole.flatten().tolist()))
    show("without the std", measure(policy, rollouts, group_advantages(by_prompt, "dr_grpo").flatten().tolist()))
    show("std with G in place of G - 1", measure(
        policy, rollouts, (group_advantages(by_prompt, "dr_grpo") / (by_prompt.std(1, correction=0, keepdim=True) + 1e-4)
                           ).flatten().tolist()))
    show("observations in the loss", measure(policy, rollouts, advantages, change=all_tokens))
    show("end token is no target", measure(policy, rollouts, advantages, change=no_end(policy)))
    show("first token from the neighbour", measure(policy, rollouts, advantages, change=from_neighbour))
    with patch.object(model_module, "packed_attention", later_tokens):
        show("samples see later tokens", measure(policy, rollouts, advantages))
    nothing = torch.tensor([], dtype=torch.int64)
    with patch.object(grpo, "_log_probs", lambda h, head, t, suppressed: logits_scored(h, head, t, nothing)):
        show("suppressed ids in the scored softmax", measure(policy, rollouts, advantages))
    hot, hot_rewards = play(policy, temperature=1.3)
    hot_advantages = group_advantages(torch.tensor(hot_rewards).view(-1, 8)).flatten().tolist()
    hot_right = measure(policy, hot, hot_advantages, temperature=1.3)
    show("sampled and scored at 1.3", hot_right, hot_right)
    show("sampled at 1.3, scored at 1", measure(policy, hot, hot_advantages), hot_right)
    draw = model_module.draw
    for k in (50, 2):
        def top_k(logits, temperature, suppressed, k=k):
            kept = logits.where(logits >= logits.topk(k).values[:, -1:], -1e9)
            ids, _ = draw(kept, temperature, suppressed)
            all_logps = logits.float().index_fill(1, suppressed, float("-inf")).log_softmax(1)
            return ids, all_logps.gather(1, ids[:, None]).squeeze(1)
        with patch.object(model_module, "draw", top_k):
            cut, cut_rewards = play(policy)
        show(f"sampled with top-{k}, scored in full", measure(
            policy, cut, group_advantages(torch.tensor(cut_rewards).view(-1, 8)).flatten().tolist()), None)


if __name__ == "__main__":
    main()
