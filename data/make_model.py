"""Make the laptop-size Qwen2.5-VL in data/model: its tokenizer, its weights, its warm start.

    python data/make_model.py --seed 0 --out data/model        # about 15 minutes on 2 cores

The model is Qwen2.5-VL in every part: the same class, M-RoPE, window attention, special tokens and
chat template, with about a million weights and its own small BPE. Its warm start is plain
cross-entropy on the assistant's tokens, in three phases, because reinforcement learning can only
amplify what a policy already does now and then:

1. Captions of clean signs and flags, mixed with right demonstrations, until the right chains are
   learnt. Perception has to be there from the start. How a demonstration depends on its question is
   learnt suddenly and late: watch the share of tasks solved, not the loss.
2. A short phase in which a quarter are single turns of --mode step, where the turns before one are
   pasted into the question as text. A model that never saw those does not repair there.
3. A short phase on the demonstrations of a weak annotator (`noisy_chain` in make_tasks.py), which
   mistakes labels, countries and parameters and has hasty habits; an eighth are single turns. The
   result is an imperfect agent: it can do every single repair and search, right half of the time.

Demonstrations are played through the real tools by `rollout.replay`, so the model sees the very
tokens and images of a rollout. Their facts come from other corpora than the one shipped: the model
should learn to copy from a result, not the facts.
"""
import argparse
import io
import math
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (GenerationConfig, PreTrainedTokenizerFast, Qwen2_5_VLConfig,
                          Qwen2_5_VLForConditionalGeneration)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import make_hard_tasks
import make_tasks
from build_index import index_corpus, read_corpus
from model import encode_image, encode_prompt, export, load_policy, action_logps
from reward import exact_match
from rollout import (IMAGE_READY, TIP_NONE, TIP_REPAIR, Limits, Rollout, Tools, collate,
                     instructions, micro_batches, replay, roll_out)
from tools import CodeTool, SearchTool

# Qwen's special tokens, in the hub's order: ids 151643 and up there, here the last ids.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>",
           "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
           "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
           "<|video_pad|>"]
# How Qwen2 cuts text before merging: contractions, words with one leading sign, single digits, runs
# of signs, spaces.
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
         r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CHAT_TEMPLATE = """\
{% for message in messages %}\
{% if loop.first and message['role'] != 'system' %}\
<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}\
<|im_start|>{{ message['role'] }}\n\
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% else %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>\n\
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"""
CAPTIONS = {"sign": "Read the sign.", "flag": "Name the flag."}
# A quarter of all demonstrations are searches of data/make_hard_tasks.py. (hops, has an image): its
# share of that quarter. So two hops about an image are one in twenty of all.
HOP_SHARES = {(1, True): 0.6, (2, True): 0.2, (1, False): 0.1, (2, False): 0.1}
# Of the chains that repair one sign: the first repair misses, and is seen to miss. The last phase
# has none, or pairs would be solved from the start.
SECOND_LOOKS = {"right": 0.08, "noisy": 0.0}
LIMITS = Limits(max_turns=4, max_new_tokens=96, max_tokens=512, batch_tokens=16384)


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that cuts text like Qwen's, trained on what the offline tasks can say."""
    rng = random.Random(0)
    known, hard_known = make_tasks.facts(0), make_hard_tasks.facts(0)
    prompts = [instructions("full", family) for family in ("search", "coding")]
    texts = [CHAT_TEMPLATE, *prompts, TIP_NONE, TIP_REPAIR, IMAGE_READY, *CAPTIONS.values()]
    texts += ["You are a helpful assistant.", "system\n", "user\n", "assistant\n"] * 50
    for _ in range(500):
        task = make_tasks.coding_task(rng, rng.choice(make_tasks.KINDS))
        texts += [task["question"], *make_tasks.right_chain(task)]
        task = make_tasks.search_task(rng, known, *rng.choice(list(known)))
        texts += search_texts(rng, task, make_tasks)
        texts += search_texts(rng, hop_task(rng, hard_known), make_hard_tasks)
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL), min_frequency=2, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL, model_max_length=4096,
        clean_up_tokenization_spaces=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def search_texts(rng, task, maker):
    """What a search task of the module `maker` says, with three documents as found."""
    documents = rng.sample(maker.make_corpus(rng.random()), 3)
    results = " ".join(f"{i}. Content: {row['contents']}" for i, row in enumerate(documents, 1))
    return [task["question"], *maker.right_chain(task), f"<information> {results} </information>"]


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL at laptop size: 3 + 3 layers of width 128, with head and embedding tied as in the
    hub's 3B."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in
           ("image_pad", "video_pad", "vision_start", "vision_end", "im_end", "endoftext")}
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
        text_config=dict(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256,
                         num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=4096, rms_norm_eps=1e-6,
                         rope_parameters={"rope_type": "default", "rope_theta": 10000.0,
                                          "mrope_section": [4, 6, 6]},
                         bos_token_id=ids["endoftext"], eos_token_id=ids["im_end"],
                         pad_token_id=ids["endoftext"], tie_word_embeddings=True),
        vision_config=dict(depth=3, hidden_size=96, intermediate_size=192, num_heads=4,
                           out_hidden_size=128, window_size=112, fullatt_block_indexes=[2]))
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=ids["endoftext"], pad_token_id=ids["endoftext"],
        eos_token_id=[ids["im_end"], ids["endoftext"]])
    return model


def caption(policy, rng):
    """A sign or a flag as it may look after a repair, and its name as the assistant's turn.

    Returns a `Rollout` without turns or tools.
    """
    if rng.random() < 0.25:
        name = rng.choice(list(make_tasks.FLAGS))
        question, picture = CAPTIONS["flag"], make_tasks.make_flag(rng, name)
    else:
        task = make_tasks.coding_task(rng, rng.choice(make_tasks.KINDS))
        question, name, picture = CAPTIONS["sign"], task["answers"][0], task["clean"]
        if task["type"][0] in ("dark", "overexposure"):  # as the right code leaves it: coarser
            fix = (lambda p: p * 8) if task["type"] == ["dark"] else (lambda p: 255 - (255 - p) * 8)
            picture = task["image"].point(fix)
        if rng.random() < 0.7:
            picture = jpeg(picture)
    image = encode_image(policy, picture)
    prompt = encode_prompt(policy, question, image)
    answer = policy.tokenizer(f" {name}")["input_ids"] + [policy.end_id]
    mask = [0] * len(prompt) + [1] * len(answer)
    return Rollout({}, prompt + answer, mask, [0.0] * len(mask), [image], [picture])


def jpeg(picture):
    """The picture as a file named .jpg holds it."""
    data = io.BytesIO()
    picture.save(data, "JPEG")
    return Image.open(io.BytesIO(data.getvalue())).convert("RGB")


def hop_task(rng, known, task_id=""):
    """A search task of data/make_hard_tasks.py, of a kind drawn with its share of HOP_SHARES."""
    kinds, shares = zip(*HOP_SHARES.items())
    (hops, has_image), = rng.choices(kinds, shares)
    owner, attribute = rng.choice(make_tasks.search_pairs("train"))
    askers = {known[country, "ally"]: country for country in make_tasks.FLAGS}
    return make_hard_tasks.search_task(rng, known, askers[owner] if hops == 2 else owner, attribute,
                                       hops=hops, has_image=has_image, task_id=task_id)


def demonstrations(policy, rng, code_tool, num, noise, pasted=0):
    """num demonstrations, half of each family, played through the real tools.

    noise: scale of the weak annotator's rates of mistakes; 0: all are right. pasted: single turns
    of --mode step beside them.
    """
    def chain(task):
        can_miss = task["family"] == "coding" and task["type"][0] in make_hard_tasks.MISSES
        if can_miss and rng.random() < SECOND_LOOKS["noisy" if noise else "right"]:
            return make_hard_tasks.second_look(task, rng)
        if "facts" in task:
            return make_hard_tasks.search_chain(task, rng, noise)
        return make_tasks.noisy_chain(task, rng, noise)

    coding = [make_tasks.coding_task(rng, make_tasks.KINDS[i % 6], task_id=i)
              for i in range(num // 2)]
    sampler = chains(policy, coding, chain)
    tools = Tools(code=code_tool, newest=True)
    played, _ = roll_out(policy, coding, tools, LIMITS, sampler=sampler)
    pairs = make_tasks.search_pairs("train")
    for seed in range(1, 9):  # corpora that the offline tasks never see
        name = f"demonstrations-{seed}"
        known, hard_known = make_tasks.facts(name), make_hard_tasks.facts(name)
        tasks = [make_tasks.search_task(rng, known, *rng.choice(pairs), task_id=i)
                 for i in range(num // 32)]
        played += play_search(policy, tasks, make_tasks.make_corpus(name), chain)
        tasks = [hop_task(rng, hard_known, task_id=i) for i in range(num // 32)]
        played += play_search(policy, tasks, make_hard_tasks.make_corpus(name), chain)
    played += roll_out(policy, step_tasks(rng, chain, pasted), Tools(),
                       replace(LIMITS, max_turns=1),
                       sampler=replay(policy, lambda task: [task["solution"]]))[0]
    rng.shuffle(played)
    return played


def step_tasks(rng, chain, num):
    """num single turns as tasks of --mode step, half of each family: the turns before one stand in
    its question. It is the annotator's; where the annotator strayed before, the right one."""
    tasks = [make_tasks.coding_task(rng, make_tasks.KINDS[i % 6]) for i in range(num // 2)]
    pairs = make_tasks.search_pairs("train")
    for i in range(num // 4):
        known, hard_known = make_tasks.facts(f"steps-{i}"), make_hard_tasks.facts(f"steps-{i}")
        tasks.append(make_tasks.search_task(rng, known, *rng.choice(pairs)))
        tasks.append(hop_task(rng, hard_known))
    steps = []
    for task, turns in [(task, chain(task)) for task in tasks]:
        rows = (make_hard_tasks if "facts" in task else make_tasks).step_rows(task)
        n = rng.randrange(len(rows))
        is_same = turns[:n] == [row["solution"] for row in rows[:n]] and n < len(turns)
        is_repaired = rows[n]["type"] == "pre_answer" and task["family"] == "coding"
        steps.append(task | {"question": rows[n]["problem"],
                             "solution": turns[n] if is_same else rows[n]["solution"],
                             "image": task["clean"] if is_repaired else task["image"]})
    return steps


def play_search(policy, tasks, corpus, chain):
    """The tasks' chains, played with a search tool over the corpus."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.jsonl"
        make_tasks.write_rows(path, corpus)
        index_corpus(path.with_suffix(".sqlite"), read_corpus(path))
        search = SearchTool(backend=f"sqlite:{path.with_suffix('.sqlite')}", topk=3)
        sampler = chains(policy, tasks, chain)
        return roll_out(policy, tasks, Tools(search=search), LIMITS, sampler=sampler)[0]


def chains(policy, tasks, chain):
    """A sampler that plays one chain a task, drawn here once."""
    drawn = {task["id"]: chain(task) for task in tasks}
    return replay(policy, lambda task: drawn[task["id"]])


def cross_entropy_step(policy, optimizer, rows, caption_weight):
    """One step of Adam on the sum over action tokens, where captions weigh more.

    Returns the mean negative log-probability of both kinds of tokens, in nats.
    """
    sums, counts = {"caption": 0.0, "demonstration": 0.0}, {"caption": 0, "demonstration": 0}
    for name, weight in (("caption", caption_weight), ("demonstration", 1.0)):
        part = [r for r in rows if bool(r.turns) == (name == "demonstration")]
        for batch in micro_batches(policy, part, [0.0] * len(part), 8192):
            logps, _ = action_logps(policy, batch, 1.0)
            (-weight * logps.sum() / len(rows)).backward()
            sums[name] -= logps.sum().item()
            counts[name] += int(batch.action_mask.sum())
    torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return {name: sums[name] / max(counts[name], 1) for name in sums}


@torch.no_grad()
def print_unsure_tokens(policy, rollouts):
    """Print the tokens of demonstrations that the model is unsure of, with their probability in
    percent: the decisions that are not yet learnt."""
    for r in rollouts:
        batch = collate(policy, [r], [0.0])
        logps = action_logps(policy, batch, 1.0)[0][0].tolist()
        tokens = zip(batch.targets[0].tolist(), logps, batch.action_mask[0])
        unsure = [(token, logp) for token, logp, is_action in tokens if is_action and logp < -0.2]
        print("  ", " ".join(f"{policy.tokenizer.decode([token])!r}:{100 * math.exp(logp):.0f}"
                             for token, logp in unsure), flush=True)


def success(policy, code_tool, num):
    """Share of fresh tasks solved in one sample each, {kind: share}, with the shipped corpora."""
    rng, known, hard_known = random.Random(99), make_tasks.facts(0), make_hard_tasks.facts(0)
    offline, solved = Path(__file__).parent / "offline", {}
    search = SearchTool(backend=f"sqlite:{offline}/corpus.sqlite", topk=3)
    tasks = [make_tasks.coding_task(rng, make_tasks.KINDS[i % 6], split="train")
             for i in range(num)]
    tasks += [make_tasks.search_task(rng, known, *rng.choice(make_tasks.search_pairs("train")))
              for _ in range(num // 2)]
    hard = [make_hard_tasks.pair_task(rng, pair)
            for pair in make_hard_tasks.PAIRS["train"] for _ in range(num // 2)]
    hard += [hop_task(rng, hard_known) for _ in range(2 * num)]
    hard_search = SearchTool(backend=f"sqlite:{offline}/hard/corpus.sqlite", topk=3)
    for part, tool in ((tasks, search), (hard, hard_search)):
        for r in roll_out(policy, part, Tools(code_tool, tool, newest=True), LIMITS)[0]:
            name = "+".join(r.task.get("type", ["search"]))
            solved.setdefault(name, []).append(exact_match(r.answer, r.task["answers"]))
    return {name: round(sum(hits) / len(hits), 2) for name, hits in sorted(solved.items())}


def train(policy, code_tool, pool, rng, args, *, steps, lr, name):
    """Adam over `steps` batches of the pool's demonstrations and fresh captions, with warm-up and
    linear decay."""
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=lr, weight_decay=0.01,
                                  betas=(0.9, 0.95))
    policy.model.train()
    start = time.perf_counter()
    for step in range(steps):
        rows = [pool[(step * args.batch + i) % len(pool)] for i in range(args.batch)]
        rows += [caption(policy, rng) for _ in range(args.captions)]
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50) * max(0.05, 1 - step / steps)
        losses = cross_entropy_step(policy, optimizer, rows, args.caption_weight)
        if step % 20 == 0:
            shown = "  ".join(f"{key} {loss:.4f}" for key, loss in losses.items())
            seconds = time.perf_counter() - start
            print(f"{name} {step}/{steps}  {shown}  {seconds:.0f} s", flush=True)
        if (step + 1) % args.check == 0 or step + 1 == steps:
            policy.model.eval()
            print("  solved:", success(policy, code_tool, 48), flush=True)
            print_unsure_tokens(policy, rows[:2])
            policy.model.train()
    policy.model.eval()


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="data/model")
    parser.add_argument("--right", help="folder of a model after phase 1: do the others only")
    parser.add_argument("--keep_right", help="folder to keep the model after phase 1 in")
    parser.add_argument("--demonstrations", type=int, default=4000, help="right ones")
    parser.add_argument("--batch", type=int, default=16, help="demonstrations a step")
    parser.add_argument("--captions", type=int, default=24, help="captions a step")
    parser.add_argument("--caption_weight", type=float, default=3.0,
                        help="of a caption's token in the loss")
    parser.add_argument("--noise", type=float, default=1.0,
                        help="scale of the weak annotator's rates of mistakes")
    parser.add_argument("--right_steps", type=int, default=1500)
    parser.add_argument("--pasted_steps", type=int, default=120)
    parser.add_argument("--pasted_lr", type=float, default=3e-4)
    parser.add_argument("--noisy_steps", type=int, default=140)
    parser.add_argument("--right_lr", type=float, default=1.5e-3)
    parser.add_argument("--noisy_lr", type=float, default=2e-4)
    parser.add_argument("--check", type=int, default=300,
                        help="steps between checks of the share of tasks solved")
    args = parser.parse_args()
    for folder in filter(None, (args.out, args.keep_right)):  # fails now, not behind the training
        Path(folder).mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # sums in another order would give other weights
    with CodeTool(workers=2, timeout=5.0) as code_tool:
        if args.right is not None:
            policy = load_policy(args.right)
        else:
            tokenizer = make_tokenizer(vocab_size=1024)
            with tempfile.TemporaryDirectory() as new:  # --out keeps its model until the end
                for part in (make_model(tokenizer, args.seed), tokenizer,
                             Qwen2VLImageProcessorPil()):
                    part.save_pretrained(new)
                policy, rng = load_policy(new), random.Random(f"right-{args.seed}")
            pool = demonstrations(policy, rng, code_tool, args.demonstrations,
                                  noise=0.0)
            train(policy, code_tool, pool, rng, args, steps=args.right_steps, lr=args.right_lr,
                  name="right")
            if args.keep_right:
                export(policy, args.keep_right)
        rng = random.Random(f"pasted-{args.seed}")
        torch.manual_seed(args.seed)
        num = args.pasted_steps * args.batch
        pool = demonstrations(policy, rng, code_tool, num * 3 // 4, noise=0.0, pasted=num // 4)
        train(policy, code_tool, pool, rng, args, steps=args.pasted_steps, lr=args.pasted_lr,
              name="pasted")
        # "noisy-0" has fewer second hops: one run in three of reinforcement then never found them.
        rng = random.Random(f"noisy-{args.seed + 1}")
        torch.manual_seed(args.seed)
        num = args.noisy_steps * args.batch
        pool = demonstrations(policy, rng, code_tool, num * 7 // 8, args.noise, pasted=num // 8)
        train(policy, code_tool, pool, rng, args, steps=args.noisy_steps, lr=args.noisy_lr,
              name="noisy")
        export(policy, args.out)


if __name__ == "__main__":
    main()
