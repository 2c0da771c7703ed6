"""Bugs that were seen in well-known training code, each as a change of a few lines of ours, and the tests that must notice it.

`python tests/mutants/run.py` applies them one at a time and says which were killed.
"""
from typing import NamedTuple

GRPO, MODEL, ROLLOUT, TRAIN = "tests/test_grpo.py", "tests/test_model.py", "tests/test_rollout.py", "tests/test_train.py"
UPDATE, EXACT = "tests/test_update.py", "tests/test_exact.py"
FORMULA = f"{UPDATE}::test_an_update_is_the_formula_on_a_plain_model"
RESUMED = f"{UPDATE}::test_a_run_that_was_stopped_and_resumed_is_the_run"
ENUMERATED = f"{EXACT}::test_loss_gradient_and_metrics_are_those_of_the_enumerated_objective"


class Mutant(NamedTuple):
    name: str
    bug: str  # what the change does, as its victims would say
    file: str
    old: str  # stands exactly once in the file
    new: str
    tests: list[str]  # one of them must fail; the cheapest that does


MUTANTS = [
    # ---- the scale of the loss
    Mutant("loss_per_micro_batch", "the loss is normalised per micro-batch: a memory flag changes the objective", "train.py",
           'num_rollouts=counts["rollouts"]', "num_rollouts=len(batch.advantages)", [f"{FORMULA}[grpo-300]"]),
    Mutant("tokens_per_micro_batch", "the same of the mean over tokens", "train.py",
           'num_tokens=counts["tokens"]', "num_tokens=int(batch.action_mask.sum())", [f"{FORMULA}[dapo-300]"]),
    Mutant("loss_over_micro_batches", "the gradient is a mean over micro-batches, however unlike they are", "train.py",
           "(loss * dist.get_world_size()).backward()", "(loss * dist.get_world_size() / len(batches)).backward()",
           [f"{FORMULA}[grpo-300]"]),
    Mutant("last_accumulation", "the last, smaller micro-batch is scaled down once more", "train.py",
           "(loss * dist.get_world_size()).backward()",
           "(loss * len(batch.advantages) / max(len(b.advantages) for b in batches)).backward()",
           [f"{FORMULA}[grpo-300]"]),
    Mutant("logs_last_micro_batch", "the logged loss is the last micro-batch's", "train.py",
           "sums[name] += value.item()", "sums[name] = value.item()", [f"{FORMULA}[grpo-1]"]),
    Mutant("mean_over_tokens", "mean over tokens where mean over rollouts was meant", "grpo.py",
           "return mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / num_rollouts", "return mask / mask.sum().clamp(min=1)",
           [f"{GRPO}::test_weights_of_ragged_rollouts"]),
    Mutant("length_in_dr_grpo", "Dr. GRPO divides by the longest rollout at hand instead of a constant", "grpo.py",
           "return mask / (num_rollouts * max_tokens)", "return mask / (num_rollouts * mask.shape[1])",
           [f"{GRPO}::test_weights_of_ragged_rollouts"]),
    Mutant("mask_in_place", "a mask edited in place changes the denominator of what comes later", "grpo.py",
           "return mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / num_rollouts",
           "return mask.div_(mask.sum(dim=1, keepdim=True).clamp(min=1)) / num_rollouts",
           [f"{GRPO}::test_the_mask_is_left_as_it_was"]),
    Mutant("ranks_are_averaged", "FSDP averages over ranks what is a sum: two ranks learn at half the rate", "train.py",
           "(loss * dist.get_world_size()).backward()", "loss.backward()",
           [f"{UPDATE}::test_two_ranks_with_unlike_shares_are_the_formula"]),
    Mutant("filler_counts", "micro-batches that only keep ranks in step are trained on", "train.py",
           "weights = weights * (i < num_real)", "weights = weights * (i >= 0)",
           [f"{UPDATE}::test_two_ranks_with_unlike_shares_are_the_formula"]),
    # ---- the loss
    Mutant("kl_swapped", "the KL's arguments are swapped: drift is rewarded or punished by the wrong law", "grpo.py",
           "kl = kl_k3(logps, ref_logps)", "kl = kl_k3(ref_logps, logps)", [f"{ENUMERATED}[grpo-on policy]"]),
    Mutant("k1_swapped", "the k1 estimate has the wrong sign: its expectation is minus the divergence", "grpo.py",
           "return logps - ref_logps", "return ref_logps - logps",
           [f"{EXACT}::test_both_estimates_add_up_to_the_divergence_of_the_sequence_laws"]),
    Mutant("kl_sign", "the KL is added to the objective: drift is rewarded", "grpo.py",
           "clipped) - beta * kl)", "clipped) + beta * kl)", [f"{ENUMERATED}[grpo-on policy]"]),
    Mutant("clip_maximum", "the clip takes the better of the two terms", "grpo.py",
           "torch.minimum(plain, clipped)", "torch.maximum(plain, clipped)", [f"{ENUMERATED}[dapo-clip]"]),
    Mutant("clip_high_ignored", "the upper clip is ignored: the lower one is used twice", "grpo.py",
           "ratio.clamp(1 - clip_low, 1 + clip_high)", "ratio.clamp(1 - clip_low, 1 + clip_low)", [f"{ENUMERATED}[dapo-clip]"]),
    Mutant("clip_only", "only the clipped term is kept: a bad token above the range has no gradient", "grpo.py",
           "torch.minimum(plain, clipped)", "clipped", [f"{GRPO}::test_clipping_at_0_9_and_1_3"]),
    Mutant("poisoned_padding", "padding may hold infinities: a mask hides their value but not their gradient", "grpo.py",
           "torch.where(weights > 0, x, 0.0)", "x",
           [f"{GRPO}::test_masked_tokens_get_a_gradient_of_exactly_zero"]),
    # ---- advantages
    Mutant("no_guard_for_zero_std", "no guard for a std of zero: a group of equal rewards gives NaN", "grpo.py",
           "(rewards.std(dim=1, keepdim=True) + 1e-4)", "rewards.std(dim=1, keepdim=True)",
           [f"{GRPO}::test_equal_rewards_get_exactly_zero"]),
    Mutant("flat_group_off_by_an_ulp", "equal rewards differ from their rounded mean, and the std blows it up", "grpo.py",
           "centred[(rewards == rewards[:, :1]).all(dim=1)] = 0.0", "pass",
           [f"{EXACT}::test_equal_rewards_give_a_policy_gradient_of_exactly_zero"]),
    Mutant("population_std", "the std divides by G instead of G - 1", "grpo.py",
           "rewards.std(dim=1, keepdim=True)", "rewards.std(dim=1, correction=0, keepdim=True)",
           [f"{ENUMERATED}[grpo-on policy]"]),
    Mutant("std_over_the_batch", "deviations are divided by the std of the whole batch", "grpo.py",
           "rewards.std(dim=1, keepdim=True)", "rewards.std()", [f"{GRPO}::test_a_group_does_not_see_the_others"]),
    Mutant("groups_by_prompt_text", "groups are keyed by the prompt's text: equal prompts merge", "train.py",
           "torch.tensor(rewards).view(-1, config.group_size)",
           'torch.tensor(rewards).view(len({r.task["question"] for r in rollouts}), -1)',
           [f"{UPDATE}::test_advantages_are_within_the_samples_of_one_prompt_even_where_prompts_are_equal"]),
    # ---- what is sampled is what is scored
    Mutant("temperature_not_scored", "sampled at a temperature, scored without", "grpo.py",
           ".float() / temperature", ".float()",
           [f"{GRPO}::test_logps_and_gradients_are_those_of_a_softmax_over_the_kept_ids_at_the_temperature"]),
    Mutant("temperature_ignored", "--temperature does not reach the update", "train.py",
           "score(policy, batch.inputs, batch.action_mask, config.temperature)",
           "score(policy, batch.inputs, batch.action_mask, 1.0)", [f"{FORMULA}[grpo-300]"]),
    Mutant("suppressed_not_scored", "ids that are never sampled keep their share of the scored softmax", "grpo.py",
           'logits.index_fill(1, suppressed, float("-inf"))', "logits",
           [f"{GRPO}::test_logps_and_gradients_are_those_of_a_softmax_over_the_kept_ids_at_the_temperature"]),
    Mutant("top_k", "sampled with top-k, scored with the full softmax", "model.py", "top_k=0", "top_k=50",
           [f"{MODEL}::test_samples_are_as_frequent_as_they_are_probable"]),
    Mutant("retokenised", "sampled ids are decoded and tokenised again", "rollout.py",
           "    rollout.ids += ids\n    rollout.action_mask += [1] * len(ids)\n",
           "    rollout.ids += encode_text(policy, policy.tokenizer.decode(ids[:-1])) + ids[-1:]\n"
           "    rollout.action_mask += [1] * len(ids)\n",
           [f"{ROLLOUT}::test_sampled_ids_are_kept_where_the_tokenizer_would_choose_others"]),
    Mutant("positions_1d", "positions are counted 1, 2, 3 across images: no error, only other logits", "model.py",
           "(ids == policy.image_id).int(), image_grid_thw=grids,",
           "torch.zeros_like(ids).int(), image_grid_thw=None,",
           [f"{MODEL}::test_positions_of_examples_worked_by_hand"]),
    Mutant("images_by_sample", "patches are cut by sample where they lie flat over the batch: images are dropped", "model.py",
           "images = [image for s in sequences for image in s.images]", "images = [s.images[0] for s in sequences if s.images]",
           [f"{MODEL}::test_images_follow_the_order_of_the_sequences"]),
    # ---- masks
    Mutant("end_is_no_target", "the end token is never a target, so nothing teaches the policy to stop", "rollout.py",
           "rollout.action_mask += [1] * len(ids)", "rollout.action_mask += [int(i != policy.end_id) for i in ids]",
           [f"{ROLLOUT}::test_the_end_token_is_part_of_the_action_and_not_of_its_text"]),
    Mutant("end_is_dropped", "the end token is sampled and left out of the sequence", "model.py",
           "ids.index(policy.end_id) + 1 if", "ids.index(policy.end_id) if",
           [f"{MODEL}::test_a_row_ends_with_its_end_token_while_others_go_on"]),
    Mutant("observation_in_the_loss", "the policy is trained to write what the tools said", "rollout.py",
           "rollout.action_mask += [0] * len(ids)", "rollout.action_mask += [1] * len(ids)",
           [f"{ROLLOUT}::test_mask_of_a_search"]),
    Mutant("observation_missing", "the tool's output is missing from the sequence that is trained on", "rollout.py",
           "    rollout.ids += ids\n    rollout.action_mask += [0] * len(ids)\n    rollout.logps += [0.0] * len(ids)\n", "",
           [f"{ROLLOUT}::test_mask_of_a_search"]),
    # ---- resuming, randomness
    Mutant("resume_repeats", "a resumed run starts its data again", "train.py",
           "prompts_of_step(tasks, step, config)", "prompts_of_step(tasks, step - first, config)", [RESUMED]),
    Mutant("resume_loses_optimizer", "a resumed run starts with an empty optimizer", "train.py",
           'set_state_dict(policy.model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])',
           'policy.model.load_state_dict(state["model"])', [RESUMED]),
    Mutant("resume_keeps_no_rng", "random numbers of a resumed run are not those of the whole run", "train.py",
           "seed_step(config, step)\n            # 2.", "seed_step(config, step - first)\n            # 2.", [RESUMED]),
    Mutant("ranks_sample_alike", "all ranks draw the same random numbers", "train.py",
           "* 1_009 + dist.get_rank())", "* 1_009)",
           [f"{UPDATE}::test_an_epoch_has_every_task_once_in_an_order_of_its_own_and_ranks_share_it"]),
    Mutant("ranks_share_prompts", "all ranks roll out the same prompts", "train.py",
           "return chosen[dist.get_rank() * share:(dist.get_rank() + 1) * share]", "return chosen[:share]",
           [f"{UPDATE}::test_an_epoch_has_every_task_once_in_an_order_of_its_own_and_ranks_share_it"]),
    Mutant("epochs_alike", "every epoch has the same order", "train.py",
           "config.seed * 1_000_003 + epoch", "config.seed * 1_000_003",
           [f"{UPDATE}::test_an_epoch_has_every_task_once_in_an_order_of_its_own_and_ranks_share_it"]),
    # ---- flags
    Mutant("rate_only_in_the_log", "the learning rate decays in the log and not in the optimizer", "train.py",
           'group["lr"] = learning_rate(step, config)', 'group["lr"] = config.lr',
           [f"{UPDATE}::test_a_weight_moves_as_far_as_the_learning_rate_in_the_log"]),
    Mutant("beta_ignored", "--beta does not reach the loss", "train.py", "ref_logps=ref, beta=config.beta)",
           "ref_logps=ref, beta=0.04)", [f"{FORMULA}[grpo-300]"]),
    Mutant("norm_ignored", "--max_grad_norm does nothing", "train.py",
           "clip_grad_norm_(policy.model.parameters(), config.max_grad_norm)",
           "clip_grad_norm_(policy.model.parameters(), 1e9)", [f"{UPDATE}::test_gradients_are_scaled_down_to_max_grad_norm"]),
    Mutant("seed_ignored", "--seed does nothing", "train.py", "config.seed * 100_003 + step", "step",
           [f"{UPDATE}::test_another_seed_draws_other_prompts_and_other_numbers"]),
    Mutant("false_is_true", "a flag of type bool that takes any text for true", "train.py",
           "gradient_checkpointing: bool", "gradient_checkpointing: str", [f"{TRAIN}::test_false_is_false"]),
    # ---- text of the model
    Mutant("eval", "text of the model is evaluated in the trainer's process", "reward.py",
           'return sorted(set(re.findall(r"\\w+", text.lower())))', "return sorted(set(eval(text)))",
           ["tests/test_reward.py::test_problem_labels", "tests/test_layout.py::test_text_is_never_run_but_in_the_child"]),
    Mutant("special_tokens_in_results", "a search result that spells <|im_end|> ends the turn", "model.py",
           "add_special_tokens=False, split_special_tokens=True", "add_special_tokens=False",
           [f"{MODEL}::test_special_tokens_in_foreign_text_are_plain_characters"]),
    Mutant("answer_of_a_thought", "an answer in a thought counts", "tools.py",
           "turn = after if think else text", "turn = text", ["tests/test_tools.py::test_a_turn_has_one_action"]),
    Mutant("any_gold_inside_a_word", "a gold inside another word counts as found", "reward.py",
           'f" {gold} " in text', "gold in text",
           ["tests/test_reward.py::test_the_search_part_of_an_episode_needs_a_gold_in_the_evidence"]),
]
