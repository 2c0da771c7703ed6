"""Exercise 4: the KL estimate, the weights of tokens, and the clipped objective."""
from course import Exercise, Rule, Wrong

LENGTHS = "return mask / lengths.clamp(min=1) / num_rollouts"
K3 = "return log_ratio.exp() - log_ratio - 1.0"

EXERCISE = Exercise(
    number=4, title="The loss", hours=2.0,
    blanks={"grpo.py": ["kl_k3", "token_weights", "policy_loss"]},
    drops={"grpo.py": []},
    rules={
        "k3": Rule(
            "GRPO as in DeepSeekMath: k3 for the KL, two clips, and a rollout's tokens share its "
            "weight.", []),
        "k2": Rule(
            "The KL is estimated by half the squared log ratio (k2), though the function keeps its "
            "name.",
            [("grpo.py",
              '"""k3 estimate of KL(policy || reference) per token: q/p - log(q/p) - 1 '
              '(Schulman 2020).\n\n'
              '    Unbiased under the policy, never negative.\n',
              '"""k2 estimate of KL(policy || reference) per token: log(q/p)² / 2 '
              '(Schulman 2020).\n\n'
              '    Never negative. Its value is biased, but on policy its gradient is that of the '
              'KL. The name is\n    kept for the code that calls it.\n'),
             ("grpo.py", K3, "return log_ratio.square() / 2"),
             ("grpo.py", "`kl` (k3)", "`kl` (k2)")]),
        "unbiased_kl": Rule(
            "The KL term is k3 times the ratio of new and old policy, as in DeepSeek-V3.2; its "
            "gradient is part of the loss.",
            [("grpo.py",
              "    Returns the scalar loss and two sums",
              "    The KL term of a token is ratio · k3, as in DeepSeek-V3.2 (arXiv 2512.02556, "
              "eq. 7), and is\n    differentiated as a whole. So its gradient is that of the KL, "
              "where k3's is not.\n\n    Returns the scalar loss and two sums"),
             ("grpo.py", "`kl` (k3)\n    and `clipped` (tokens whose gradient the clip cuts). They",
              "`kl`\n    (ratio · k3) and `clipped` (tokens whose gradient the clip cuts).\n"
              "    They"),
             ("grpo.py", "kl = kl_k3(logps, ref_logps)",
              "kl = ratio * kl_k3(logps, ref_logps)")]),
        "dual_clip": Rule(
            "A second clip: a bad token that has become more than three times as probable costs "
            "no more and has no gradient.",
            [("grpo.py",
              "    Returns the scalar loss and two sums",
              "    Dual clip (arXiv 1912.09729): where the advantage is negative, the clipped "
              "objective of a\n    token (without its KL) is bounded below by 3 · advantage. A "
              "ratio above 3 then costs no more,\n    and gives no gradient.\n\n"
              "    Returns the scalar loss and two sums"),
             ("grpo.py", "(tokens whose gradient the clip cuts)",
              "(tokens whose gradient a clip cuts)"),
             ("grpo.py", "    objective = torch.minimum(plain, clipped) - beta * kl\n",
              "    bounded = torch.minimum(plain, clipped)\n"
              '    floor = torch.where(advantages < 0, 3 * advantages, float("-inf"))  # (B, 1)\n'
              "    objective = torch.maximum(bounded, floor) - beta * kl\n"),
             ("grpo.py", "weights * (clipped < plain)",
              "weights * ((clipped < plain) | (bounded < floor))")]),
        "sqrt_length": Rule(
            "With `grpo`, a rollout's sum over tokens is divided by the square root of its length.",
            [("grpo.py",
              "`grpo`: mean over rollouts of the mean over tokens. ",
              "`grpo`: mean over rollouts of the sum over tokens, divided by the square root of "
              "their number.\n    The variance of such a sum grows with its length "
              "(arXiv 2509.07558); divided by the root it does\n    not. "),
             ("grpo.py", LENGTHS, "return mask / lengths.clamp(min=1).sqrt() / num_rollouts")]),
    },
    wrong=[
        # ---- the KL
        Wrong("k1_for_k3", "the plain log ratio is taken for the KL: it is often negative",
              "grpo.py", K3, "return -log_ratio"),
        Wrong("kl_reversed", "policy and reference are exchanged within the estimate", "grpo.py",
              "log_ratio = ref_logps - logps", "log_ratio = logps - ref_logps"),
        Wrong("gradient_of_k1", "the value is k3's, the gradient k1's: on policy its mean is zero",
              "grpo.py", K3, "k3 = log_ratio.exp() - log_ratio - 1.0\n"
              "    return k3.detach() - log_ratio + log_ratio.detach()"),
        Wrong("gradient_of_k2", "the value is k3's, the gradient k2's", "grpo.py",
              K3, "k3, k2 = log_ratio.exp() - log_ratio - 1.0, log_ratio.square() / 2\n"
              "    return k3.detach() + k2 - k2.detach()"),
        Wrong("kl_detached", "the KL is logged and in the loss, but pulls at nothing", "grpo.py",
              "log_ratio = ref_logps - logps", "log_ratio = (ref_logps - logps).detach()"),
        Wrong("kl_without_the_one", "the estimate is off by one: agreement costs", "grpo.py",
              K3, "return log_ratio.exp() - log_ratio"),
        Wrong("beta_in_the_metric", "the logged KL is multiplied by beta", "grpo.py",
              '{"kl": weights * kl,', '{"kl": weights * beta * kl,'),
        Wrong("beta_squared", "the KL is multiplied by beta twice", "grpo.py",
              "kl = kl_k3(logps, ref_logps)", "kl = beta * kl_k3(logps, ref_logps)"),
        # ---- the weights
        Wrong("rollouts_at_hand", "the mean is over the rollouts of the micro-batch", "grpo.py",
              LENGTHS, "return mask / lengths.clamp(min=1) / len(mask)"),
        Wrong("rollouts_with_tokens", "rollouts without action tokens are not counted", "grpo.py",
              LENGTHS, "return mask / lengths.clamp(min=1) / (lengths > 0).sum()"),
        Wrong("tokens_at_hand", "the mean over tokens is over those of the micro-batch", "grpo.py",
              "return mask / max(num_tokens, 1)", "return mask / mask.sum().clamp(min=1)"),
        Wrong("padding_in_the_length", "padding and observations count as a rollout's length",
              "grpo.py", "lengths = mask.sum(dim=1, keepdim=True)",
              "lengths = mask.new_full((len(mask), 1), mask.shape[1])"),
        Wrong("empty_rollout_is_nan", "a rollout without action tokens divides zero by zero",
              "grpo.py", LENGTHS, "return mask / lengths / num_rollouts"),
        Wrong("no_tokens_is_nan", "an update without action tokens divides zero by zero", "grpo.py",
              "return mask / max(num_tokens, 1)", "return mask / torch.tensor(num_tokens)"),
        Wrong("weights_of_a_sum", "every rollout weighs as much as all together", "grpo.py",
              LENGTHS, "return mask / lengths.clamp(min=1)"),
        Wrong("mask_multiplied", "the mask holds weights after the first call", "grpo.py",
              "return mask / max(num_tokens, 1)", "return mask.div_(max(num_tokens, 1))"),
        Wrong("dapo_is_grpo", "the token mean is a mean of means", "grpo.py",
              'if loss == "grpo":', 'if loss in ("grpo", "dapo"):'),
        Wrong("dr_grpo_is_dapo", "Dr. GRPO divides by the tokens that there are", "grpo.py",
              "return mask / (num_rollouts * max_action_tokens)",
              "return mask / max(num_tokens, 1)"),
        # ---- the objective
        Wrong("mean_for_sum", "the weighted terms are averaged over the padded batch", "grpo.py",
              "loss = -(weights * objective).sum()", "loss = -(weights * objective).mean()"),
        Wrong("normalised_again", "the micro-batch is normalised by its own weights", "grpo.py",
              "loss = -(weights * objective).sum()",
              "loss = -(weights * objective).sum() / weights.sum().clamp(min=1e-6)"),
        Wrong("objective_for_loss", "the objective is minimised", "grpo.py",
              "loss = -(weights * objective).sum()", "loss = (weights * objective).sum()"),
        Wrong("no_gradient_on_policy", "the old policy moves along: no gradient", "grpo.py",
              "old_logps = logps.detach() if old_logps is None",
              "old_logps = logps if old_logps is None"),
        Wrong("ratio_upside_down", "the ratio is old over new", "grpo.py",
              "ratio = (logps - old_logps).exp()", "ratio = (old_logps - logps).exp()"),
        Wrong("log_ratio_is_clipped", "the range of the clip is one of log ratios", "grpo.py",
              "clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages",
              "clipped = (logps - old_logps).clamp(-clip_low, clip_high).exp() * advantages"),
        Wrong("clip_low_ignored", "the upper clip is used on both sides", "grpo.py",
              "ratio.clamp(1 - clip_low, 1 + clip_high)",
              "ratio.clamp(1 - clip_high, 1 + clip_high)"),
        Wrong("no_clip", "the clip is counted but not applied", "grpo.py",
              "torch.minimum(plain, clipped)", "plain"),
        Wrong("ratio_for_the_rollout", "one ratio for a rollout: the product over its tokens",
              "grpo.py", "ratio = (logps - old_logps).exp()",
              "ratio = (logps - old_logps).sum(dim=1, keepdim=True).exp().expand_as(logps)"),
        Wrong("advantages_along_tokens", "advantages are laid along the tokens of a square batch",
              "grpo.py", "advantages = advantages[:, None]",
              "advantages = advantages[None, :] if logps.shape[0] == logps.shape[1] "
              "else advantages[:, None]"),
        Wrong("clipped_counts_all_outside", "tokens count as clipped whose gradient is kept",
              "grpo.py", "(clipped < plain)", "(clipped != plain)"),
        Wrong("clipped_is_a_count", "the clipped share is a count of tokens, padding included",
              "grpo.py", "weights * (clipped < plain)", "(clipped < plain).float()"),
        Wrong("padding_masked_too_late", "infinities in padding are multiplied by zero", "grpo.py",
              "torch.where(weights > 0, x, 0.0)", "x * (weights > 0)"),
        Wrong("reference_not_masked", "only the policy's own padding is replaced", "grpo.py",
              "torch.where(weights > 0, x, 0.0) for x in (logps, old_logps, ref_logps))",
              "torch.where(weights > 0, x, y) for x, y in ((logps, 0.0), (old_logps, 0.0), "
              "(ref_logps, ref_logps)))"),
    ],
)
