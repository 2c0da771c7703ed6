"""Exercise 8: the next token of every row, drawn from the distribution that its log-prob is of."""
from course import Exercise, Rule, Wrong

DOC = '''\
    One distribution for both: suppressed ids are taken out, then comes the temperature (below 1e-6:
    the likeliest token, with its log-prob at 1). A uniform number is looked up'''
MASKED = '''\
    logits = logits.float().index_fill(1, suppressed, float("-inf"))
    is_greedy = temperature < 1e-6
'''
SOFTMAX = '''\
    logps = torch.log_softmax(logits / (1.0 if is_greedy else temperature), dim=1)
'''
CUMULATIVE = '''\
        cumulative = logps.double().exp_().cumsum(dim=1)  # (B, V)
'''
LOOKED_UP = CUMULATIVE + '''\
        total = cumulative[:, -1:]  # 1, but for rounding
        uniform = torch.rand(len(logps), 1, dtype=torch.float64, device=logps.device)
        # right=True: never an id of probability 0
        ids = torch.searchsorted(cumulative, uniform * total, right=True)  # (B, 1)
'''
RETURNED = "    return ids.squeeze(1), logps.gather(1, ids).squeeze(1)\n"

MIN_P = [
    ("model.py", DOC, '''\
    One distribution for both: suppressed ids are taken out, then comes the temperature (below 1e-6:
    a temperature of 1, and the likeliest token is taken), then min-p (arXiv 2407.01082):
    ids with less than 0.1 times the probability of the row's likeliest are taken out too, and the
    rest add up to 1 again. A uniform number is looked up'''),
    ("model.py", SOFTMAX, SOFTMAX + '''\
    floor = logps.amax(dim=1, keepdim=True) + math.log(0.1)
    logps = torch.log_softmax(logps.masked_fill(logps < floor, float("-inf")), dim=1)
'''),
]
TOP_P = [
    ("model.py", DOC, '''\
    One distribution for both: suppressed ids are taken out, then comes the temperature (below 1e-6:
    a temperature of 1, and the likeliest token is taken), then top-p (arXiv 1904.09751): the fewest
    likeliest ids whose probabilities add up to 0.9 or more stay, the others are taken out too, and
    the rest add up to 1 again. A uniform number is looked up'''),
    ("model.py", SOFTMAX, SOFTMAX + '''\
    chances, order = logps.double().exp_().sort(dim=1, descending=True)  # (B, V)
    likelier = chances.cumsum(dim=1) - chances  # the sum of all that stand before it
    dropped = torch.zeros_like(logps, dtype=torch.bool).scatter_(1, order, likelier >= 0.9)
    logps = torch.log_softmax(logps.masked_fill(dropped, float("-inf")), dim=1)
'''),
]

EXERCISE = Exercise(
    number=8, title="Drawing the next token", hours=1.0,
    blanks={"model.py": ["draw"]},
    drops={"model.py": []},
    rules={
        "softmax": Rule(
            "Every id that is not suppressed can be drawn, with its probability at the "
            "temperature.", []),
        "min_p": Rule(
            "Min-p: ids with less than 0.1 times the probability of the likeliest are never drawn; "
            "log-probs are those of the rest, renormalised. Scoring stays plain: see in a run what "
            "`gap` says to that.", MIN_P),
        "top_p": Rule(
            "Top-p: only the fewest likeliest ids with 0.9 of the probability are drawn; log-probs "
            "are theirs, renormalised. Scoring stays plain: see in a run what `gap` says to that.",
            TOP_P),
    },
    wrong=[
        Wrong("top_k_of_both", "only the 50 likeliest ids are ever drawn", "model.py", SOFTMAX, '''\
    kth = logits.topk(min(50, logits.shape[1]), dim=1).values[:, -1:]
    logits = logits.masked_fill(logits < kth, float("-inf"))
''' + SOFTMAX),
        Wrong("top_k_of_the_scores", "scored as if the 50 likeliest were all there is", "model.py",
              RETURNED, '''\
    kth = logps.topk(min(50, logps.shape[1]), dim=1).values[:, -1:]
    kept = logps.masked_fill(logps < kth, float("-inf"))
    return ids.squeeze(1), torch.log_softmax(kept, dim=1).gather(1, ids).squeeze(1)
'''),
        Wrong("temperature_not_drawn", "scored at the temperature, drawn without", "model.py",
              "logps.double().exp_().cumsum(dim=1)",
              "torch.log_softmax(logits, dim=1).double().exp_().cumsum(dim=1)"),
        Wrong("temperature_not_scored", "drawn at the temperature, scored without", "model.py",
              RETURNED, "    logps = torch.log_softmax(logits, dim=1)\n" + RETURNED),
        Wrong("temperature_ignored", "--temperature does nothing but greedy", "model.py",
              "logits / (1.0 if is_greedy else temperature)", "logits"),
        Wrong("temperature_multiplies", "a high temperature makes samples alike", "model.py",
              "logits / (1.0 if is_greedy else temperature)",
              "logits * (1.0 if is_greedy else temperature)"),
        Wrong("logps_divided", "log-probs are divided by the temperature: no distribution",
              "model.py", SOFTMAX, '''\
    logps = torch.log_softmax(logits, dim=1) / (1.0 if is_greedy else temperature)
'''),
        Wrong("suppressed_drawn", "ids that a turn cannot hold are drawn", "model.py",
              '    logits = logits.float().index_fill(1, suppressed, float("-inf"))\n',
              "    logits = logits.float()\n"),
        Wrong("suppressed_scored", "ids that are never drawn keep their share of the softmax",
              "model.py", MASKED + SOFTMAX, '''\
    is_greedy = temperature < 1e-6
''' + SOFTMAX + '''\
    logps = logps.index_fill(1, suppressed, float("-inf"))
'''),
        Wrong("suppressed_by_position", "suppressed ids get the logit 0 instead of none",
              "model.py", 'index_fill(1, suppressed, float("-inf"))',
              "index_fill(1, suppressed, 0.0)"),
        Wrong("uniform_of_zero", "a uniform number of 0 draws the first id, even if it has none",
              "model.py", "uniform * total, right=True)", "uniform * total)"),
        Wrong("sum_below_one", "sums end below 1: the number behind them draws no id", "model.py",
              "uniform * total, right=True)", "uniform, right=True)"),
        Wrong("sum_below_one_clamped", "sums end below 1: what lies behind them is the last id",
              "model.py", "uniform * total, right=True)",
              "uniform, right=True).clamp(max=logps.shape[1] - 1)"),
        Wrong("float32_sums", "sums in float32 leave most rare ids no room", "model.py", LOOKED_UP,
              '''\
        cumulative = logps.exp().cumsum(dim=1)  # (B, V)
        total = cumulative[:, -1:]
        uniform = torch.rand(len(logps), 1, device=logps.device)
        ids = torch.searchsorted(cumulative, uniform * total, right=True)  # (B, 1)
        ids = ids.clamp(max=logps.shape[1] - 1)
'''),
        Wrong("float32_numbers", "a uniform number of 24 bits passes most rare ids by",
              "model.py", "dtype=torch.float64, device=logps.device)",
              "device=logps.device).double()"),
        Wrong("float32_sums_widened", "float64 begins only once float32 has lost the tail",
              "model.py", "logps.double().exp_().cumsum(dim=1)",
              "logps.exp().cumsum(dim=1).double()"),
        Wrong("greedy_draws", "temperature 0 draws at random", "model.py",
              "    if is_greedy:\n", "    if False:\n"),
        Wrong("greedy_only_at_zero", "a temperature too small to divide by gives NaN", "model.py",
              "is_greedy = temperature < 1e-6", "is_greedy = temperature == 0"),
        Wrong("greedy_logp_of_zero", "greedy tokens have log-prob 0", "model.py",
              "logits / (1.0 if is_greedy else temperature)", "logits / max(temperature, 1e-6)"),
        Wrong("one_number_for_all", "all rows are drawn with one number: a group is one sample",
              "model.py", "uniform = torch.rand(len(logps), 1, dtype=torch.float64, "
              "device=logps.device)", "uniform = torch.rand(1, 1, dtype=torch.float64, "
              "device=logps.device).repeat(len(logps), 1)"),
        Wrong("first_row_for_all", "all rows are drawn from the first one's distribution",
              "model.py", CUMULATIVE,
              "        cumulative = logps[:1].double().exp_().cumsum(dim=1)"
              ".repeat(len(logps), 1)\n"),
        Wrong("probabilities", "probabilities are returned for log-probs", "model.py", RETURNED,
              "    return ids.squeeze(1), logps.gather(1, ids).squeeze(1).exp()\n"),
        Wrong("naive_softmax", "large logits overflow", "model.py", SOFTMAX, '''\
    weights = torch.exp(logits / (1.0 if is_greedy else temperature))
    logps = torch.log(weights / weights.sum(dim=1, keepdim=True))
'''),
        Wrong("another_generator", "the seed of a run does not repeat its samples", "model.py",
              "uniform = torch.rand(len(logps), 1, dtype=torch.float64, device=logps.device)",
              "g = torch.Generator()\n        g.seed()\n        "
              "uniform = torch.rand(len(logps), 1, dtype=torch.float64, generator=g)"),
    ],
)
