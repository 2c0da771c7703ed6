"""GRPO, written out by hand: advantages, token log-probs, KL, loss, and attention that shares a group's prompt. Tensors in,
tensors out.

One update, for B = P·G rollouts of T tokens (arXiv 2402.03300, eq. 3, with the choices of the released Visual-ARFT):

    advantage_i = (reward_i - mean of its group) / (std of its group + 1e-4)
    loss        = - sum_i sum_t weight_it · [ min(ratio_it · A_i, clip(ratio_it) · A_i) - beta · KL_it ]

The whole difference between `grpo`, `dr_grpo` and `dapo` is in `weight` (and in the std, which `dr_grpo` leaves out).
Weights are counted once per update, over all micro-batches and ranks, so gradient and logged loss do not depend on how the
rollouts are cut into micro-batches, padded, ordered or spread.

Left out on purpose: critics, reward models, learned baselines, entropy bonuses, importance weights per sequence.

Legend: P prompts, G samples a prompt, B = P·G rollouts, T tokens, V vocabulary, H hidden size, N tokens of a packed row,
d size of an attention head. Log-probs are in nats.
"""
import torch
from torch.nn.functional import scaled_dot_product_attention

LOSSES = ("grpo", "dr_grpo", "dapo")


def group_advantages(rewards: torch.Tensor, loss: str = "grpo") -> torch.Tensor:
    """Rewards of P groups -> advantages. (P, G) float -> (P, G) float32.

    (r - mean) / (std + 1e-4) with ddof 1, as TRL 0.14 and so the released code; `dr_grpo` (arXiv 2503.20783) only
    subtracts the mean. A group whose rewards are all equal gets exactly 0. Groups are rows: two equal prompts never merge.
    Raises ValueError for G = 1, where every advantage would be 0 and nothing could be learnt.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (prompts, samples >= 2), got {tuple(rewards.shape)}: raise --group_size")
    rewards = rewards.float()
    centred = rewards - rewards.mean(dim=1, keepdim=True)  # (P, G)
    centred[(rewards == rewards[:, :1]).all(dim=1)] = 0.0  # a mean of equal floats can be off by one ulp
    if loss == "dr_grpo":
        return centred
    return centred / (rewards.std(dim=1, keepdim=True) + 1e-4)  # (P, G)


def token_logps(hidden: torch.Tensor, lm_head: torch.Tensor, targets: torch.Tensor, *, temperature: float,
                suppressed: torch.Tensor, chunk: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each target under the law that sampled it, and that law's entropy (no gradient).

    hidden (N, H), lm_head (V, H), targets (N,) int64, suppressed (S,) int64: ids that sampling never emits, taken out of
    the softmax here too, so that sampler and scorer are one distribution. Returns two (N,) tensors in nats, float32
    (float64 for float64).
    At most chunk·V logits exist at a time, never N·V: the backward pass computes them again, and keeps N sums for it.
    """
    return _TokenLogps.apply(hidden, lm_head, targets, temperature, suppressed, chunk)


class _TokenLogps(torch.autograd.Function):
    """With p = softmax(z), z = hidden · lm_headᵀ / temperature: dlogp_t / dz = onehot(t) - p, and two products more."""

    @staticmethod
    def forward(ctx, hidden, lm_head, targets, temperature, suppressed, chunk):
        logps, entropy, norms = [], [], []
        for h, t in zip(hidden.split(chunk), targets.split(chunk)):
            logits = _logits(h, lm_head, temperature, suppressed)  # (n, V)
            norms.append(logits.logsumexp(dim=1))  # (n,)
            logps.append(logits.gather(1, t[:, None]).squeeze(1) - norms[-1])
            p = (logits - norms[-1][:, None]).exp_()
            logits.index_fill_(1, suppressed, 0.0)  # p·z is 0 there, not 0 · -inf
            entropy.append(norms[-1] - torch.einsum("nv,nv->n", p, logits))
        ctx.save_for_backward(hidden, lm_head, targets, suppressed, torch.cat(norms))
        ctx.temperature, ctx.chunk = temperature, chunk
        entropy = torch.cat(entropy)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logps), entropy

    @staticmethod
    def backward(ctx, upstream, _):
        hidden, lm_head, targets, suppressed, norms = ctx.saved_tensors
        d_hidden, d_head, start = torch.empty_like(hidden), torch.empty_like(lm_head), 0.0
        by_token = (hidden, targets, norms, upstream / ctx.temperature, d_hidden)
        for h, t, norm, u, d in zip(*(x.split(ctx.chunk) for x in by_token)):
            p = _logits(h, lm_head, ctx.temperature, suppressed).sub_(norm[:, None]).exp_()  # (n, V)
            d_logits = p.mul_(-u[:, None]).scatter_add_(1, t[:, None], u[:, None]).to(h.dtype)
            torch.mm(d_logits, lm_head, out=d)
            torch.addmm(d_head, d_logits.T, h, beta=start, out=d_head)  # 0 at first: no pass over V·H zeros
            start = 1.0
        return d_hidden, d_head, None, None, None, None


def _logits(hidden, lm_head, temperature, suppressed):
    logits = torch.nn.functional.linear(hidden, lm_head)  # (n, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(temperature)
    return logits.index_fill_(1, suppressed, float("-inf"))


def kl_k1(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """k1 estimate of KL(policy || reference) per token: log p - log q. Unbiased under the policy, may be negative."""
    return logps - ref_logps


def kl_k3(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """k3 estimate of KL(policy || reference) per token: q/p - log(q/p) - 1 (Schulman 2020). Unbiased, never negative."""
    log_ratio = ref_logps - logps
    return log_ratio.exp() - log_ratio - 1.0


def token_weights(action_mask: torch.Tensor, loss: str, *, num_rollouts: int, num_tokens: int,
                  max_tokens: int) -> torch.Tensor:
    """Weight of every token in the loss. action_mask (B, T) -> (B, T) float32; all counts are of the whole update.

    num_rollouts: rollouts over all micro-batches and ranks; num_tokens: their action tokens; max_tokens: the longest
    possible rollout, a constant. `grpo`: mean over rollouts of the mean over tokens. `dapo` (arXiv 2503.14476): mean over
    all tokens. `dr_grpo`: sum over tokens over a constant length. A rollout without action tokens weighs 0.
    """
    mask = action_mask.float()
    if loss == "grpo":
        return mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / num_rollouts  # (B, T)
    if loss == "dapo":
        return mask / max(num_tokens, 1)
    if loss == "dr_grpo":
        return mask / (num_rollouts * max_tokens)
    raise ValueError(f"unknown loss {loss!r}: one of {', '.join(LOSSES)}")


def policy_loss(logps: torch.Tensor, advantages: torch.Tensor, weights: torch.Tensor, *,
                old_logps: torch.Tensor | None = None, ref_logps: torch.Tensor | None = None, beta: float = 0.0,
                clip_low: float = 0.2, clip_high: float = 0.2) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of one micro-batch, already on the scale of the whole update: add it up over micro-batches and ranks.

    logps, weights, old_logps, ref_logps: (B, T) float32; advantages: (B,). old_logps=None means that the batch is used
    once: the ratio is 1 and only its gradient is left. ref_logps=None means no KL term. Returns the scalar loss and sums
    to be added up likewise, weighted as the loss is: `kl` (k3) and `clipped` (tokens where the clip cuts the gradient). Over
    the sum of all weights they are means.
    """
    old_logps = logps.detach() if old_logps is None else old_logps
    ref_logps = logps.detach() if ref_logps is None else ref_logps
    # Padding and observations may hold any number, infinities too: out of the sums before anything is computed from them,
    # since a gradient through exp(inf) is NaN even where a mask hides its value.
    logps, old_logps, ref_logps = (torch.where(weights > 0, x, 0.0) for x in (logps, old_logps, ref_logps))
    ratio = (logps - old_logps).exp()  # (B, T)
    advantages = advantages[:, None]  # (B, 1)
    plain = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    kl = kl_k3(logps, ref_logps)
    loss = -(weights * (torch.minimum(plain, clipped) - beta * kl)).sum()
    return loss, {"kl": (weights * kl).sum().detach(), "clipped": (weights * (clipped < plain)).sum().detach()}


# The G samples of a prompt differ only behind it: it is attended to by all of them, but computed once (prefix sharing, as in
# arXiv 2506.05433). This is exact.
Segments = list[tuple[int, list[int]]]  # of a packed row: for each group the tokens of its prompt, and of each sample


def packed_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments,
                     scaling: float) -> torch.Tensor:
    """Causal attention in a packed row `prompt | sample | … | sample | prompt | …`, where a sample sees its prompt and itself.

    query (1, heads, N, d), key and value (1, key heads, N, d); returns (1, heads, N, d). Without padding and without an
    N x N mask: a group costs as many products as its samples would alone, less G - 1 times those within the prompt.
    """
    sizes = [size for prompt, samples in segments for size in (prompt, *samples)]
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)  # (1, heads, N, d)
    # One split instead of many slices: the gradient of each slice would be a row of N.
    parts = zip(*(x.split(sizes, dim=2) for x in (query, key, value)))
    outputs = []
    for prompt, samples in segments:
        q, prompt_key, prompt_value = next(parts)
        outputs.append(scaled_dot_product_attention(q, prompt_key, prompt_value, is_causal=True, scale=scaling))
        for size in samples:
            q, k, v = next(parts)
            sees = torch.ones(size, prompt + size, dtype=torch.bool, device=q.device).tril(prompt)  # all of the prompt
            k, v = torch.cat([prompt_key, k], dim=2), torch.cat([prompt_value, v], dim=2)  # (1, heads, prompt + size, d)
            outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scaling))
    return torch.cat(outputs, dim=2)
