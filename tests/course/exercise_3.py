"""Exercise 3: from the rewards of a group to its advantages."""
from course import Exercise, Rule, Wrong

FILE = "grpo.py"
# What the file's header and the function's docstring and body say; each stands there once.
HEADER = "advantage_i = (reward_i - mean of its group) / (std of its group + 1e-4)"
HEADER_DR_GRPO = "`dr_grpo` also leaves out the division by the std."
FORMULA = """\
    (r - mean) / (std + 1e-4), where the std divides by G - 1, as in TRL 0.14 and so in the released
    code; `dr_grpo` (arXiv 2503.20783) only subtracts the mean. A group whose rewards are all equal
    gets exactly 0. Groups are rows, so two equal prompts never merge. Raises ValueError for G = 1,
    where every advantage would be 0 and nothing could be learnt.
"""
STD = "    std = rewards.std(dim=1, keepdim=True)  # (P, 1)\n"
DIVIDED = "    return centred / (std + 1e-4)\n"
CENTRED = "centred = rewards - rewards.mean(dim=1, keepdim=True)"

EXERCISE = Exercise(
    number=3, title="Advantages of a group", hours=0.5,
    blanks={FILE: ["group_advantages"]},
    drops={FILE: []},
    rules={
        "std": Rule(
            "A reward is compared with the mean of its group, and the difference is divided by the "
            "standard deviation of the group (G - 1 below) plus 1e-4.", []),
        "leave_one_out": Rule(
            "A reward is compared with the mean of the G - 1 other rewards of its group (RLOO); "
            "nothing is divided by a standard deviation.", [
                (FILE, HEADER, "advantage_i = reward_i - mean of the other rewards of its group"),
                (FILE, HEADER_DR_GRPO, "`dr_grpo` also\nsubtracts the mean of the whole group."),
                (FILE, FORMULA, """\
    r - mean of the G - 1 other rewards of the group (RLOO, arXiv 2402.14740): a sample is no part
    of its own baseline. There is no std. `dr_grpo` (arXiv 2503.20783) subtracts the mean of all G
    rewards. A group whose rewards are all equal gets exactly 0. Groups are rows, so two equal
    prompts never merge. Raises ValueError for G = 1, where there are no others.
"""),
                (FILE, STD, "    num_samples = rewards.shape[1]\n"),
                (FILE, DIVIDED, "    return centred * num_samples / (num_samples - 1)\n")]),
        "absolute_deviation": Rule(
            "A reward is compared with the mean of its group, and the difference is divided by the "
            "mean absolute deviation of the group plus 1e-4.", [
                (FILE, HEADER, "advantage_i = (reward_i - mean of its group) / "
                               "(mean absolute deviation of its group + 1e-4)"),
                (FILE, HEADER_DR_GRPO,
                 "`dr_grpo` also\nleaves out the division by the mean absolute deviation."),
                (FILE, FORMULA, """\
    (r - mean) / (d + 1e-4), where d is the mean of |r - mean| over all G samples of the group: one
    outlier weighs less in it than in a std, which squares. `dr_grpo` (arXiv 2503.20783) only
    subtracts the mean. A group whose rewards are all equal gets exactly 0. Groups are rows, so two
    equal prompts never merge. Raises ValueError for G = 1, where every advantage would be 0 and
    nothing could be learnt.
"""),
                (FILE, STD, "    deviation = centred.abs().mean(dim=1, keepdim=True)  # (P, 1)\n"),
                (FILE, DIVIDED, "    return centred / (deviation + 1e-4)\n")]),
        "std_of_the_batch": Rule(
            "A reward is compared with the mean of its group, and the difference is divided by the "
            "standard deviation of all P·G rewards (P·G - 1 below) plus 1e-4.", [
                (FILE, HEADER,
                 "advantage_i = (reward_i - mean of its group) / (std of all rewards + 1e-4)"),
                (FILE, FORMULA, """\
    (r - mean) / (std + 1e-4), with the mean of the group and the std of all P·G rewards (arXiv
    2508.08221), which divides by P·G - 1: a group of nearly equal rewards is not blown up.
    `dr_grpo` (arXiv 2503.20783) only subtracts the mean. A group whose rewards are all equal
    gets exactly 0. Groups are rows, so two equal prompts never merge. Raises ValueError for G = 1,
    where every advantage would be 0 and nothing could be learnt.
"""),
                (FILE, STD, "    std = rewards.std()\n")]),
    },
    wrong=[
        Wrong("no_constant_for_small_spreads",
              "the constant is 1e-8: two rewards that differ by rounding are far apart", FILE,
              "centred / (std + 1e-4)", "centred / (std + 1e-8)"),
        Wrong("std_at_least_the_constant",
              "the constant is a floor of the std and not added to it", FILE,
              "centred / (std + 1e-4)", "centred / std.clamp(min=1e-4)"),
        Wrong("variance_for_std", "deviations are divided by the variance", FILE,
              "rewards.std(dim=1, keepdim=True)", "rewards.var(dim=1, keepdim=True)"),
        Wrong("mean_of_the_batch",
              "easy prompts get positive advantages, hard ones negative: the mean is the batch's",
              FILE, CENTRED, "centred = rewards - rewards.mean()"),
        Wrong("mean_over_prompts",
              "the mean runs over prompts: samples are compared with those of other questions",
              FILE, CENTRED, "centred = rewards - rewards.mean(dim=0, keepdim=True)"),
        Wrong("groups_merge", "groups of equal rewards become one, as a dict of groups would do",
              FILE, "rewards = rewards.float()\n",
              "rewards = torch.unique(rewards.float(), dim=0)\n"),
        Wrong("not_centred", "rewards are scaled but not compared: every good sample of an easy "
              "prompt is pushed up", FILE, CENTRED, "centred = rewards.clone()"),
        Wrong("sign", "what is better than its group is made rarer", FILE,
              CENTRED, "centred = rewards.mean(dim=1, keepdim=True) - rewards"),
        Wrong("one_flat_group_silences_all", "one group of equal rewards silences all groups",
              FILE, "centred[all_equal] = 0.0", "centred = centred * (not all_equal.any())"),
        Wrong("first_pair_decides", "a group counts as flat if its first two rewards are equal",
              FILE, "(rewards == rewards[:, :1]).all(dim=1)", "rewards[:, 0] == rewards[:, 1]"),
        Wrong("group_of_one", "a group of one is not refused: NaN reaches the loss", FILE,
              "rewards.shape[1] < 2", "rewards.shape[1] < 1"),
        Wrong("std_in_dr_grpo", "Dr. GRPO divides by the std like the others", FILE,
              '    if loss == "dr_grpo":\n        return centred\n    std =', "    std ="),
        Wrong("no_std_in_dapo", "DAPO takes the advantages of Dr. GRPO", FILE,
              'if loss == "dr_grpo":\n        return centred',
              'if loss != "grpo":\n        return centred'),
        Wrong("dtype_of_the_rewards", "float64 rewards give float64 advantages", FILE,
              "rewards = rewards.float()\n", "rewards = rewards + 0.0\n"),
    ],
)
