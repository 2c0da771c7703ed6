"""Exercise 3, advantages of a group: values by hand, and an oracle in plain loops over Python's own floats."""
import itertools
import math
import random

import pytest
import torch

LOSSES = ("grpo", "dapo", "dr_grpo")
# Rewards that are not exact in binary, too: their mean in float32 is not always themselves.
FLAT = [0.0, 1.0, 0.1, 0.2, 0.3, 1 / 3, 0.7, 0.9, 1.1, 1e-3, -0.7, 1.9, 123.4, 1e6 + 0.1]


def rounded(rewards: list[list[float]]) -> list[list[float]]:
    """As float32 holds them."""
    return torch.tensor(rewards, dtype=torch.float32).tolist()


def expected(rewards: list[list[float]], rule: str, loss: str = "grpo") -> list[list[float]]:
    """The advantages, one number at a time."""
    everything = [reward for group in rewards for reward in group]
    advantages = []
    for group in rewards:
        row = []
        for place, reward in enumerate(group):
            if all(other == group[0] for other in group):
                row.append(0.0)
            elif rule == "leave_one_out" and loss != "dr_grpo":
                others = group[:place] + group[place + 1:]
                row.append(reward - sum(others) / len(others))
            else:
                row.append((reward - sum(group) / len(group)) / divisor(group, everything, rule, loss))
        advantages.append(row)
    return advantages


def divisor(group: list[float], everything: list[float], rule: str, loss: str) -> float:
    if loss == "dr_grpo":
        return 1.0
    values = everything if rule == "std_of_the_batch" else group
    mean = sum(values) / len(values)
    if rule == "absolute_deviation":
        return sum(abs(value - mean) for value in values) / len(values) + 1e-4
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) + 1e-4


def close(actual: torch.Tensor, wanted: list[list[float]], tolerance: float = 1e-3) -> bool:
    """Equal within 1e-3, so that the constant of the docstring matters in its own test only. NaN is never close."""
    return tuple(actual.shape) == (len(wanted), len(wanted[0])) and torch.allclose(
        actual.double(), torch.tensor(wanted, dtype=torch.float64), atol=tolerance, rtol=tolerance)


def close_but_for_scale(actual: torch.Tensor, wanted: list[list[float]]) -> bool:
    """Close once each row is scaled to a largest entry of 1: what the rows are divided by has tests of its own."""
    rows = []
    for row, wanted_row in zip(actual.double(), torch.tensor(wanted, dtype=torch.float64)):
        largest = row[wanted_row.abs().argmax()].abs()
        rows.append((row / largest if wanted_row.any() else row).tolist())
    scaled = [[value / (max(map(abs, row)) or 1.0) for value in row] for row in wanted]
    return tuple(actual.shape) == (len(wanted), len(wanted[0])) and close(torch.tensor(rows), scaled)


@pytest.mark.core
def test_two_groups_by_hand(student, rule):
    # Group 1: mean 0.25; squared deviations 0.5625 + 3 · 0.0625 = 0.75, absolute ones 0.75 + 3 · 0.25 = 1.5.
    # Group 2: mean 1; squared deviations 4 · 1, absolute ones 4 · 1. Both: mean 0.625, squared deviations 5.875.
    first, second = [0.75, -0.25, -0.25, -0.25], [1.0, -1.0, 1.0, -1.0]
    scales = {"std": (0.5, math.sqrt(4 / 3)), "absolute_deviation": (0.375, 1.0),
              "std_of_the_batch": (math.sqrt(5.875 / 7), math.sqrt(5.875 / 7)),
              "leave_one_out": (3 / 4, 3 / 4)}  # what is left of the mean without oneself: 4/3 of the deviation
    by_hand = [[value / scale for value in group] for group, scale in zip((first, second), scales[rule])]
    actual = student.group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 0.0, 2.0, 0.0]]))
    assert close(actual, by_hand), f"rewards 1, 0, 0, 0 and 2, 0, 2, 0 got {actual.tolist()}"


def test_groups_of_every_size(student, rule):
    rng = random.Random(3)
    for num_samples in range(2, 10):
        rewards = rounded([[rng.uniform(-1, 2) for _ in range(num_samples)] for _ in range(4)])
        actual = student.group_advantages(torch.tensor(rewards))
        assert close(actual, expected(rewards, rule)), f"wrong with {num_samples} samples a prompt"


def test_rewards_that_hardly_differ_are_divided_as_the_docstring_says(student, rule):
    # The spread is of the size of the docstring's constant, or far below it. 1e-4: of what the advantages are.
    for distance in (1e-3, 2e-4, 1e-6):
        rewards = rounded([[distance, 0.0, 0.0], [distance, distance, 0.0]])
        wanted = expected(rewards, rule)
        actual = student.group_advantages(torch.tensor(rewards))
        assert close(actual, wanted, 1e-4 * wanted[0][0]), f"rewards {distance}, 0, 0 got {actual[0].tolist()}"


@pytest.mark.core
def test_every_sample_is_compared_with_its_own_group(student, rule):
    rewards = rounded([[50.0, -3.0, 7.0], [0.2, 0.9, 0.4], [1.0, 1.0, 0.0]])
    actual = student.group_advantages(torch.tensor(rewards))
    assert close_but_for_scale(actual, expected(rewards, rule)), "is the baseline of each row its own?"


def test_the_loss_dr_grpo_only_subtracts_the_mean(student, rule):
    actual = student.group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 0.0, 2.0, 0.0]]), "dr_grpo")
    assert close(actual, [[0.75, -0.25, -0.25, -0.25], [1.0, -1.0, 1.0, -1.0]])


def test_the_loss_dapo_has_the_advantages_of_grpo(student):
    rewards = rounded([[1.0, 0.0, 0.5], [0.2, 0.2, 0.9]])
    plain, grpo, dapo = [student.group_advantages(torch.tensor(rewards), *loss) for loss in ((), ("grpo",), ("dapo",))]
    assert close(dapo, grpo.tolist()) and close(plain, grpo.tolist())


def test_equal_rewards_get_exactly_zero(student):
    for loss, num_samples in itertools.product(LOSSES, (2, 3, 5, 6, 7, 8, 11)):
        rewards = torch.tensor([[reward] * num_samples for reward in FLAT])
        actual = student.group_advantages(rewards, loss)
        wrong = [reward for reward, row in zip(FLAT, actual.tolist()) if any(value != 0.0 for value in row)]
        assert not wrong, f"{num_samples} equal rewards are not all 0, but {actual.abs().max()}, for {wrong}"


def test_a_group_of_equal_rewards_leaves_the_others_alone(student, rule):
    rewards = rounded([[0.1] * 7, [1.0, 1.0, 0.0, 0.0, 0.3, 0.5, 0.1], [0.0] * 7])
    actual = student.group_advantages(torch.tensor(rewards))
    assert actual[0].tolist() == actual[2].tolist() == [0.0] * 7, "equal rewards beside other groups"
    assert close_but_for_scale(actual, expected(rewards, rule)), "the group beside those of equal rewards"


def test_groups_of_equal_rewards_do_not_merge(student, rule):
    # Two equal prompts, and two that earn the same: each is a group. Merged, row 1 and 2 would differ from 0.
    rewards = rounded([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    actual = student.group_advantages(torch.tensor(rewards))
    assert close_but_for_scale(actual, expected(rewards, rule)), f"four groups of two got {actual.tolist()}"


def test_the_order_of_groups_and_of_samples_changes_nothing(student):
    rng = torch.Generator().manual_seed(1)
    rewards = torch.rand(5, 6, generator=rng)
    groups, samples = torch.randperm(5, generator=rng), torch.randperm(6, generator=rng)
    actual = student.group_advantages(rewards[groups][:, samples])
    assert close(actual, student.group_advantages(rewards)[groups][:, samples].tolist())


def test_a_group_of_one_is_refused(student):
    for loss, num_prompts in itertools.product(LOSSES, (1, 4)):
        with pytest.raises(ValueError):
            student.group_advantages(torch.ones(num_prompts, 1), loss)


def test_advantages_are_float32_of_the_shape_of_the_rewards(student):
    for loss, dtype in itertools.product(LOSSES, (torch.float32, torch.float64)):
        actual = student.group_advantages(torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 0.0]], dtype=dtype), loss)
        assert (actual.dtype, tuple(actual.shape)) == (torch.float32, (2, 3)), loss
