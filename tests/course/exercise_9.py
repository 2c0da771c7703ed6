"""Exercise 9: a packed row: attention in it, and how it is put together."""
from course import Exercise, Rule, Wrong

SEES = """\
    A sample sees its prompt and itself. query (1, heads, N, d), key and value (1, key heads, N, d),
    where heads / key heads neighbouring queries share a key; returns (1, heads, N, d). There is no
    padding and no N x N mask: the prompt's part is computed once for a group, the samples' as if
    each were alone.
    """
HEAD = """                     segments: Segments, scaling: float) -> Tensor:
    \"\"\"Causal attention in a packed row"""
SHARE = """\
    Neighbours with the same prompt share it: G of them cost P + G·C tokens, not G·(P + C). With
    G = 2, the prompt [10, 11] and the samples [20, 21, 9] and [30, 9]:

        place in the row    0  1 |  2  3  4 |  5  6
        input_ids          10 11 | 20 21  9 | 30  9
        position_ids        0  1 |  2  3  4 |  2  3     each sample goes on where the prompt ends
        targets            [[20, 21, 9], [30, 9, 0]]
        predictors         [[ 1,  2, 3], [ 1, 5, 0]]    the prompt's last place predicts 20 and 30
        segments           [(2, [3, 2])]                one prompt of 2 tokens, samples of 3 and 2
"""
LOOP = """    prompt = None
    for b, rollout in enumerate(rollouts):
        before, prompt = prompt, prompt_of(policy, rollout)
        length, is_shared = len(prompt.ids), prompt == before
        if not is_shared:
"""
OWN = """        sample_ids, start = rollout.ids[length:], len(ids)
        ids += sample_ids
        places.append(positions[:, b, length:len(rollout.ids)])
        images += rollout.images[len(prompt.images):]
        segments[-1][1].append(len(sample_ids))
        targets.append(sample_ids)
        predictors.append([prompt_end, *range(start, len(ids) - 1)])
        masks.append(rollout.action_mask[length:])
        logps.append(rollout.logps[length:])
"""
OPENING = """            ids += prompt.ids
            places.append(positions[:, b, :length])
            images += prompt.images
            segments.append((length, []))
            prompt_end = len(ids) - 1  # predicts the first token of every sample
"""

WINDOW = [
    ("grpo.py", HEAD, HEAD.replace("scaling: float)", "scaling: float, *,\n"
                                   "                     window: int | None = None)")),
    ("grpo.py", SEES, SEES[:-4] + """
    window: how many tokens of its sample a token of a sample sees, itself included; it sees the
    whole prompt too, as the sinks of StreamingLLM (arXiv 2309.17453). None: all until itself. A
    token of a prompt always sees all of the prompt until itself.
    """),
    ("grpo.py", """\
            sees = sees.tril(prompt)  # the whole prompt, and of itself no later token
""", """\
            sees = sees.tril(prompt)  # the whole prompt, and of itself no later token
            if window is not None:
                sees[:, prompt:] = sees[:, prompt:].triu(1 - window)
"""),
    ("rollout.py", SHARE, """\
    Neighbours with the same prompt share it, but for its last token, which begins every sample: so
    no two samples have a predictor in common. A prompt has 2 tokens at least. With G = 2, the
    prompt [10, 11] and the samples [20, 21, 9] and [30, 9]:

        place in the row    0 |  1  2  3  4 |  5  6  7
        input_ids          10 | 11 20 21  9 | 11 30  9
        position_ids        0 |  1  2  3  4 |  1  2  3   each goes on where the shared part ends
        targets            [[20, 21, 9], [30, 9, 0]]
        predictors         [[ 1,  2, 3], [ 5, 6, 0]]     each 11 predicts the first token behind it
        segments           [(1, [4, 3])]                 what is shared, then what is not
"""),
    ("rollout.py", "        length, is_shared = len(prompt.ids), prompt == before\n        if not",
     "        length, is_shared = len(prompt.ids) - 1, prompt == before\n        if not"),
    ("rollout.py", OPENING, """            ids += prompt.ids[:-1]
            places.append(positions[:, b, :length])
            images += prompt.images
            segments.append((length, []))
"""),
    ("rollout.py", OWN, """\
        sample_ids, start = rollout.ids[length:], len(ids)  # from the prompt's last token on
        ids += sample_ids
        places.append(positions[:, b, length:len(rollout.ids)])
        images += rollout.images[len(prompt.images):]
        segments[-1][1].append(len(sample_ids))
        targets.append(sample_ids[1:])
        predictors.append([*range(start, len(ids) - 1)])
        masks.append(rollout.action_mask[length + 1:])
        logps.append(rollout.logps[length + 1:])
"""),
    ("rollout.py", "new = len(rollout.ids) - (len(prompt.ids) if prompt == before else 0)",
     "new = len(rollout.ids) - (len(prompt.ids) - 1 if prompt == before else 0)"),
    ("rollout.py", "segments: Segments  # tokens of each prompt, and of each of its samples",
     "segments: Segments  # tokens that samples share, and of each of these samples"),
]
SINKS = [
    ("grpo.py", HEAD, HEAD.replace("scaling: float)", "scaling: float, *,\n"
                                   "                     sinks: Tensor | None = None)")),
    ("grpo.py", SEES, SEES[:-4] + """
    sinks (heads,): one more score in each softmax of a head, not scaled. It takes its share of the
    weight and has no value, so what tokens get adds up to less than 1 (gpt-oss, arXiv 2508.10925).
    It has a gradient too. None: no such score.
    """),
    ("grpo.py", """    repeats = query.shape[1] // key.shape[1]
    key = key""", """    def attend(query, key, value, sees):
        # query (1, heads, n, d), sees (n, keys) bool -> (1, heads, n, d)
        if sinks is not None:  # one more key, whose score is the sink's and whose value is 0
            key, value = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (key, value))
            scores = torch.zeros_like(sees, dtype=query.dtype).masked_fill(~sees, float("-inf"))
            scores = scores.expand(len(sinks), -1, -1)  # (heads, n, keys)
            last = sinks.to(query.dtype)[:, None, None].expand(-1, len(sees), 1)
            sees = torch.cat([scores, last], dim=2)
        return scaled_dot_product_attention(query, key, value, attn_mask=sees, scale=scaling)

    repeats = query.shape[1] // key.shape[1]
    key = key"""),
    ("grpo.py", """        outputs.append(scaled_dot_product_attention(
            q, prompt_key, prompt_value, is_causal=True, scale=scaling))
""", """        sees = torch.ones(prompt, prompt, dtype=torch.bool, device=q.device).tril()
        outputs.append(attend(q, prompt_key, prompt_value, sees))
"""),
    ("grpo.py", """            outputs.append(scaled_dot_product_attention(
                q, k, v, attn_mask=sees, scale=scaling))
""", """            outputs.append(attend(q, k, v, sees))
"""),
    ("rollout.py", SHARE, """\
    Rollouts with the same prompt share it, wherever they stand among the others: G of them cost
    P + G·C tokens. In the row their samples stand in a group, in the order of the rollouts; groups
    stand in the order of their first rollouts. The (B, T) tensors stay in the order of the
    rollouts. With the samples [20, 21, 9] and [30, 9] of the prompt [10, 11], and between them
    the sample [40] of the prompt [12]:

        place in the row    0  1 |  2  3  4 |  5  6 |  7 |  8
        input_ids          10 11 | 20 21  9 | 30  9 | 12 | 40
        position_ids        0  1 |  2  3  4 |  2  3 |  0 |  1   each goes on where its prompt ends
        targets            [[20, 21, 9], [40, 0, 0], [30, 9, 0]]
        predictors         [[ 1,  2, 3], [ 7, 0, 0], [ 1, 5, 0]]
        segments           [(2, [3, 2]), (1, [1])]
"""),
    ("rollout.py", LOOP + OPENING + OWN, """\
    targets, predictors, masks, logps = ([None] * len(rollouts) for _ in range(4))
    groups = []  # (prompt, which rollouts begin with it)
    for b, rollout in enumerate(rollouts):
        prompt = prompt_of(policy, rollout)
        members = next((members for known, members in groups if known == prompt), None)
        if members is None:
            members = []
            groups.append((prompt, members))
        members.append(b)
    for prompt, members in groups:
        length = len(prompt.ids)
        ids += prompt.ids
        places.append(positions[:, members[0], :length])
        images += prompt.images
        segments.append((length, []))
        prompt_end = len(ids) - 1  # predicts the first token of every sample
        for b in members:
            rollout = rollouts[b]
            sample_ids, start = rollout.ids[length:], len(ids)
            ids += sample_ids
            places.append(positions[:, b, length:len(rollout.ids)])
            images += rollout.images[len(prompt.images):]
            segments[-1][1].append(len(sample_ids))
            targets[b] = sample_ids
            predictors[b] = [prompt_end, *range(start, len(ids) - 1)]
            masks[b] = rollout.action_mask[length:]
            logps[b] = rollout.logps[length:]
"""),
    ("rollout.py", """\
    targets, predictors, masks, logps = [], [], [], []  # of each rollout, behind its prompt
""", ""),
]

EXERCISE = Exercise(
    number=9, title="A packed row: attention and collate", hours=3.0,
    blanks={"grpo.py": ["packed_attention"], "rollout.py": ["collate"]},
    drops={},
    rules={
        "neighbours": Rule(
            "A sample sees its prompt and itself; neighbours with the same prompt share all of "
            "it.", []),
        "window": Rule(
            "Attention takes a window over a sample's own past; the last token of a prompt is not "
            "shared, and begins every sample.", WINDOW),
        "sinks": Rule(
            "Attention takes a sink for each head; equal prompts are shared wherever they stand.",
            SINKS),
    },
    wrong=[
        Wrong("samples_see_each_other", "a sample sees the samples before it", "grpo.py",
              """            k = torch.cat([prompt_key, k], dim=2)  # (1, heads, prompt + size, d)
            v = torch.cat([prompt_value, v], dim=2)
            sees = torch.ones(size, prompt + size, dtype=torch.bool, device=q.device)
            sees = sees.tril(prompt)  #""",
              """            before = prompt_key.shape[2]
            k = prompt_key = torch.cat([prompt_key, k], dim=2)
            v = prompt_value = torch.cat([prompt_value, v], dim=2)
            sees = torch.ones(size, before + size, dtype=torch.bool, device=q.device)
            sees = sees.tril(before)  #"""),
        Wrong("prompt_not_seen", "a sample does not see its prompt", "grpo.py",
              "sees = sees.tril(prompt)", "sees = sees.tril(prompt).triu(prompt)"),
        Wrong("only_the_past", "a token does not see itself", "grpo.py",
              "sees = sees.tril(prompt)", "sees = sees.tril(prompt - 1)"),
        Wrong("prompt_sees_its_future", "a prompt is not causal", "grpo.py",
              "is_causal=True", "is_causal=False"),
        Wrong("aligned_at_the_start", "the causal mask begins at the prompt's first token",
              "grpo.py", "sees = sees.tril(prompt)", "sees = sees.tril()"),
        Wrong("heads_in_another_order", "key heads are repeated as a whole, not each by itself",
              "grpo.py", "key = key.repeat_interleave(repeats, dim=1)",
              "key = key.repeat(1, repeats, 1, 1)"),
        Wrong("first_key_head", "all query heads read the first key head's values", "grpo.py",
              "value = value.repeat_interleave(repeats, dim=1)",
              "value = value[:, :1].expand(-1, query.shape[1], -1, -1)"),
        Wrong("scaling_ignored", "samples are scaled by 1/sqrt(d), whatever is asked", "grpo.py",
              "attn_mask=sees, scale=scaling", "attn_mask=sees"),
        Wrong("scaling_ignored_in_prompts", "the same of prompts", "grpo.py",
              "is_causal=True, scale=scaling", "is_causal=True"),
        Wrong("prompt_without_gradient", "samples do not teach the prompt they read", "grpo.py",
              "k = torch.cat([prompt_key, k]", "k = torch.cat([prompt_key.detach(), k]"),
        Wrong("shared_by_ids", "prompts with the same text are shared, whatever their images",
              "rollout.py", "length, is_shared = len(prompt.ids), prompt == before\n        if not",
              "length = len(prompt.ids)\n        is_shared = before and prompt.ids == before.ids\n"
              "        if not"),
        Wrong("joins_the_wrong_group", "a prompt seen before is shared, and the sample stands "
              "behind another prompt", "rollout.py",
              "length, is_shared = len(prompt.ids), prompt == before\n        if not",
              "seen = seen + [before] if b else []\n"
              "        length, is_shared = len(prompt.ids), prompt in seen\n        if not"),
        Wrong("first_group_predicts", "every first token is predicted in the first group",
              "rollout.py", "prompt_end = len(ids) - 1", "prompt_end = segments[0][0] - 1"),
        Wrong("predicts_itself", "a token is predicted from its own place", "rollout.py",
              "predictors.append([prompt_end, *range(start, len(ids) - 1)])",
              "predictors.append([*range(start, len(ids))])"),
        Wrong("positions_count_from_zero", "a sample's positions begin at 0", "rollout.py",
              "places.append(positions[:, b, length:len(rollout.ids)])",
              "places.append(positions[:, b, :len(sample_ids)])"),
        Wrong("positions_by_one", "an image in a sample takes positions one by one", "rollout.py",
              "places.append(positions[:, b, length:len(rollout.ids)])",
              "places.append((positions[:, b, length - 1:length].max() + 1\n"
              "                       + torch.arange(len(sample_ids))).expand(3, -1))"),
        Wrong("all_is_action", "what tools said is scored", "rollout.py",
              "masks.append(rollout.action_mask[length:])", "masks.append([1] * len(sample_ids))"),
        Wrong("logps_late", "sampled log-probs are one token late", "rollout.py",
              "logps.append(rollout.logps[length:])",
              "logps.append(rollout.logps[length - 1:-1])"),
        Wrong("last_token_dropped", "the last token of each sample is dropped", "rollout.py",
              "sample_ids, start = rollout.ids[length:],",
              "sample_ids, start = rollout.ids[length:-1],"),
        Wrong("images_of_a_prompt_again", "each sample brings its prompt's images", "rollout.py",
              "        images += rollout.images[len(prompt.images):]",
              "        images += rollout.images if is_shared else rollout.images[\n"
              "            len(prompt.images):]"),
        Wrong("images_in_reverse", "the images of samples stand before those of prompts",
              "rollout.py", "        images += rollout.images[len(prompt.images):]",
              "        images[:0] = rollout.images[len(prompt.images):]"),
        Wrong("images_of_samples_lost", "what tools made is not shown", "rollout.py",
              "images += rollout.images[len(prompt.images):]",
              "images += rollout.images[len(prompt.images):][:0]"),
        Wrong("advantages_reversed", "advantages are not in the order of the rollouts",
              "rollout.py", "torch.tensor(advantages, device",
              "torch.tensor(advantages[::-1], device"),
    ],
)
