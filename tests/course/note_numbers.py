"""The numbers of the notes, each computed by enumeration: python tests/course/note_numbers.py

    python tests/course/note_numbers.py kl normalisation     # of some notes

Every expectation is a finite sum over all that can be sampled, in float64. Where a note speaks of the project's own code, the
code itself is called. What the notes say of the laptop model's rollouts is printed by one_batch.py.
"""
import itertools
import math
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from grpo import group_advantages, token_weights  # noqa: E402

torch.set_default_dtype(torch.float64)
torch.set_printoptions(precision=4, sci_mode=False)


def row(name, values, digits=4):
    """Print a line of a table."""
    print(f"{name:<46}" + "".join(f"{value:>10.{digits}f}" for value in values))


def score_vectors(probs):
    """Row y is the gradient of log p(y) with respect to the logits: onehot(y) - p."""
    return torch.eye(len(probs)) - probs


# ---- policy_gradient.md -------------------------------------------------------------------------------------------------
def policy_gradient():
    """Three answers with rewards 1, 0.5, 0; groups of G = 4: expectation and variance of the estimated gradient."""
    probs, rewards, size = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([1.0, 0.5, 0.0]), 4
    scores = score_vectors(probs)
    true = (probs * rewards) @ scores
    row("true gradient", true)

    def advantages(name, r):
        return {"no baseline": r, "constant 10": r - 10, "group mean": r - r.mean(),
                "leave one out": r - (r.sum() - r) / (size - 1)}[name]
    for name in ("no baseline", "constant 10", "group mean", "leave one out"):
        mean, square = torch.zeros(3), 0.0
        for group in itertools.product(range(3), repeat=size):
            chance = probs[list(group)].prod()
            estimate = (advantages(name, rewards[list(group)])[:, None] * scores[list(group)]).mean(dim=0)
            mean, square = mean + chance * estimate, square + chance * estimate.square().sum()
        row(name, mean)
        print(f"{'':<6}over the true gradient {mean[0] / true[0]:.4f}, variance {square - mean.square().sum():.5f}")


# ---- normalisation.md ---------------------------------------------------------------------------------------------------
def normalisation():
    """What a division by the std and by the length weighs more than the expected reward does."""
    size = 8
    for rewards in ([1.0] + [0.0] * 7, [1.0] * 4 + [0.0] * 4, [1.0] * 7 + [0.99]):
        group = torch.tensor([rewards])
        row(f"advantages of {rewards[0]}, ..., {rewards[-1]}: first, last",
            [group_advantages(group)[0, 0], group_advantages(group)[0, -1]])
    print("expected gradient over the gradient of the success rate p, G = 8, rewards 0 or 1")
    for p in (0.5, 0.25, 0.125, 0.02):
        factors = []
        for loss in ("dr_grpo", "grpo"):
            factor = 0.0
            for k in range(size + 1):  # successes
                group = torch.tensor([[1.0] * k + [0.0] * (size - k)])
                a = group_advantages(group, loss)[0].double()
                chance = math.comb(size, k) * p**k * (1 - p)**(size - k)
                # The mean score of a success is (gradient of p) / p, of a failure -(gradient of p) / (1 - p).
                factor += chance * (a[:k].sum() / p - a[k:].sum() / (1 - p)) / size
            factors.append(factor)
        row(f"p = {p}: dr_grpo, grpo, 1 / sqrt(p (1 - p))", [*factors, 1 / math.sqrt(p * (1 - p))])
    lengths, rewards = [10, 40, 10, 40], torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    mask = torch.tensor([[t < length for t in range(40)] for length in lengths])
    print("weight x advantage of one token: right of 10, right of 40, wrong of 10, wrong of 40")
    for loss in ("grpo", "dapo", "dr_grpo"):
        weights = token_weights(mask, loss, num_rollouts=4, num_tokens=100, max_action_tokens=100)
        row(f"  {loss}", weights[:, 0] * group_advantages(rewards, "dr_grpo")[0], 5)
    probs, rewards, lengths, size = torch.tensor([0.2, 0.4, 0.4]), torch.tensor([1.0, 0.0, 0.0]), [1, 1, 4], 4
    scores, mask = score_vectors(probs), torch.tensor([[t < length for t in range(4)] for length in lengths])
    print("logits of right (1 token), wrong (1 token), wrong (4 tokens); groups of 4, all enumerated; no std")
    row("  true gradient", (probs * rewards) @ scores)
    for loss, scale in (("grpo", 1.0), ("dr_grpo", 4.0)):
        mean = torch.zeros(3)
        for group in map(list, itertools.product(range(3), repeat=size)):
            a = group_advantages(rewards[group][None], "dr_grpo")[0].double()
            w = token_weights(mask[group], loss, num_rollouts=size, num_tokens=0, max_action_tokens=4)[:, 0].double()
            mean += probs[group].prod() * ((w * a)[:, None] * scores[group]).sum(dim=0)
        row(f"  {loss}, x {scale:.0f} x G / (G - 1)", mean * scale * size / (size - 1))


# ---- kl.md --------------------------------------------------------------------------------------------------------------
def kl():
    """k1, k2, k3 as values, as losses and as rewards; one token of three, then two tokens."""
    logits = torch.tensor([1.0, 0.0, -1.0], requires_grad=True)
    ref = torch.tensor([0.2, 0.3, 0.5]).log()
    logps = logits.log_softmax(dim=0)
    probs = logps.exp()
    estimates = k_estimates(logps, ref)
    reverse, forward = (probs * (logps - ref)).sum(), (ref.exp() * (ref - logps)).sum()
    print(f"p = {probs.tolist()}, q = {ref.exp().tolist()}")
    print(f"KL(p||q) = {reverse:.4f}, KL(q||p) = {forward:.4f}")
    row("gradient of KL(p||q)", gradient(reverse, logits))
    row("gradient of KL(q||p)", gradient(forward, logits))
    chance, score = probs.detach(), score_vectors(probs.detach())
    for name, k in estimates.items():
        value, mean = k.detach(), (chance * k).sum().item()
        row(f"{name}: expectation, standard deviation", [mean, ((chance * value**2).sum() - mean**2).sqrt()])
        row(f"{name} as a loss", gradient((chance * k).sum(), logits))
        row(f"{name} as a cost in the reward", (chance * value) @ score)
        ratio = (logps - logps.detach()).exp()
        row(f"{name} x ratio as a loss", gradient((chance * ratio * k).sum(), logits))
    print("two tokens: a table of logits for the first and for the second after each first")
    table = torch.tensor([[0.5, -0.5], [1.0, 0.0], [-1.0, 0.5]], requires_grad=True)
    other = torch.tensor([[0.0, 0.0], [0.0, 0.3], [0.7, 0.0]]).log_softmax(dim=1)
    laws = table.log_softmax(dim=1)
    pairs = list(itertools.product(range(2), repeat=2))
    sequence = sum((laws[0, a] + laws[1 + a, b]).exp() * (laws[0, a] + laws[1 + a, b] - other[0, a] - other[1 + a, b])
                   for a, b in pairs)
    row("gradient of the sequence KL, first logits", gradient(sequence, table)[0])
    for name in ("k1", "k2", "k3"):
        loss = sum((laws[0, a] + laws[1 + a, b]).exp().detach()
                   * (k_estimates(laws[0, a], other[0, a])[name] + k_estimates(laws[1 + a, b], other[1 + a, b])[name])
                   for a, b in pairs)
        row(f"{name} of each token as a loss: value; first logits", [loss, *gradient(loss, table)[0]])
    print(f"{'the sequence KL':<46}{sequence:>10.4f}")


def k_estimates(logps, ref):
    """k1, k2, k3 of KL(policy || reference)."""
    log_ratio = ref - logps
    return {"k1": -log_ratio, "k2": log_ratio**2 / 2, "k3": log_ratio.exp() - log_ratio - 1}


def gradient(value, logits):
    """Of a scalar with respect to the logits."""
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


# ---- denominators.md ----------------------------------------------------------------------------------------------------
def denominators():
    """Rollouts of 2, 3 and 45 tokens, in micro-batches of two and one: what one token of each weighs."""
    mask = torch.tensor([[t < length for t in range(45)] for length in (2, 3, 45)])
    cuts, cut_all = [[0, 1], [2]], [[0, 1, 2]]
    for loss in ("grpo", "dapo"):
        for name, rows in (("of the update", cut_all), ("of each micro-batch, then a mean of the two", cuts)):
            weights = torch.zeros(3)
            for part in rows:
                w = token_weights(mask[part], loss, num_rollouts=len(part), num_tokens=int(mask[part].sum()),
                                  max_action_tokens=1)
                weights[part] = w[:, 0].double() / len(rows)
            row(f"{loss}, counts {name}"[:46], weights)
            row("    x tokens: weight of the rollout", weights * torch.tensor([2, 3, 45]))
    full = torch.tensor([3.0, -1.0])  # gradients of two ranks' sums
    print(f"two ranks with gradients {full.tolist()}: sum {full.sum()}, FSDP's mean {full.mean()}, "
          f"mean of 2 x each {(2 * full).mean()}")


# ---- one_distribution.md ------------------------------------------------------------------------------------------------
def one_distribution():
    """A first token of two, then one of three. After the first one, whatever follows is right: there is nothing to choose."""
    logits = torch.tensor([2.0, 1.0, 0.0], requires_grad=True)
    scored = logits.log_softmax(dim=0)  # at temperature 1
    row("scored, pi", scored.exp())
    top_2, first_out = torch.tensor([2.0, 1.0, -math.inf]), torch.tensor([-math.inf, 1.0, 0.0])
    for name, sampled in (("temperature 1", logits), ("temperature 0.5", logits / 0.5), ("temperature 2", logits / 2),
                          ("top-2", top_2), ("the first id suppressed", first_out)):
        sampled = sampled.detach().softmax(dim=0)
        row(f"{name}: sampled, mu", sampled)
        for state, advantage in (("right", 0.5), ("wrong", -0.5)):  # half of the first tokens lead to success
            loss = (0.5 * sampled * advantage * scored).sum()  # 0.5: the chance of the state
            row(f"    gradient where all that follows is {state}", gradient(loss, logits))
        row("    gap", [(sampled.log() - scored)[sampled > 0].abs().max()])


NOTES = {each.__name__: each for each in (policy_gradient, normalisation, kl, denominators,
                                         one_distribution)}

if __name__ == "__main__":
    for name in sys.argv[1:] or NOTES:
        print(f"---- {name}")
        NOTES[name]()
