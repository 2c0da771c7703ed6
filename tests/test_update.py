"""One update of train.py against the formula on a plain Hugging Face model; a stopped run against
one that was not stopped.

One rank is this process itself; several are processes that talk by gloo, forked from one that has
done nothing but import.
"""
import functools
import json
import math
import os
import re
import shutil
import signal
import statistics
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import train
from conftest import CLEAN
from make_model import make_model
from model import encode_text, load_policy
from ranks_worker import CODE, LIMITS, picture, task
from rollout import Tools, roll_out
from tools import CodeTool
from train import (Config, even_micro_batches, load, main, prepare, prompts_of_step,
                   reference_logps, seed_step, update)

ROOT = Path(__file__).parent.parent
# Ids from 816 on are specials that are neither sampled nor scored; 815 ends a turn
IMAGE, NUM_KEPT = 827, 816
SETTINGS = {"beta": 0.3, "temperature": 0.7, "max_turns": 3, "max_new_tokens": 40,
            "max_grad_norm": 1e6, "clip_high": 0.28}
LR = 0.05


@contextmanager
def group(store, rank=0, size=1):
    """A process group for as long as the block lasts."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size,
                            timeout=timedelta(seconds=60))
    yield
    dist.destroy_process_group()


@pytest.fixture
def rank():
    """A process group of this process alone."""
    with group(dist.HashStore()):
        yield


def on_ranks(size, folder, function, *args):
    """[what function(*args) returned on each rank] of `size` processes."""
    folder.mkdir()
    processes = [CLEAN.Process(target=work, args=(rank, size, folder, function, args))
                 for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
        process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def work(rank, size, folder, function, args):
    torch.set_num_threads(1)
    with group(dist.FileStore(str(folder / "store"), size), rank, size):
        torch.save(function(*args), folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def reference_folder(tmp_path_factory, policy):
    """Another model with the same tokenizer, so that the KL is not 0."""
    folder = tmp_path_factory.mktemp("reference")
    for part in (make_model(policy.tokenizer, seed=1), policy.tokenizer,
                 Qwen2VLImageProcessorPil()):
        part.save_pretrained(folder)
    return folder


def plain_logps(model, rollout, temperature):
    """Log-probs (T - 1, 816) of the next token after each: one sequence at a time; Hugging Face
    makes the positions."""
    ids = torch.tensor([rollout.ids])
    vision = {}
    if rollout.images:
        vision = {"pixel_values": torch.cat([image.pixels for image in rollout.images]),
                  "image_grid_thw": torch.tensor([image.grid for image in rollout.images]),
                  "mm_token_type_ids": (ids == IMAGE).int()}
    logits = model(input_ids=ids, use_cache=False, **vision).logits[0, :-1, :NUM_KEPT]
    return (logits / temperature).log_softmax(dim=1)


@pytest.fixture(scope="module")
def rows(policy):
    """[(rollout, advantage)] of four groups of two, the last two with an image; 1 to 3 turns, and a
    repaired image in one."""
    torch.manual_seed(0)
    answers = ["<answer>" + " 7" * (i + 1) + "</answer>" for i in range(8)]
    chains = [["<problem> dark </problem>"] * (i % 3) + [answer]
              for i, answer in enumerate(answers)]
    chains[5] = [f"<code>{CODE}</code>", answers[5]]
    numbers = {}

    def sampler(live):
        for rollout in live:
            numbers.setdefault(id(rollout), len(numbers))
        texts = [chains[numbers[id(rollout)]][len(rollout.turns)] for rollout in live]
        actions = [encode_text(policy, text) + [policy.end_id] for text in texts]
        return [(ids, [-5.0] * len(ids)) for ids in actions]
    tasks = [task(i, "Why? " * (3 * i + 1), picture(i) if i > 1 else None) for i in range(4)]
    with CodeTool(workers=1, timeout=20.0) as tool:
        rollouts, _ = roll_out(policy, tasks, Tools(code=tool), LIMITS, group_size=2,
                               sampler=sampler)
    assert [len(r.images) for r in rollouts] == [0, 0, 0, 0, 1, 2, 1, 1]
    return list(zip(rollouts, [1.5, -1.0, 0.5, -0.25, 0.75, -2.0, 1.0, 0.25]))


@pytest.fixture(scope="module")
def plain(model_folder, reference_folder, rows):
    """plain(loss, updates): (metrics, what every parameter loses) of the updates of all rows."""
    def compute(loss, updates=1):
        return plain_update(model_folder, reference_folder, rows,
                            Config(**SETTINGS, loss=loss, updates_per_batch=updates))
    return functools.cache(compute)


def plain_terms(all_logps, ref_all_logps, old_logps, rollout, advantage, config):
    """[(objective, KL, whether it is clipped, entropy, log-prob)] of every token that the policy
    wrote."""
    terms = []
    for t, (token, is_action) in enumerate(zip(rollout.ids, rollout.action_mask)):
        if is_action:
            logp, q = all_logps[t - 1, token], ref_all_logps[t - 1, token]
            ratio = (logp - (old_logps[len(terms)] if old_logps else logp.item())).exp()
            above = ratio > 1 + config.clip_high and advantage > 0
            below = ratio < 1 - config.clip_low and advantage < 0
            bounded = 1 + config.clip_high if above else 1 - config.clip_low if below else ratio
            kl = (q - logp).exp() - (q - logp) - 1
            entropy = -(all_logps[t - 1].exp() * all_logps[t - 1]).sum().item()
            terms.append((bounded * advantage - config.beta * kl, kl.item(), bool(above or below),
                          entropy, logp.item()))
    return terms


def plain_update(folder, reference_folder, rows, config):
    """In loops over rollouts and tokens, from the papers' formulas; gradient descent with a rate of
    LR."""
    load_plain = Qwen2_5_VLForConditionalGeneration.from_pretrained
    model, reference = (load_plain(f, dtype=torch.float32).eval()
                        for f in (folder, reference_folder))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        ref_all_logps = [plain_logps(reference, rollout, config.temperature) for rollout, _ in rows]
    num_tokens = sum(sum(r.action_mask) for r, _ in rows)
    longest = config.max_turns * config.max_new_tokens
    old_logps, gap = [None] * len(rows), None
    for _ in range(config.updates_per_batch):
        metrics, total = dict.fromkeys(("loss", "kl", "clipped", "entropy"), 0.0), 0.0
        for i, (rollout, advantage) in enumerate(rows):
            all_logps = plain_logps(model, rollout, config.temperature)
            terms = plain_terms(all_logps, ref_all_logps[i], old_logps[i], rollout, advantage, config)
            weight = {"grpo": 1 / (len(rows) * len(terms)), "dapo": 1 / num_tokens,
                      "dr_grpo": 1 / (len(rows) * longest)}[config.loss]
            loss = -weight * sum(term[0] for term in terms)
            loss.backward()
            for name, values in zip(metrics, ([loss.item() / weight], *list(zip(*terms))[1:4])):
                metrics[name] += weight * sum(values)
            total += weight * len(terms)
            # Of the policy before its first step
            old_logps[i] = old_logps[i] or [term[4] for term in terms]
        if gap is None:
            gap = max(abs(logp + 5.0) for logps in old_logps for logp in logps)
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
        with torch.no_grad():
            for p in model.parameters():
                p -= LR * p.grad
                p.grad = None
    # Means over the tokens
    metrics |= {name: metrics[name] / total for name in ("kl", "clipped", "entropy")}
    return (metrics | {"gap": gap, "tokens": num_tokens, "grad_norm": norm, "skipped": 0},
            {name: before[name] - p.detach() for name, p in model.named_parameters()})


def our_update(folder, reference_folder, rows, config):
    """The same of train.py: (metrics, what every parameter lost)."""
    policy, reference = (load_policy(str(f), shard=True) for f in (folder, reference_folder))
    before = {name: p.full_tensor().detach().clone() for name, p in policy.model.named_parameters()}
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=LR)
    batches, num_real = even_micro_batches(policy, [r for r, _ in rows], [a for _, a in rows],
                                           config.micro_batch_tokens)
    metrics = update(policy, optimizer, batches, num_real,
                     reference_logps(reference, batches, config.temperature), config)
    return metrics, {name: before[name] - p.full_tensor().detach()
                     for name, p in policy.model.named_parameters()}


def assert_is_the_formula(updated, plain, scale=1.0):
    """Our update is the plain one; scale: what the gradients were cut to."""
    (metrics, lost), (expected_metrics, expected) = updated, plain
    assert metrics == {name: pytest.approx(value, rel=1e-4)
                       for name, value in expected_metrics.items()}
    # Fp32, padded or not; a weight of 0.1 rounds what it lost by 1e-8
    for name, wanted in expected.items():
        assert wanted.norm() > 0, name
        assert (lost[name] - scale * wanted).norm() <= 1e-4 * scale * wanted.norm() + 1e-6, name


@pytest.mark.parametrize("loss, micro_batch_tokens",
                         [("grpo", 1), ("grpo", 300), ("grpo", 100_000), ("dapo", 300),
                          ("dr_grpo", 300)])
def test_an_update_is_the_formula_on_a_plain_model(model_folder, reference_folder, rows, plain,
                                                   rank, loss, micro_batch_tokens):
    config = Config(**SETTINGS, loss=loss, micro_batch_tokens=micro_batch_tokens)
    assert plain(loss)[0]["kl"] > 0.005 and plain(loss)[0]["grad_norm"] > 0.05
    assert_is_the_formula(our_update(model_folder, reference_folder, rows, config), plain(loss))


def test_later_updates_of_a_batch_are_clipped_around_the_policy_that_began_it(
        model_folder, reference_folder, rows, plain, rank):
    config = Config(**SETTINGS, updates_per_batch=3, micro_batch_tokens=300)
    assert 0.1 < plain("grpo", 3)[0]["clipped"] < 0.9
    assert_is_the_formula(our_update(model_folder, reference_folder, rows, config),
                          plain("grpo", 3))


def test_dr_grpo_divides_by_the_longest_rollout_of_its_mode(model_folder, reference_folder, rows,
                                                            rank):
    """A step has one turn, however many an episode may take."""
    losses = [our_update(model_folder, reference_folder, rows,
                         Config(**SETTINGS, loss="dr_grpo", mode=mode))[0]["loss"]
              for mode in ("episode", "step")]
    assert losses[1] == pytest.approx(SETTINGS["max_turns"] * losses[0], rel=1e-5)


def test_a_gap_that_is_no_number_shows(model_folder, rows, rank):
    policy = load_policy(str(model_folder), shard=True)
    batches, num_real = even_micro_batches(policy, [r for r, _ in rows], [a for _, a in rows], 1)
    batches[1].sampled_logps[batches[1].action_mask.nonzero(as_tuple=True)] = math.nan
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=LR)
    metrics = update(policy, optimizer, batches, num_real, [None] * len(batches),
                     Config(**SETTINGS | {"beta": 0.0}))
    assert math.isnan(metrics["gap"]) and math.isfinite(metrics["loss"])


def test_the_only_usable_task_is_found(rank):
    """Whichever place it has in the shuffles of the epochs."""
    tasks = [{"id": n} for n in range(8)]
    for step in range(40):
        chosen = prompts_of_step(tasks, step, Config(), lambda task: task["id"] == 0)
        assert chosen == [{"id": 0}] * 8
    with pytest.raises(ValueError, match="none of 8 tasks could be opened"):
        prompts_of_step(tasks, 0, Config(), lambda task: False)


def test_a_rank_keeps_no_more_than_its_shard_of_the_gradient(model_folder, rows, rank,
                                                             monkeypatch):
    """After each micro-batch. Reduced only after the last, it would be whole on every rank."""
    policy = load_policy(str(model_folder), shard=True)
    batches, num_real = even_micro_batches(policy, [r for r, _ in rows], [a for _, a in rows], 1)
    seen, action_logps = [], train.action_logps

    def scored(*args):
        seen.append({p.grad is not None for p in policy.model.parameters()})
        return action_logps(*args)
    monkeypatch.setattr(train, "action_logps", scored)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=LR)
    update(policy, optimizer, batches, num_real, [None] * len(batches),
           Config(**SETTINGS | {"beta": 0.0}))
    assert len(seen) > 2 and seen == [{False}] + [{True}] * (len(seen) - 1)


def test_gradients_are_scaled_down_to_max_grad_norm(model_folder, reference_folder, rows, plain,
                                                    rank):
    updated = our_update(model_folder, reference_folder, rows,
                         Config(**SETTINGS | {"max_grad_norm": 0.1}))
    assert_is_the_formula(updated, plain("grpo"), scale=0.1 / plain("grpo")[0]["grad_norm"])


def share_of_update(folder, reference_folder, shares, config):
    return our_update(folder, reference_folder, shares[dist.get_rank()], config)


def test_two_ranks_with_unlike_shares_are_the_formula(model_folder, reference_folder, rows, plain,
                                                      tmp_path):
    shares = rows[:6], rows[6:]  # six micro-batches beside two
    for updated in on_ranks(2, tmp_path / "ranks", share_of_update, model_folder, reference_folder,
                            shares,
                            Config(**SETTINGS, micro_batch_tokens=1)):
        assert_is_the_formula(updated, plain("grpo"))


# ---- a short run ---------------------------------------------------------------------------------


def run(out, tasks, **settings):
    """train.py's main in this process: 2 steps of 4 prompts of 4 samples, with a checkpoint after
    each."""
    config = Config(**{"output_dir": str(out), "tasks": str(tasks), "eval_tasks": "", "steps": 2,
                       "prompts_per_step": 4,
                       "group_size": 4, "max_turns": 2, "lr": 1e-3, "lr_decay": 1.0,
                       "temperature": 0.8, "save_every": 1,
                       "rollouts_every": 1, "search_cache": ""} | settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("LOCAL_WORLD_SIZE", str(os.cpu_count()))  # one thread, as all tests
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            tasks, held_out, search = prepare(config)
            main(config, tasks, held_out, search, *load(config, tasks, held_out))
            dist.destroy_process_group()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return config


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """(config, folder): two tasks with the same question about different signs, so that each stands
    twice in a batch."""
    folder = tmp_path_factory.mktemp("short")
    offline = ROOT / "data" / "offline"
    clear, dark = [json.loads((offline / "train.json").read_text())[i] for i in (0, 3)]
    assert clear["question"] == dark["question"]
    assert (clear["type"], dark["type"]) == (["none"], ["dark"])
    tasks = [{key: str(offline / value) if key.endswith("_path") else value
              for key, value in task.items()}
             for task in (clear, dark)]
    (folder / "tasks.json").write_text(json.dumps(tasks))
    return run(folder / "run", folder / "tasks.json", seed=5), folder / "run"


@pytest.fixture
def stopped(short_run, tmp_path):
    """A copy of that run as a kill after the first checkpoint would have left it."""
    copy = shutil.copytree(short_run[1], tmp_path / "run")
    for name in ("checkpoint-2", "model"):
        shutil.rmtree(copy / name)
    return copy


def rows_without_timings(path):
    return [{key: value for key, value in json.loads(line).items()
             if not re.search("seconds|tokens_per_s", key)}
            for line in path.read_text().splitlines()]


def test_a_run_that_was_stopped_and_resumed_is_the_run(short_run, stopped):
    config, whole = short_run
    run(stopped, config.tasks, resume=True, seed=config.seed)
    resumed, alone = (rows_without_timings(run / "metrics.jsonl") for run in (stopped, whole))
    assert resumed == alone
    for file in ("rollouts/step_2.jsonl", "model/model.safetensors"):  # bit for bit
        assert (stopped / file).read_bytes() == (whole / file).read_bytes()


def test_sampled_and_scored_agree_at_a_temperature(short_run):
    """Prompts with the same text and other images stand side by side; tools answer; the policy has
    learnt for a step."""
    assert all(row["gap"] < 1e-4 for row in rows_without_timings(short_run[1] / "metrics.jsonl"))


def test_a_weight_moves_as_far_as_the_learning_rate_in_the_log(short_run, rank):
    """AdamW moves no weight by more than 1.002 times its rate in its second step, and one whose
    gradient is steady by it."""
    policy = load_policy(str(ROOT / "data" / "model"), shard=True)
    # In place
    dcp.load({"model": get_model_state_dict(policy.model)},
             checkpoint_id=short_run[1] / "checkpoint-1")
    after = dict(load_policy(str(short_run[1] / "model")).model.named_parameters())
    moved = max((p.full_tensor() - after[name]).abs().max().item()
                for name, p in policy.model.named_parameters())
    rows = rows_without_timings(short_run[1] / "metrics.jsonl")
    assert [row["lr"] for row in rows] == [1e-3, 0.5e-3]
    assert moved == pytest.approx(0.5e-3, rel=0.01)


def test_advantages_are_within_the_samples_of_one_prompt_even_where_prompts_are_equal(short_run):
    for step in (1, 2):
        rows = rows_without_timings(short_run[1] / "rollouts" / f"step_{step}.jsonl")
        groups = [rows[i:i + 4] for i in range(0, 16, 4)]
        assert sorted(len({row["id"] for row in group}) for group in groups) == [1] * 4
        assert {row["question"]
                for row in rows} == {rows[0]["question"]} and len({row["id"] for row in rows}) == 2
        means = [statistics.mean(row["reward"] for row in group) for group in groups]
        assert len(set(means)) >= 3  # or groups that merge would not show
        for group, mean in zip(groups, means):
            std = statistics.stdev(row["reward"] for row in group)
            assert [row["advantage"] for row in group] == pytest.approx(
                [(row["reward"] - mean) / (std + 1e-4) for row in group], abs=1e-4)


# ---- prompts and seeds ---------------------------------------------------------------------------


def draw(seed):
    """What a rank does before a rollout: prompts and the first random number of steps 0 to 3."""
    config, result = Config(prompts_per_step=4, seed=seed), []
    for step in range(4):
        prompts = prompts_of_step(list(range(8)), step, config)
        seed_step(seed, step)
        result.append((prompts, torch.rand(()).item()))
    return result


def test_an_epoch_has_every_task_once_in_an_order_of_its_own_and_ranks_share_it(tmp_path):
    with group(dist.HashStore()):
        whole = draw(0)
    first, second = whole[0][0] + whole[1][0], whole[2][0] + whole[3][0]
    assert sorted(first) == sorted(second) == [*range(8)]
    assert first != second and first != sorted(first)
    left, right = on_ranks(2, tmp_path / "two", draw, 0)
    assert [a + b for (a, _), (b, _) in zip(left, right)] == [prompts for prompts, _ in whole]
    assert {len(prompts) for prompts, _ in left + right} == {2}
    # No step and no rank repeats another's random numbers
    assert len({number for _, number in left + right}) == 8


def test_another_seed_draws_other_prompts_and_other_numbers(rank):
    zero, one = draw(0), draw(1)
    assert all(a != b for (a, _), (b, _) in zip(zero, one))
    assert len({number for _, number in zero + one}) == 8
