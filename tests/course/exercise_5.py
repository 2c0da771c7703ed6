"""Exercise 5: log-probs and entropy of tokens under a large vocabulary, a chunk at a time."""
from course import Exercise, Rule, Wrong

ENTROPY = "entropy.append(torch.special.entr(probs).sum(dim=1))  # (n,)"
WHAT = "and the entropy of the distribution there (without a gradient).\n"
APPLY = "return _TokenLogps.apply(hidden, lm_head, targets, temperature, suppressed, chunk)"
GATHER = "logps.append(log_probs.gather(1, t[:, None]).squeeze(1))  # (n,)"
FILL = 'logits.index_fill_(1, suppressed, float("-inf"))'

EXERCISE = Exercise(
    number=5, title="Log-probabilities of tokens", hours=1.5,
    blanks={"grpo.py": ["token_logps"]},
    drops={"grpo.py": ["_TokenLogps", "_log_probs", "_at_least_float32"]},
    rules={
        "entropy": Rule("The second tensor is Shannon's entropy in nats.", []),
        "evenness": Rule(
            "The second tensor is the entropy as a share of the largest that it can be: from 0 to "
            "1.",
            [("grpo.py", WHAT,
              "and the evenness of the distribution there (without a gradient).\n\n"
              "    The evenness is the entropy divided by its maximum, the log of the number of "
              "ids that are left:\n    1 for a uniform distribution; 0 where only one id is "
              "left.\n"),
             ("grpo.py", "tensors in nats, float32 (float64 for float64).\n",
              "tensors, float32 (float64 for float64).\n    Log-probs are in nats.\n"),
             ("grpo.py", "entropy = torch.cat(entropy)  # (N,)",
              "entropy = torch.cat(entropy)  # (N,)\n"
              "        num_left = len(lm_head) - len(suppressed)\n"
              "        if num_left > 1:\n"
              "            entropy /= entropy.new_tensor(num_left).log()")]),
        "collision": Rule(
            "The second tensor is the collision entropy, -log of the sum of squared probabilities.",
            [("grpo.py", WHAT,
              "and the collision entropy of the distribution there\n"
              "    (without a gradient): -log sum p², Rényi's entropy of order 2.\n"),
             ("grpo.py", ENTROPY, "entropy.append(-probs.square_().sum(dim=1).log())  # (n,)")]),
        "ignored": Rule(
            "Targets of -100 are not scored: their log-prob and entropy are 0, without a gradient.",
            [("grpo.py", "targets (N,) int64. suppressed: int64 ids that are never sampled.\n",
              "targets (N,) int64. A target of -100 is not scored, as in\n"
              "    PyTorch's cross_entropy: its log-prob and entropy are 0, and it has no "
              "gradient.\n"
              "    suppressed: int64 ids that are never sampled.\n"),
             ("grpo.py", GATHER,
              "logp = log_probs.gather(1, t.clamp(min=0)[:, None]).squeeze(1)  # (n,)\n"
              "            logps.append(logp.masked_fill(t < 0, 0.0))"),
             ("grpo.py", ENTROPY,
              "entropy.append(torch.special.entr(probs).sum(dim=1).masked_fill(t < 0, 0.0))"),
             ("grpo.py", "d_targets = d_logps / ctx.temperature",
              "d_targets = d_logps.masked_fill(targets < 0, 0.0) / ctx.temperature"),
             ("grpo.py", "d_logits.scatter_add_(1, t[:, None], d[:, None])",
              "d_logits.scatter_add_(1, t.clamp(min=0)[:, None], d[:, None])")]),
        "temperatures": Rule(
            "Every token may have a temperature of its own, as rollouts of a group may.",
            [("grpo.py", "targets: Tensor, *, temperature: float,",
              "targets: Tensor, *, temperature: float | Tensor,"),
             ("grpo.py", "targets (N,) int64. suppressed: int64 ids that are never sampled.\n",
              "targets (N,) int64. temperature: a number for all tokens,\n"
              "    or (N,) float32, one for each, as rollouts of a group may be sampled at "
              "several.\n"
              "    suppressed: int64 ids that are never sampled.\n"),
             ("grpo.py", APPLY,
              "dtype = _at_least_float32(hidden)\n"
              "    temperature = torch.as_tensor(temperature, dtype=dtype, device=hidden.device)\n"
              "    temperature = temperature.expand(len(hidden))  # (N,)\n    " + APPLY),
             ("grpo.py", "ctx.save_for_backward(hidden, lm_head, targets, suppressed)\n"
              "        ctx.temperature = temperature\n",
              "ctx.save_for_backward(hidden, lm_head, targets, suppressed, temperature)\n"),
             ("grpo.py", "        for h, t in zip(hidden.split(chunk), targets.split(chunk)):\n"
              "            log_probs = _log_probs(h, lm_head, temperature, suppressed)",
              "        chunks = zip(*(x.split(chunk) for x in (hidden, targets, temperature)))\n"
              "        for h, t, scale in chunks:\n"
              "            log_probs = _log_probs(h, lm_head, scale, suppressed)"),
             ("grpo.py", "hidden, lm_head, targets, suppressed = ctx.saved_tensors\n"
              "        d_targets = d_logps / ctx.temperature",
              "hidden, lm_head, targets, suppressed, temperature = ctx.saved_tensors\n"
              "        d_targets = d_logps / temperature"),
             ("grpo.py", "for x in (hidden, targets, d_targets)))\n        for h, t, d in chunks:\n"
              "            log_probs = _log_probs(h, lm_head, ctx.temperature, suppressed)",
              "for x in (hidden, targets, d_targets, temperature)))\n"
              "        for h, t, d, scale in chunks:\n"
              "            log_probs = _log_probs(h, lm_head, scale, suppressed)"),
             ("grpo.py", "def _log_probs(hidden: Tensor, lm_head: Tensor, temperature: float,",
              "def _log_probs(hidden: Tensor, lm_head: Tensor, temperature: Tensor,"),
             ("grpo.py", "logits.div_(temperature)", "logits.div_(temperature[:, None])")]),
    },
    wrong=[
        # ---- the distribution
        Wrong("temperature_multiplied", "logits are multiplied by the temperature", "grpo.py",
              "logits.div_(temperature)", "logits.mul_(temperature)"),
        Wrong("temperature_after_softmax", "log-probs are divided by the temperature, not logits",
              "grpo.py", "return logits.log_softmax(dim=1)",
              "return (logits * temperature).log_softmax(dim=1) / temperature"),
        Wrong("suppressed_after_softmax", "suppressed ids keep their share of the sum", "grpo.py",
              FILL, "logits.sub_(logits.logsumexp(dim=1, keepdim=True))\n"
              f"    {FILL}\n    return logits"),
        Wrong("suppressed_set_to_zero", "suppressed ids get the logit 0", "grpo.py",
              FILL, "logits.index_fill_(1, suppressed, 0.0)"),
        Wrong("softmax_in_bf16", "log-probs are rounded to bf16", "grpo.py",
              "return logits.log_softmax(dim=1)",
              "return logits.to(hidden.dtype).log_softmax(dim=1).to(logits.dtype)"),
        Wrong("bf16_throughout", "log-probs are bf16", "grpo.py",
              "    logits = logits.to(_at_least_float32(logits))\n", ""),
        Wrong("float64_is_cut", "float64 comes back as float32", "grpo.py",
              "return torch.promote_types(tensor.dtype, torch.float32)", "return torch.float32"),
        # ---- the entropy
        Wrong("zero_times_infinity", "a suppressed id makes the entropy NaN", "grpo.py",
              "torch.special.entr(probs).sum(dim=1)", "-(probs * probs.log()).sum(dim=1)"),
        Wrong("entropy_in_bits", "the entropy is in bits", "grpo.py",
              "torch.special.entr(probs).sum(dim=1)",
              "torch.special.entr(probs).sum(dim=1).div(0.6931471805599453)"),
        Wrong("entropy_of_one_token", "only the target's term of the entropy is taken", "grpo.py",
              "torch.special.entr(probs).sum(dim=1)",
              "torch.special.entr(probs).gather(1, t[:, None]).squeeze(1)"),
        Wrong("entropy_sign", "the entropy is negative", "grpo.py",
              "torch.special.entr(probs).sum(dim=1)", "-torch.special.entr(probs).sum(dim=1)"),
        Wrong("entropy_has_a_gradient", "the entropy asks for a gradient", "grpo.py",
              "ctx.mark_non_differentiable(entropy)", "pass"),
        # ---- the gradient
        Wrong("gradient_without_suppressed", "the backward pass forgets the suppressed ids",
              "grpo.py", "log_probs = _log_probs(h, lm_head, ctx.temperature, suppressed)",
              "log_probs = _log_probs(h, lm_head, ctx.temperature, suppressed[:0])"),
        Wrong("gradient_sign", "descent lowers what it should raise", "grpo.py",
              "d_targets = d_logps / ctx.temperature", "d_targets = -d_logps / ctx.temperature"),
        Wrong("gradient_of_targets_only", "the softmax's normaliser has no gradient", "grpo.py",
              "d_logits.mul_(-d[:, None])", "d_logits.zero_()"),
        Wrong("upstream_forgotten", "all log-probs are taken to matter alike", "grpo.py",
              "d_targets = d_logps / ctx.temperature",
              "d_targets = torch.ones_like(d_logps) / ctx.temperature"),
        Wrong("head_without_gradient", "the head is not trained", "grpo.py",
              "return torch.cat(d_hidden), d_head, None", "return torch.cat(d_hidden), None, None"),
        Wrong("hidden_detached", "nothing below the head is trained", "grpo.py",
              "return torch.cat(d_hidden), d_head, None", "return None, d_head, None"),
        Wrong("last_chunk_only", "the head's gradient is that of the last chunk", "grpo.py",
              "d_head += d_logits.T @ h", "d_head = d_logits.T @ h"),
        Wrong("bf16_sums", "the head's gradient is added up over chunks in bf16", "grpo.py",
              "sum_dtype = _at_least_float32(lm_head)", "sum_dtype = lm_head.dtype"),
        # ---- chunks
        Wrong("all_logits_at_once", "N·V logits exist at a time", "grpo.py",
              APPLY, APPLY.replace("chunk)", "max(len(hidden), 1))")),
        Wrong("logits_are_kept", "the logits of all chunks are kept for the backward pass",
              "grpo.py", ENTROPY,
              f'{ENTROPY}\n            ctx.kept = [*getattr(ctx, "kept", []), probs]'),
        Wrong("backward_at_once", "only the forward pass is cut into chunks", "grpo.py",
              "chunks = zip(*(x.split(ctx.chunk) for x",
              "chunks = zip(*(x.split(max(len(x), 1)) for x"),
        Wrong("chunk_ignored", "chunks have another size than was asked for", "grpo.py",
              APPLY, APPLY.replace("chunk)", "16 * chunk)")),
        Wrong("last_chunk_dropped", "tokens behind the last whole chunk are lost", "grpo.py",
              "for h, t in zip(hidden.split(chunk), targets.split(chunk)):",
              "for h, t in list(zip(hidden.split(chunk), targets.split(chunk)))"
              "[:max(len(hidden) // chunk, 1)]:"),
        Wrong("no_tokens_fails", "a micro-batch without action tokens cannot be scored", "grpo.py",
              APPLY, f"assert len(hidden)\n    {APPLY}"),
    ],
)
