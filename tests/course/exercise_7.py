"""Exercise 7: one update of the policy, over micro-batches and ranks."""
from course import Exercise, Rule, Wrong

CALL = "(loss * dist.get_world_size()).backward()"
CLIP = """\
grad_norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm)
        grad_norm = grad_norm.full_tensor().item()"""
TAKEN = "Take --updates_per_batch optimizer steps on the micro-batches of all ranks, all together."
METRICS = """\
Returns the metrics loss, kl, entropy, clipped, gap, tokens, grad_norm and skipped, the same on
    all ranks: those of the last optimizer step, but `gap` of the first, when the policy is still
    the one that sampled. The log-probs of the first pass are the old ones of the later passes.
    Where loss or gradient is not finite, that step and those after it on the same batch are left
    out: the metrics are those of that step, and `skipped` is 1 in place of 0."""

SAMPLED_OLD = [
    ("train.py", METRICS, """\
Returns the metrics loss, kl, entropy, clipped, gap, tokens, grad_norm and skipped, the same on
    all ranks: those of the last optimizer step, but `gap` of the first: the mean of |log-prob as
    sampled - as scored| over the action tokens of all ranks. The old log-probs are those of the
    sampler, `sampled_logps` of a batch, in the first pass too: so the ratio corrects what sampling
    and scoring round differently (arXiv 1707.06347, eq. 7). Where loss or gradient is not finite,
    that step and those after it on the same batch are left out: the metrics are those of that
    step, and `skipped` is 1 in place of 0."""),
    ("train.py", """\
        for i, (batch, ref, old) in enumerate(zip(batches, ref_logps, old_logps, strict=True)):
""", """        for i, (batch, ref) in enumerate(zip(batches, ref_logps, strict=True)):
"""),
    ("train.py", "old_logps, gaps = [None] * len(batches), []\n    policy",
     "gap = None\n    policy"),
    ("train.py", "old_logps=old, ref_logps=ref, beta",
     "old_logps=batch.sampled_logps, ref_logps=ref,\n                beta"),
    ("train.py", """            if old is None:
                old_logps[i] = logps.detach()
                gaps.append((logps - batch.sampled_logps)[batch.action_mask].abs().max().item())
""", """            if i < num_real:
                distances = (logps - batch.sampled_logps)[batch.action_mask].abs()
                sums["distance"] += distances.sum().item()
"""),
    ("train.py", "        sums = all_reduce(sums)\n", """        sums = all_reduce(sums)
        if gap is None:
            gap = sums["distance"] / max(counts["tokens"], 1)
"""),
    ("train.py", """
    gap = torch.tensor(gather(gaps)).max().item()  # NaN if one of them is, unlike Python's max
""", "\n"),
    ("data/README.md", "| `gap` | max \\|log-prob as sampled − as scored\\| |",
     "| `gap` | mean \\|log-prob as sampled − as scored\\| |"),
    ("data/README.md", "- `clipped` is 0 with one update a batch.\n", ""),
    ("data/README.md", """ With one update a batch this does no harm, as the old
  log-probs are those of the scoring pass and the ratio is 1.""", """ The ratio corrects it: the
  old log-probs are those of the sampler."""),
    ("data/README.md", """ With more updates the ratio still starts at 1;
  what remains is that the samples come from a distribution that is slightly another.""", ""),
]
TOKEN_MEANS = [
    ("train.py", METRICS, METRICS + """

    `kl`, `entropy` and `clipped` are plain means over the action tokens of all ranks, whatever
    --loss weighs. Each number of the gradient is cut to within -max_grad_norm and max_grad_norm,
    alone; `grad_norm` is the norm of the whole gradient before."""),
    ("train.py", 'gradients are scaled down to this norm"',
     'numbers of the gradient are cut to plus or minus this"'),
    ("train.py", """            loss, parts = policy_loss(
                logps, batch.advantages, weights, old_logps=old, ref_logps=ref, beta=config.beta,
                clip_low=config.clip_low, clip_high=config.clip_high)
""", """            loss_of = partial(
                policy_loss, logps, batch.advantages, old_logps=old, ref_logps=ref,
                beta=config.beta, clip_low=config.clip_low, clip_high=config.clip_high)
            loss, _ = loss_of(weights)
            is_counted = batch.action_mask.float() * (i < num_real)  # (B, T)
            with torch.no_grad():
                _, parts = loss_of(is_counted)
"""),
    ("train.py", '"weight": weights.sum(), "entropy": (weights * entropy).sum()}',
     '"entropy": (is_counted * entropy).sum()}'),
    ("train.py", CLIP, """parameters = list(policy.model.parameters())
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf).full_tensor().item()
        for p in parameters:
            p.grad.clamp_(-config.max_grad_norm, config.max_grad_norm)"""),
    ("train.py", """\
    weight = sums["weight"] or 1.0  # below 1 with `dr_grpo`; 0 if no token was sampled
    means = {name: sums[name] / weight for""", """\
    means = {name: sums[name] / max(counts["tokens"], 1) for"""),
    ("train.py", "from dataclasses import asdict, dataclass, replace\n",
     "from dataclasses import asdict, dataclass, replace\nfrom functools import partial\n"),
    ("data/README.md", """`loss`, `kl`, `clipped` and `entropy` are weighted over action
  tokens as in the loss.""", """`loss` is weighted over action tokens by --loss;
  `kl`, `clipped` and `entropy` are plain means over them."""),
]

EXERCISE = Exercise(
    number=7, title="One update over micro-batches and ranks", hours=2.5,
    blanks={"train.py": ["update"]},
    drops={},
    rules={
        "first_pass": Rule(
            "The log-probs of the first pass are the old ones; metrics are weighted as the loss "
            "is; `gap` is the largest distance; the gradient is scaled down to its largest norm.",
            []),
        "sampled_old": Rule(
            "The old log-probs are the sampler's, from the first pass on; `gap` is a mean over "
            "the action tokens of all ranks.", SAMPLED_OLD),
        "token_means": Rule(
            "`kl`, `entropy` and `clipped` are plain means over action tokens; each number of the "
            "gradient is cut by itself.", TOKEN_MEANS),
    },
    wrong=[
        Wrong("counts_of_this_rank", "each rank divides by its own rollouts and tokens",
              "train.py", 'counts = all_reduce({"rollouts"', 'counts = dict({"rollouts"'),
        Wrong("counts_with_filler", "the rollouts that only fill up are counted", "train.py",
              "real = batches[:num_real]", "real = batches"),
        Wrong("length_of_a_turn", "dr_grpo divides by the length of one turn", "train.py",
              "config.limits().max_turns * config.max_new_tokens", "config.max_new_tokens"),
        Wrong("length_of_an_episode", "in step mode dr_grpo divides by the turns of an episode",
              "train.py", "config.limits().max_turns *", "config.max_turns *"),
        Wrong("passes_ignored", "--updates_per_batch does nothing", "train.py",
              "for _ in range(config.updates_per_batch):", "for _ in range(1):"),
        Wrong("clip_low_ignored", "--clip_low does not reach the loss", "train.py",
              "clip_low=config.clip_low,", "clip_low=0.2,"),
        Wrong("reference_is_old", "the KL is taken to the policy before the update", "train.py",
              "ref_logps=ref, beta", "ref_logps=old, beta"),
        Wrong("loss_ignored", "--loss does not reach the weights", "train.py",
              "batch.action_mask, config.loss, num", 'batch.action_mask, "grpo", num'),
        Wrong("old_of_the_sampler", "ratios are against the sampler, though the first pass is old",
              "train.py", "old_logps=old, ref_logps=ref",
              "old_logps=batch.sampled_logps, ref_logps=ref"),
        Wrong("clipped_each_micro_batch", "the norm is cut after each micro-batch", "train.py",
              CALL, CALL + "\n            torch.nn.utils.clip_grad_norm_(\n"
              "                policy.model.parameters(), config.max_grad_norm)"),
        Wrong("norm_after_the_cut", "`grad_norm` is logged after it was cut", "train.py", CLIP,
              CLIP + "\n        grad_norm = min(grad_norm, config.max_grad_norm)"),
        Wrong("norm_of_the_shard", "each rank cuts by the norm of its shard", "train.py", CLIP,
              """shards = [p.grad.to_local() for p in policy.model.parameters()]
        grad_norm = torch.nn.utils.get_total_norm(shards).item()
        for shard in shards:
            shard.mul_(min(1.0, config.max_grad_norm / grad_norm))"""),
        Wrong("metrics_of_this_rank", "each rank logs its own sums", "train.py",
              "sums = all_reduce(sums)", "sums = dict(sums)"),
        Wrong("gap_of_this_rank", "each rank logs its own gap", "train.py",
              "torch.tensor(gather(gaps)).max()", "torch.tensor(gaps).max()"),
        Wrong("gap_signed", "the largest difference, not the largest distance", "train.py",
              "[batch.action_mask].abs().max()", "[batch.action_mask].max()"),
        Wrong("gap_of_the_last_pass", "`gap` also measures what the update has changed", "train.py",
              """                old_logps[i] = logps.detach()
                gaps""", """                old_logps[i] = logps.detach()
            if sums:
                gaps"""),
        Wrong("metrics_of_all_passes", "metrics add up over the optimizer steps", "train.py",
              "    for _ in range(config.updates_per_batch):\n        sums = Counter()\n",
              "    sums = Counter()\n    for _ in range(config.updates_per_batch):\n"),
        Wrong("weights_of_dr_grpo", "means are not divided by the sum of the weights", "train.py",
              'weight = sums["weight"] or 1.0', "weight = 1.0"),
        Wrong("means_over_rollouts", "metrics are means over rollouts, the loss has other weights",
              "train.py", "{name: sums[name] / weight for",
              '{name: sums[name] / counts["rollouts"] for'),
        Wrong("poisoned_step", "a step is taken on numbers that are not finite", "train.py",
              "        if is_finite:\n", "        if True:\n"),
        Wrong("only_the_loss_is_checked", "the gradient may overflow where the loss does not",
              "train.py", 'math.isfinite(sums["loss"]) and math.isfinite(grad_norm)',
              'math.isfinite(sums["loss"])'),
        Wrong("skipped_gradient_stays", "the gradient of a skipped step is added to the next one",
              "train.py",
              "        optimizer.zero_grad()\n        if not is_finite:\n            break\n",
              "        if not is_finite:\n            break\n        optimizer.zero_grad()\n"),
        Wrong("gradient_stays", "gradients are never set to zero", "train.py",
              "        optimizer.zero_grad()\n        if not", "        if not"),
    ],
)
