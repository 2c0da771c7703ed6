"""GRPO, written out by hand: advantages, token log-probs, KL, loss, and attention that shares the
prompt of a group. Tensors in, tensors out.

One update, for B = P·G rollouts of T tokens (arXiv 2402.03300, eq. 3, with the choices of the
released Visual-ARFT):

    advantage_i = (reward_i - mean of its group) / (std of its group + 1e-4)
    loss = - sum_i sum_t weight_it · [ min(ratio_it · A_i, clip(ratio_it) · A_i) - beta · KL_it ]

`grpo`, `dr_grpo` and `dapo` differ in `weight`; `dr_grpo` also leaves out the division by the std.
Weights are counted once per update, over all micro-batches and ranks. So the gradient and the
logged loss do not depend on how the rollouts are cut into micro-batches, padded, ordered or spread.

Left out on purpose: critics, reward models, learned baselines, entropy bonuses, importance weights
per sequence.

Legend: P prompts, G samples a prompt, B = P·G rollouts, T tokens, V vocabulary, H hidden size,
N tokens of a packed row, n tokens of a chunk, d size of an attention head; d_x is the gradient of
the loss with respect to x. Log-probs are in nats.
"""
import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

LOSSES = ("grpo", "dr_grpo", "dapo")


def group_advantages(rewards: Tensor, loss: str = "grpo") -> Tensor:
    """Rewards of P groups -> advantages. (P, G) float -> (P, G) float32.

    (r - mean) / (std + 1e-4), where the std divides by G - 1, as in TRL 0.14 and so in the released
    code; `dr_grpo` (arXiv 2503.20783) only subtracts the mean. A group whose rewards are all equal
    gets exactly 0. Groups are rows, so two equal prompts never merge. Raises ValueError for G = 1,
    where every advantage would be 0 and nothing could be learnt.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError("rewards must be (prompts, samples >= 2), "
                         f"got {tuple(rewards.shape)}: raise --group_size")
    rewards = rewards.float()
    centred = rewards - rewards.mean(dim=1, keepdim=True)  # (P, G)
    all_equal = (rewards == rewards[:, :1]).all(dim=1)  # (P,)
    centred[all_equal] = 0.0  # the mean of equal floats can be off by one ulp
    if loss == "dr_grpo":
        return centred
    std = rewards.std(dim=1, keepdim=True)  # (P, 1)
    return centred / (std + 1e-4)


def token_logps(hidden: Tensor, lm_head: Tensor, targets: Tensor, *, temperature: float,
                suppressed: Tensor, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """Log-prob of each target, and the entropy of the distribution there (without a gradient).

    hidden (N, H), lm_head (V, H), targets (N,) int64. suppressed: int64 ids that are never sampled.
    They are taken out of the softmax here too, so that tokens are scored under the distribution
    that they were sampled from. Returns two (N,) tensors in nats, float32 (float64 for float64).
    The first is differentiable in hidden and lm_head. Logits are hidden · lm_headᵀ / temperature.
    At most chunk·V exist at a time, never N·V: the backward pass computes them again. The
    gradient of lm_head is added up in float32. N may be 0.
    """
    return _TokenLogps.apply(hidden, lm_head, targets, temperature, suppressed, chunk)


class _TokenLogps(torch.autograd.Function):
    """With z = hidden · lm_headᵀ / temperature: d logp_t / dz = onehot(t) - softmax(z).

    By hand, because `torch.utils.checkpoint` around each chunk takes 1.5 times as long and holds
    the head's gradient, V·H numbers, up to three times.
    """

    @staticmethod
    def forward(ctx, hidden, lm_head, targets, temperature, suppressed, chunk):
        ctx.save_for_backward(hidden, lm_head, targets, suppressed)
        ctx.temperature = temperature
        ctx.chunk = chunk
        logps, entropy = [], []
        for h, t in zip(hidden.split(chunk), targets.split(chunk)):
            log_probs = _log_probs(h, lm_head, temperature, suppressed)  # (n, V)
            logps.append(log_probs.gather(1, t[:, None]).squeeze(1))  # (n,)
            probs = log_probs.exp_()
            entropy.append(torch.special.entr(probs).sum(dim=1))  # (n,)
        entropy = torch.cat(entropy)  # (N,)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logps), entropy

    @staticmethod
    def backward(ctx, d_logps, d_entropy):
        hidden, lm_head, targets, suppressed = ctx.saved_tensors
        d_targets = d_logps / ctx.temperature  # (N,) of their logits
        d_hidden = []
        sum_dtype = _at_least_float32(lm_head)  # the chunks add up here, and bf16 would lose digits
        d_head = torch.zeros_like(lm_head, dtype=sum_dtype)
        chunks = zip(*(x.split(ctx.chunk) for x in (hidden, targets, d_targets)))
        for h, t, d in chunks:
            log_probs = _log_probs(h, lm_head, ctx.temperature, suppressed)  # (n, V)
            d_logits = log_probs.exp_()
            d_logits.mul_(-d[:, None])
            d_logits.scatter_add_(1, t[:, None], d[:, None])
            d_logits = d_logits.to(h.dtype)
            d_hidden.append(d_logits @ lm_head)  # (n, H)
            d_head += d_logits.T @ h  # (V, H)
        d_head = d_head.to(lm_head.dtype)
        return torch.cat(d_hidden), d_head, None, None, None, None


def _log_probs(hidden: Tensor, lm_head: Tensor, temperature: float,
               suppressed: Tensor) -> Tensor:
    """(n, H) hidden states -> (n, V) log-probs; in place where it can be, as they are large."""
    logits = linear(hidden, lm_head)  # (n, V)
    logits = logits.to(_at_least_float32(logits))
    logits.div_(temperature)
    logits.index_fill_(1, suppressed, float("-inf"))
    return logits.log_softmax(dim=1)


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def kl_k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """k3 estimate of KL(policy || reference) per token: q/p - log(q/p) - 1 (Schulman 2020).

    Unbiased under the policy, never negative.
    """
    log_ratio = ref_logps - logps
    return log_ratio.exp() - log_ratio - 1.0


def token_weights(action_mask: Tensor, loss: str, *,
                  num_rollouts: int, num_tokens: int, max_action_tokens: int) -> Tensor:
    """Weight of every token in the loss. action_mask (B, T) -> (B, T) float32.

    All counts are of the whole update. num_rollouts: rollouts over all micro-batches and ranks;
    num_tokens: their action tokens; max_action_tokens: the most that a rollout can have.

    `grpo`: mean over rollouts of the mean over tokens. `dapo` (arXiv 2503.14476): mean over all
    tokens. `dr_grpo`: mean over rollouts of the sum over tokens, divided by max_action_tokens. A
    rollout without action tokens weighs 0. Raises ValueError for another loss.
    """
    mask = action_mask.float()
    if loss == "grpo":
        lengths = mask.sum(dim=1, keepdim=True)  # (B, 1)
        return mask / lengths.clamp(min=1) / num_rollouts
    if loss == "dapo":
        return mask / max(num_tokens, 1)
    if loss == "dr_grpo":
        return mask / (num_rollouts * max_action_tokens)
    known = ", ".join(LOSSES)
    raise ValueError(f"unknown loss {loss!r}: one of {known}")


def policy_loss(logps: Tensor, advantages: Tensor, weights: Tensor, *,
                old_logps: Tensor | None = None, ref_logps: Tensor | None = None,
                beta: float = 0.0, clip_low: float = 0.2,
                clip_high: float = 0.2) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one micro-batch, on the scale of the whole update: add up over micro-batches.

    logps, weights, old_logps, ref_logps: (B, T) float32; advantages: (B,). old_logps=None means
    that the batch is used once: the ratio is 1, and its gradient is that of logps. ref_logps=None
    means no KL term, and `kl` is 0. Where a weight is 0, the other tensors may hold anything, NaN
    too: it reaches neither the loss nor the gradient.

    Returns the scalar loss and two sums to be added up over micro-batches and ranks too: `kl` (k3)
    and `clipped` (tokens whose gradient the clip cuts). They are weighted as the loss is; divided
    by the sum of all weights they are means.
    """
    old_logps = logps.detach() if old_logps is None else old_logps
    ref_logps = logps.detach() if ref_logps is None else ref_logps
    # Padding and observations may hold any number, even infinities. They are replaced before
    # anything is computed: a gradient through exp(inf) is NaN even where a mask hides its value.
    logps, old_logps, ref_logps = (
        torch.where(weights > 0, x, 0.0) for x in (logps, old_logps, ref_logps))
    ratio = (logps - old_logps).exp()  # (B, T)
    advantages = advantages[:, None]  # (B, 1)
    plain = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    kl = kl_k3(logps, ref_logps)
    objective = torch.minimum(plain, clipped) - beta * kl
    loss = -(weights * objective).sum()
    sums = {"kl": weights * kl,
            "clipped": weights * (clipped < plain)}
    metrics = {name: values.sum().detach() for name, values in sums.items()}
    return loss, metrics


# The prompt is computed once for the G samples of a group, since they differ only behind it
# (prefix sharing, as in arXiv 2506.05433). The result is exact.
Segments = list[tuple[int, list[int]]]  # for each group: tokens of its prompt, of each sample


def packed_attention(query: Tensor, key: Tensor, value: Tensor,
                     segments: Segments, scaling: float) -> Tensor:
    """Causal attention in a packed row `prompt | sample | … | sample | prompt | …`.

    A sample sees its prompt and itself. query (1, heads, N, d), key and value (1, key heads, N, d),
    where heads / key heads neighbouring queries share a key; returns (1, heads, N, d). There is no
    padding and no N x N mask: the prompt's part is computed once for a group, the samples' as if
    each were alone.
    """
    repeats = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(repeats, dim=1)  # (1, heads, N, d)
    value = value.repeat_interleave(repeats, dim=1)
    sizes = []
    for prompt, samples in segments:
        sizes += [prompt, *samples]
    # One split instead of many slices: the gradient of each slice would be N tokens long.
    parts = zip(*(x.split(sizes, dim=2) for x in (query, key, value)))
    outputs = []
    for prompt, samples in segments:
        q, prompt_key, prompt_value = next(parts)
        outputs.append(scaled_dot_product_attention(
            q, prompt_key, prompt_value, is_causal=True, scale=scaling))
        for size in samples:
            q, k, v = next(parts)
            k = torch.cat([prompt_key, k], dim=2)  # (1, heads, prompt + size, d)
            v = torch.cat([prompt_value, v], dim=2)
            sees = torch.ones(size, prompt + size, dtype=torch.bool, device=q.device)
            sees = sees.tril(prompt)  # the whole prompt, and of itself no later token
            outputs.append(scaled_dot_product_attention(
                q, k, v, attn_mask=sees, scale=scaling))
    return torch.cat(outputs, dim=2)
