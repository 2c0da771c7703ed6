"""Tests of exercise 5, log-probabilities of tokens: token_logps.

Expected values come from `score` and `by_loops` below, which treat one token and one id at a time in plain floats, the
gradient included; from values by hand; and from the sampler, whose tokens are scored.
"""
import math
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from model import draw, load_policy

ROOT = Path(__file__).parent.parent.parent
NONE = torch.tensor([], dtype=torch.int64)  # nothing suppressed
# (temperature, suppressed ids): of 11 ids, of which id 0, 1, 6, 7 and 10 are targets
SETTINGS = pytest.mark.parametrize("temperature, suppressed", [(1.0, []), (0.7, [2, 9]), (2.0, [3])],
                                   ids=["plain", "0.7 without 2 and 9", "2.0 without 3"])


# -------------------------------------------------------------------------------------------------------------- oracle


def spread(rule, probs):
    """Entropy, or what the rule puts in its place, of the probabilities of the ids that are left."""
    if rule == "collision":
        return -math.log(sum(p * p for p in probs))
    entropy = -sum(p * math.log(p) for p in probs if p > 0)
    if rule == "evenness":
        return entropy / math.log(len(probs)) if len(probs) > 1 else 0.0
    return entropy


def score(rule, hidden, head, target, temperature, suppressed):
    """(log-prob of the target, entropy, probability of every id) of one token; 0.0 for ids that are suppressed."""
    left = [v for v in range(len(head)) if v not in suppressed]
    logits = {v: sum(x * w for x, w in zip(hidden, head[v])) / temperature for v in left}
    top = max(logits.values())
    log_sum = top + math.log(sum(math.exp(z - top) for z in logits.values()))
    probs = {v: math.exp(z - log_sum) for v, z in logits.items()}
    if target == -100:
        return 0.0, 0.0, None
    return logits[target] - log_sum, spread(rule, list(probs.values())), [probs.get(v, 0.0) for v in range(len(head))]


def by_loops(rule, hidden, head, targets, temperatures, suppressed, upstream):
    """(log-probs, entropies, gradients of hidden and head) where log-prob n counts upstream[n] times in the loss."""
    hidden, head = hidden.tolist(), head.tolist()
    logps, entropies = [], []
    d_hidden, d_head = [[0.0] * len(row) for row in hidden], [[0.0] * len(row) for row in head]
    for n, (target, temperature, scale) in enumerate(zip(targets.tolist(), temperatures, upstream)):
        logp, entropy, probs = score(rule, hidden[n], head, target, temperature, suppressed)
        logps.append(logp)
        entropies.append(entropy)
        for v, prob in enumerate(probs or []):
            slope = scale * ((v == target) - prob) / temperature  # of the loss in the product of hidden state and row v
            for i in range(len(hidden[n])):
                d_hidden[n][i] += slope * head[v][i]
                d_head[v][i] += slope * hidden[n][i]
    return [torch.tensor(x, dtype=torch.float64) for x in (logps, entropies, d_hidden, d_head)]


def case(rule, temperature=1.0):
    """(hidden (7, 5), head (11, 5), targets, temperature as it is passed, temperature of each token); float64."""
    rng = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 5, generator=rng, dtype=torch.float64).requires_grad_() for n in (7, 11))
    targets = torch.tensor([0, 1, 10, 1, 7, 6, 0])
    if rule == "ignored":
        targets[[1, 4, 6]] = -100
    each = [temperature] * 7
    if rule == "temperatures":
        each = [temperature * (1 + n / 4) for n in range(7)]
        temperature = torch.tensor(each)  # quarters of 0.7 are not exact in float32
    return hidden, head, targets, temperature, each


UPSTREAM = [-1.0, -0.5, 0.75, 2.0, 0.25, 1.0, -1.5]


def scored(student, rule, temperature, suppressed, chunk=3):
    """What `by_loops` returns, from the student's function: (got, wanted)."""
    hidden, head, targets, passed, each = case(rule, temperature)
    logps, entropy = student.token_logps(hidden, head, targets, temperature=passed,
                                         suppressed=torch.tensor(suppressed, dtype=torch.int64), chunk=chunk)
    (logps * torch.tensor(UPSTREAM, dtype=torch.float64)).sum().backward()
    return (logps, entropy, hidden.grad, head.grad), by_loops(rule, hidden, head, targets, each, suppressed, UPSTREAM)


def close(got, wanted, atol=1e-6):
    """Equal but for float32, in which temperatures of tokens are given."""
    return got is not None and got.shape == wanted.shape and bool((got.double() - wanted).abs().max() <= atol)


# ------------------------------------------------------------------------------------------------- values and gradients


@pytest.mark.core
@SETTINGS
def test_log_probs_token_by_token(student, rule, temperature, suppressed):
    (logps, *_), (wanted, *_) = scored(student, rule, temperature, suppressed)
    assert close(logps, wanted), f"log-probs: got {logps.tolist()}, not {wanted.tolist()}"


@SETTINGS
def test_entropy_token_by_token(student, rule, temperature, suppressed):
    (_, entropy, *_), (_, wanted, *_) = scored(student, rule, temperature, suppressed)
    assert close(entropy, wanted), f"entropy: got {entropy.tolist()}, not {wanted.tolist()}"


@pytest.mark.core
@SETTINGS
def test_gradients_token_by_token(student, rule, temperature, suppressed):
    (*_, d_hidden, d_head), (*_, wanted_hidden, wanted_head) = scored(student, rule, temperature, suppressed)
    assert close(d_hidden, wanted_hidden), "the gradient of the hidden states"
    assert close(d_head, wanted_head), "the gradient of the head"


@pytest.mark.core
def test_entropy_by_hand(student, rule):
    for logits, temperature, suppressed, probs in [
            ([0.0, 0.0, 0.0, 0.0], 1.0, [], [0.25, 0.25, 0.25, 0.25]),
            ([0.0, 0.0, 5.0, 0.0], 1.0, [2], [1 / 3, 1 / 3, 1 / 3]),
            ([math.log(9), 0.0, -1e4, -1e4], 1.0, [], [0.9, 0.1, 0.0, 0.0]),
            ([math.log(9), 0.0, -1e4, -1e4], 2.0, [], [0.75, 0.25, 0.0, 0.0])]:
        _, entropy = student.token_logps(
            torch.ones(1, 1), torch.tensor(logits)[:, None], torch.tensor([1]), temperature=temperature,
            suppressed=torch.tensor(suppressed, dtype=torch.int64))
        assert entropy.item() == pytest.approx(spread(rule, probs), abs=1e-5), \
            f"logits {logits}, temperature {temperature}, without {suppressed}: a distribution of {probs}"


def test_ids_without_any_probability_make_no_nan(student, rule):
    for logits, suppressed in [([5.0, 1.0, 2.0, 9.0], [0, 1, 2]), ([-1e4, -2e4, -1e4, 9.0], [0, 1])]:
        hidden, head = torch.ones(2, 1).requires_grad_(), torch.tensor(logits)[:, None].requires_grad_()
        logps, entropy = student.token_logps(hidden, head, torch.tensor([3, 3]), temperature=1.0,
                                             suppressed=torch.tensor(suppressed))
        logps.sum().backward()
        assert logps.abs().max() <= 1e-6 and entropy.abs().max() <= 1e-6, "one id is left: certain, so both are 0"
        assert hidden.grad.abs().max() <= 1e-5 and head.grad.abs().max() <= 1e-5, "and nothing can change that"


def test_log_probs_have_a_gradient_and_entropy_has_none(student, rule):
    hidden, head, targets, passed, _ = case(rule)
    logps, entropy = student.token_logps(hidden, head, targets, temperature=passed, suppressed=NONE)
    assert logps.requires_grad, "log-probs are trained on"
    assert not entropy.requires_grad, "the entropy is a metric"


def test_a_frozen_head_or_no_gradient_at_all_are_fine(student, rule):
    (wanted, _, d_hidden, _), _ = scored(student, rule, 0.7, [2])
    hidden, head, targets, passed, _ = case(rule, 0.7)
    arguments = {"temperature": passed, "suppressed": torch.tensor([2]), "chunk": 3}
    with torch.no_grad():
        assert close(student.token_logps(hidden, head, targets, **arguments)[0], wanted.detach()), "under no_grad"
    logps, _ = student.token_logps(hidden, head.detach(), targets, **arguments)
    (logps * torch.tensor(UPSTREAM, dtype=torch.float64)).sum().backward()
    assert close(hidden.grad, d_hidden), "the gradient of the hidden states if the head is frozen"


@pytest.mark.needs_plain(8)
def test_sampled_tokens_are_scored_as_they_were_sampled(student):
    """On the laptop model: the log-probs of the sampler are those of the scorer."""
    policy = load_policy(str(ROOT / "data" / "model"), device=torch.device("cpu"))
    with torch.no_grad():
        ids = torch.arange(100, 500)[None]
        hidden = policy.model.model(input_ids=ids).last_hidden_state[0]  # (400, H)
        head = policy.model.lm_head.weight
        torch.manual_seed(5)
        tokens, sampled = draw(hidden @ head.T, 0.8, policy.suppressed)
        got, _ = student.token_logps(hidden, head, tokens, temperature=0.8, suppressed=policy.suppressed, chunk=64)
    assert (got - sampled).abs().max() < 1e-4, "the ratio of a token would not be 1 before the first update"


# --------------------------------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize("chunk", [1, 2, 6, 7, 100])
def test_the_chunk_changes_no_value_and_no_gradient(student, rule, chunk):
    whole, _ = scored(student, rule, 0.7, [3], chunk=7)
    parts, _ = scored(student, rule, 0.7, [3], chunk=chunk)
    assert whole[3].abs().max() > 0.1
    for name, a, b in zip(["log-probs", "entropy", "gradient of hidden", "gradient of the head"], parts, whole):
        assert close(a, b.detach(), atol=1e-9), f"{name}: 7 tokens in chunks of {chunk} and in one of 7"


def test_no_tokens_give_empty_results(student):
    hidden, head = torch.zeros(0, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    targets = torch.tensor([], dtype=torch.int64)
    logps, entropy = student.token_logps(hidden, head, targets, temperature=1.0, suppressed=NONE)
    assert logps.shape == entropy.shape == (0,), "a micro-batch may have no action tokens"
    logps.sum().backward()


def peak_memory(run):
    """The most bytes that tensors made while `run` runs take at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_never_more_than_a_few_chunks_of_logits_exist(student):
    num_tokens, vocabulary, chunk = 1024, 2000, 16
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, 8, generator=rng).requires_grad_()
    head = torch.randn(vocabulary, 8, generator=rng).requires_grad_()
    targets = torch.randint(vocabulary, (num_tokens,), generator=rng)

    def run():
        logps, _ = student.token_logps(hidden, head, targets, temperature=1.0, suppressed=NONE, chunk=chunk)
        logps.sum().backward()

    run()  # what is set up once
    chunks = peak_memory(run) / (4 * chunk * vocabulary)  # in float32 logits of a chunk; all of them would be 64
    # In place it takes 4, with torch.utils.checkpoint 7. The head's gradient counts too: half a chunk.
    assert 1 <= chunks <= 12, f"forward and backward pass hold {chunks:.0f} chunks of logits; all tokens are 64 chunks"


# ------------------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("given, expected", [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")])
def test_results_are_float32_or_better(student, rule, given, expected):
    hidden, head, targets, passed, _ = case(rule)
    hidden, head = (x.detach().to(getattr(torch, given)).requires_grad_() for x in (hidden, head))
    logps, entropy = student.token_logps(hidden, head, targets, temperature=passed, suppressed=NONE, chunk=3)
    logps.sum().backward()
    assert logps.dtype == entropy.dtype == getattr(torch, expected), f"of {given} hidden states"


def in_bfloat16(num_tokens, vocabulary, scale):
    """(hidden, head, targets, upstream) in bf16, from the same numbers."""
    rng = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(num_tokens, 16, generator=rng)
    head = torch.randn(vocabulary, 16, generator=rng)
    targets, upstream = torch.randint(vocabulary, (num_tokens,), generator=rng), torch.randn(num_tokens, generator=rng)
    return hidden.bfloat16().requires_grad_(), head.bfloat16().requires_grad_(), targets, upstream


def test_the_softmax_of_bf16_logits_is_not_bf16(student):
    hidden, head, targets, _ = in_bfloat16(256, 1000, scale=0.1)  # logits below 2: they are exact to 0.004
    logps, _ = student.token_logps(hidden, head, targets, temperature=1.0, suppressed=NONE)
    wanted = (hidden.double() @ head.double().T).log_softmax(dim=1).gather(1, targets[:, None]).squeeze(1)
    # Log-probs are around -7, where neighbours in bf16 are 0.03 apart.
    assert (logps - wanted).abs().mean() < 0.002, "log-probs were rounded to bf16 on the way"


def test_the_head_s_gradient_is_added_up_in_float32(student):
    hidden, head, targets, upstream = in_bfloat16(4096, 50, scale=1.0)
    gradients = []
    for dtype in (torch.bfloat16, torch.float64):
        one, other = (x.detach().to(dtype).requires_grad_() for x in (hidden, head))
        logps, _ = student.token_logps(one, other, targets, temperature=1.0, suppressed=NONE, chunk=16)
        (logps * upstream).sum().backward()
        gradients.append(other.grad.double())
    error = ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()
    assert error < 0.009, f"bf16 loses digits in a sum of 256 chunks: relative error {error:.4f}"
