"""Exercise 8: tokens are as frequent as they are probable, and their log-probs are of the distribution they come from.

How random numbers are used is the student's choice. Where one uniform number a row is drawn from torch, some tests
choose this number, as a run of days meets the rare ones. A frequency is held to a chi-square test: at a right
solution each fails with a probability below 1e-7.
"""
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model
from model import encode_prompt, load_policy, model_inputs, sample

NONE = torch.tensor([], dtype=torch.int64)
LARGE = 151_936  # the vocabulary of Qwen2.5-VL


def chances_of(logits: list[float], temperature: float, suppressed: list[int], rule: str) -> list[float]:
    """The probability of every id, one by one in float64. Asserts that no id is a close call under the rule."""
    at = 1.0 if temperature < 1e-6 else temperature
    top = max(x for i, x in enumerate(logits) if i not in suppressed)
    weights = [0.0 if i in suppressed else math.exp((x - top) / at) for i, x in enumerate(logits)]
    total = sum(weights)
    chances = [weight / total for weight in weights]
    if rule == "min_p":
        assert all(abs(weight - 0.1) > 1e-6 for weight in weights), "the test's numbers are too close to the bound"
        chances = [chance if weight >= 0.1 else 0.0 for chance, weight in zip(chances, weights)]
    elif rule == "top_p":
        covered = 0.0
        for i in sorted(range(len(chances)), key=lambda i: -chances[i]):
            assert abs(covered - 0.9) > 1e-6, "the test's numbers are too close to the bound"
            covered, chances[i] = covered + chances[i], chances[i] if covered < 0.9 else 0.0
    total = sum(chances)
    return [chance / total for chance in chances]


def check_frequencies(ids: list[int], chances: list[float], what: str):
    """Ids of probability 0 never come; the others as often as chance allows: a chi-square test at 1e-7."""
    counts, cells = Counter(ids), [[0.0, 0]]  # (expected, counted), each cell of at least 50 expected
    for i in sorted(range(len(chances)), key=lambda i: chances[i]):
        assert chances[i] > 0 or counts[i] == 0, f"{what}: id {i} has probability 0 and was drawn {counts[i]} times"
        cells[-1][0] += len(ids) * chances[i]
        cells[-1][1] += counts[i]
        if cells[-1][0] >= 50:
            cells.append([0.0, 0])
    rest = cells.pop()
    cells[-1] = [cells[-1][0] + rest[0], cells[-1][1] + rest[1]]
    chi_square = sum((counted - expected) ** 2 / expected for expected, counted in cells)
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    p = torch.special.gammaincc(freedom, torch.tensor(chi_square / 2, dtype=torch.float64)).item()
    assert p > 1e-7, (f"{what}: ids do not come as often as they should (chi-square {chi_square:.0f} with "
                      f"{len(cells) - 1} degrees of freedom, p = {p:.0e})")


class ChooseUniform(TorchDispatchMode):
    """Inside, uniform numbers are chosen where at most one a row is asked of torch, in the accuracy of their dtype.

    They may be asked for all at once or one by one. Other requests are left alone. `asked`: how many were chosen.
    """

    def __init__(self, numbers: list[float]):
        super().__init__()
        self.numbers, self.asked = torch.tensor(numbers, dtype=torch.float64), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        aten = torch.ops.aten
        is_uniform = function.overloadpacket in (aten.rand, aten.rand_like, aten.uniform_, aten.uniform)
        if is_uniform and result.numel() in (1, len(self.numbers)):
            numbers = self.numbers if result.numel() > 1 else self.numbers[self.asked % len(self.numbers)]
            bits = {torch.float64: 53, torch.float32: 24}.get(result.dtype, 8)  # multiples of 2^-bits, below 1
            chosen = (numbers * 2.0**bits).floor().clamp(max=2.0**bits - 1) / 2.0**bits
            result.copy_(chosen.to(result.dtype).reshape(result.shape))
            self.asked += result.numel()
        return result


def logits_of(num_ids: int, seed: int, spread: float = 1.5) -> torch.Tensor:
    return spread * torch.randn(num_ids, generator=torch.Generator().manual_seed(seed))


# ---- log-probs -----------------------------------------------------------------------------------------------------
@pytest.mark.core
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_of_the_distribution_at_the_temperature(student, rule, temperature):
    suppressed = [0, 17, 119]
    rows = torch.stack([logits_of(120, seed) for seed in range(6)])
    torch.manual_seed(1)
    ids, logps = student.draw(rows.repeat(20, 1), temperature, torch.tensor(suppressed))
    assert ids.shape == logps.shape == (120,) and ids.dtype == torch.int64, "ids and log-probs: (B,) each"
    chances = [chances_of(row, temperature, suppressed, rule) for row in rows.tolist()]
    for b, (i, logp) in enumerate(zip(ids.tolist(), logps.tolist())):
        chance = chances[b % 6][i]
        assert chance > 0, f"id {i} of row {b % 6} cannot be drawn"
        assert abs(logp - math.log(chance)) < 1e-4, f"log-prob of id {i} in row {b % 6}, in nats"


def test_suppressed_ids_are_neither_drawn_nor_scored(student, rule):
    suppressed = [0, 17, 50]
    rows = torch.stack([logits_of(51, seed) for seed in range(6)])
    rows[:, 17] = 8.0  # it would be the likeliest by far
    torch.manual_seed(2)
    for temperature in (1.0, 0.0):
        ids, logps = student.draw(rows.repeat(20, 1), temperature, torch.tensor(suppressed))
        assert not set(suppressed) & set(ids.tolist()), f"temperature {temperature}: a suppressed id was drawn"
        chances = [chances_of(row, temperature, suppressed, rule) for row in rows.tolist()]
        for b, (i, logp) in enumerate(zip(ids.tolist(), logps.tolist())):
            assert abs(logp - math.log(chances[b % 6][i])) < 1e-4, "the ids that are left have probability 1 together"


def test_large_logits(student, rule):
    rows = torch.tensor([[900.0, 899.0, 0.0, -900.0], [-900.0, -905.0, -901.0, -2000.0]])
    torch.manual_seed(0)
    for temperature in (1.0, 0.5, 0.0):
        ids, logps = student.draw(rows.clone(), temperature, NONE)
        for row, i, logp in zip(rows.tolist(), ids.tolist(), logps.tolist()):
            chance = chances_of(row, temperature, [], rule)[i]
            assert chance > 0 and abs(logp - math.log(chance)) < 1e-4, f"temperature {temperature}, logits {row}"


def test_a_row_with_one_id_left(student, rule):
    for temperature in (1.0, 0.3, 0.0):
        ids, logps = student.draw(torch.zeros(3, 5), temperature, torch.tensor([0, 1, 3, 4]))
        assert ids.tolist() == [2] * 3 and logps.abs().max() < 1e-6, "the only id has probability 1"


# ---- frequencies ---------------------------------------------------------------------------------------------------
@pytest.mark.core
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_ids_are_as_frequent_as_they_are_probable(student, rule, temperature):
    suppressed, row = [0, 3, 119], logits_of(120, seed=7)
    row[3] = 4.0
    torch.manual_seed(2)
    ids, _ = student.draw(row.repeat(10_000, 1), temperature, torch.tensor(suppressed))
    chances = chances_of(row.tolist(), temperature, suppressed, rule)
    check_frequencies(ids.tolist(), chances, f"temperature {temperature}")


def test_rows_are_drawn_each_from_its_own_logits_and_by_chance_of_their_own(student, rule):
    first, second = torch.tensor([1.0, 0.0, 0.5, -6.0]), torch.tensor([-0.5, 0.2, -6.0, 0.4])
    torch.manual_seed(3)
    ids, logps = student.draw(torch.stack([first, second]).repeat(4_000, 1), 1.0, NONE)
    a, b = (chances_of(row.tolist(), 1.0, [], rule) for row in (first, second))
    pairs = [4 * i + j for i, j in zip(ids[::2].tolist(), ids[1::2].tolist())]
    check_frequencies(pairs, [x * y for x in a for y in b], "pairs of neighbours")
    expected = torch.tensor([[math.log(row[i]) for i in ids.tolist()[k::2]] for k, row in enumerate((a, b))])
    assert (logps.view(-1, 2).T - expected).abs().max() < 1e-4, "each row has the log-prob of its own id"


def test_every_part_of_a_large_vocabulary_is_drawn(student, rule):
    row = logits_of(LARGE, seed=5, spread=0.3)
    kept = torch.log_softmax(row.double(), dim=0).exp()
    if rule == "min_p":
        kept[kept < 0.1 * kept.max()] = 0.0
    elif rule == "top_p":
        chances, order = kept.sort(descending=True)
        kept[order[(chances.cumsum(0) >= 0.9).nonzero()[0].item() + 1:]] = 0.0
    torch.manual_seed(4)
    ids = torch.cat([student.draw(row.repeat(21, 1), 1.0, NONE)[0] for _ in range(5)])
    halves = [part.sum().item() / kept.sum().item() for part in kept.split(LARGE // 2)]
    check_frequencies((ids // (LARGE // 2)).tolist(), halves, "halves of the vocabulary")
    assert kept[ids].min() > 0, "an id of probability 0 was drawn"


# ---- rare random numbers -------------------------------------------------------------------------------------------
def test_an_id_of_probability_0_is_never_drawn(student, rule):
    suppressed = torch.tensor([0, 1, 2, 40, 997, 998, 999])  # the first ids, the last ones, and one between
    rows = torch.stack([logits_of(1000, seed) for seed in range(64)])
    rows[:, 3], rows[:, 996] = -1000.0, -1000.0  # e^-1000 is 0, in float64 too
    for number in (0.0, 2.0**-53, 1.0):  # 1.0: the last number below it
        torch.manual_seed(5)
        with ChooseUniform([number] * 64):
            ids, logps = student.draw(rows.clone(), 1.0, suppressed)
        for b, (i, logp) in enumerate(zip(ids.tolist(), logps.tolist())):
            where = "0" if number == 0 else "just above 0" if number < 0.5 else "just below 1"
            assert 0 <= i < 1000, f"a uniform number {where} draws no id of the vocabulary"
            assert i not in suppressed.tolist(), f"a uniform number {where} draws a suppressed id"
            assert i not in (3, 996) and math.isfinite(logp), f"a uniform number {where} draws an id of probability 0"


def test_the_rarest_ids_of_a_large_vocabulary_keep_their_room(student, rule):
    # The last 1,000 ids have 1e-9 each: a run that draws 10^8 tokens meets them.
    chances = torch.full((LARGE,), 1e-13, dtype=torch.float64)
    chances[:3], chances[-1000:] = 0.3333, 1e-9
    row = chances.log().float()
    numbers = torch.arange(32, dtype=torch.float64) * 3e-8 + 1e-8  # 32 of the first and of the last 1e-6
    drawn = []
    for numbers in (numbers, 1 - numbers):
        torch.manual_seed(6)
        with ChooseUniform(numbers.tolist()) as mode:
            ids, _ = student.draw(row.repeat(32, 1), 1.0, NONE)
        assert 0 <= ids.min() and ids.max() < LARGE
        drawn += ids.tolist() if mode.asked else []
    rare = [i for i in drawn if i >= LARGE - 1000]
    if rule != "softmax":
        assert not rare, "ids that the rule takes out are drawn"
    # The numbers lie 30 of these ids apart.
    assert len(set(rare)) == len(rare), (
        f"numbers that lie 30 rare ids apart drew only {len(set(rare))} ids: most can never be drawn "
        "(are the sums and the uniform number float64?)")


# ---- greedy, seeds -------------------------------------------------------------------------------------------------
def test_a_temperature_below_a_millionth_takes_the_likeliest_with_its_log_prob_at_1(student, rule):
    suppressed = [5, 60]
    rows = torch.stack([logits_of(80, seed) for seed in range(20)])
    for temperature in (0.0, 1e-7, 1e-46):
        ids, logps = student.draw(rows.clone(), temperature, torch.tensor(suppressed))
        for row, i, logp in zip(rows.tolist(), ids.tolist(), logps.tolist()):
            chances = chances_of(row, temperature, suppressed, rule)
            assert i == max(range(80), key=lambda i: chances[i]), f"temperature {temperature}: the likeliest id"
            assert abs(logp - math.log(chances[i])) < 1e-4, f"temperature {temperature}: its log-prob at 1"


def test_a_seed_repeats_the_ids_and_another_draws_others(student):
    def drawn(seed):
        torch.manual_seed(seed)
        return [student.draw(torch.zeros(16, 100), 1.0, NONE)[0].tolist() for _ in range(2)]
    assert drawn(1) == drawn(1), "torch.manual_seed must repeat what is drawn"
    first, second = drawn(1)
    assert first != second and drawn(2) != drawn(1), "each call, and each seed, draws anew"


# ---- in its place --------------------------------------------------------------------------------------------------
def test_turns_of_the_laptop_model_have_the_log_probs_of_their_distribution(student, rule, monkeypatch):
    torch.set_num_threads(1)
    policy = load_policy(str(Path(model.__file__).parent / "data" / "model"))
    monkeypatch.setattr(model, "draw", student.draw)
    prompt = encode_prompt(policy, "Why?", None)
    torch.manual_seed(7)
    rows = [SimpleNamespace(ids=prompt, images=[], action_mask=[0] * len(prompt)) for _ in range(3)]
    for ids, logps in sample(policy, rows, 6, 1.5):
        whole = SimpleNamespace(ids=prompt + ids, images=[], action_mask=[0] * (len(prompt) + len(ids)))
        with torch.no_grad():
            logits = policy.model(**model_inputs(policy, [whole], "right")).logits[0, len(prompt) - 1:-1].float()
        suppressed = set(policy.suppressed.tolist())
        for row, i, logp in zip(logits.tolist(), ids, logps):
            chance = chances_of(row, 1.5, suppressed, rule)[i]
            assert chance > 0 and abs(logp - math.log(chance)) < 1e-3, f"token {i}"
