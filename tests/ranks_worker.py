"""What N ranks do together, written down for test_ranks.py to compare.

    python -m torch.distributed.run --standalone --nproc_per_node=2 tests/ranks_worker.py MODEL REFERENCE OUT

Every part leaves OUT/<part>-<ranks>-<rank>.pt. The parts stand in the order of what they need to work.
With --memory=checkpointing or --memory=whole in place of REFERENCE only what test_cost.py compares: the bytes that are held.
"""
import sys
import time
import weakref
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from PIL import Image  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from model import (_empty_shards, action_logps, copy_policy, encode_image, encode_prompt, export, gathered,  # noqa: E402
                   load_policy, sample)
from rollout import Limits, Rollout, Tools, collate, replay, roll_out  # noqa: E402
from tools import CodeTool  # noqa: E402
from train import Config, even_micro_batches, reference_logps, update  # noqa: E402

LIMITS = Limits(max_turns=3, max_new_tokens=160, max_tokens=1024, max_images=3)
CODE = ("from PIL import Image; "
        "Image.open('path_to_input_image.jpg').resize((84, 56)).save('path_to_output_image.jpg', 'PNG')")
CHAIN = [f"<code>{CODE}</code>", f"<code>{CODE}</code>", "<answer> 7 </answer>"]
SMALL, LARGE = 1, 100_000  # --micro_batch_tokens: every row alone, and all of a rank together


def task(number, question, picture=None):
    return {"id": number, "family": "coding", "question": question, "answers": ["7"],
            "image": picture, "type": []}


def picture(number):
    return Image.effect_noise(
        (56, 56), 40 + 30 * number).convert("RGB").resize((56 + 28 * number, 56))


def whole_tensor(tensor):
    """A copy on this rank of a tensor that may be spread over all of them."""
    return getattr(tensor, "full_tensor", lambda: tensor)().detach().clone()


def weights(policy):
    return {name: whole_tensor(p) for name, p in policy.model.named_parameters()}


def here(policy):
    """Numbers of the parameters that lie on this rank."""
    return sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in policy.model.parameters())


def load(folder):
    policy = load_policy(folder, shard=True)
    tied = policy.model.lm_head.weight is policy.model.model.language_model.embed_tokens.weight
    buffers = dict(policy.model.named_buffers())
    return {"weights": weights(policy), "buffers": buffers, "here": here(policy), "tied": tied}


def play(policy, rank):
    """Rank 0 takes three turns with images, rank 1 one turn without.

    Every turn starts with 6 sampled tokens.
    """
    chain, picture_or_none = (CHAIN, Image.new("RGB", (84, 84),
                                               (90, 200, 30))) if rank == 0 else (CHAIN[-1:], None)
    recorded = replay(policy, lambda _: ["</think>" + turn for turn in chain])

    def sampler(live):
        sampled = sample(policy, live, 6, 1.0)
        thoughts = [(ids[:-1], logps[:-1]) if ids[-1] == policy.end_id else (ids, logps)
                    for ids, logps in sampled]
        return [
            (ids + action, logps + zeros)
            for (ids, logps), (action, zeros) in zip(thoughts, recorded(live))]

    torch.manual_seed(rank)
    with CodeTool(workers=1, timeout=20.0) as code:
        rollouts, _ = roll_out(policy, [task(0, "Why?", picture_or_none)], Tools(code=code), LIMITS,
                               group_size=3, sampler=sampler)
    return {"ids": [r.ids for r in rollouts], "logps": [r.logps for r in rollouts],
            "turns": [len(r.turns) for r in rollouts], "images": [len(r.images) for r in rollouts]}


def sample_and_score(folder, whole):
    policy = load_policy(folder, shard=True)
    with gathered(policy):
        played = play(policy, dist.get_rank())
        left = time.time()
    dist.barrier()
    spread = here(policy)
    recorded = replay(whole, lambda _: CHAIN[-1:])
    batch = collate(policy, roll_out(whole, [task(0, "Why?")], Tools(), LIMITS,
                                     sampler=recorded)[0], [0.0])
    with torch.no_grad():
        logps = [action_logps(p, batch, 1.0)[0] for p in (policy, whole)]
    return {"sharded": played, "whole": play(whole, dist.get_rank()), "left": left, "here": spread,
            "logps": logps}


def rows_of(policy):
    """This rank's of 8 rollouts with their advantages: the first 5 are text, the last 3 have an
    image.
    """
    torch.manual_seed(0)
    tasks = [
        task(i, "Why? " * (3 * i + 1))
        for i in range(5)] + [task(i, "Why?", picture(i - 5)) for i in range(5, 8)]
    chains = [["<problem> dark </problem>"] * (i % 3) + ["<answer>" + " 7" * (i + 1) + "</answer>"]
              for i in range(8)]
    rollouts, _ = roll_out(policy, tasks, Tools(), LIMITS,
                           sampler=replay(policy, lambda t: chains[t["id"]]))
    rows = list(zip(rollouts, [1.5, -1.0, 0.5, -0.25, 0.75, -2.0, 1.0, 0.25]))
    cut = {1: [slice(0, 8)], 2: [slice(0, 5), slice(5, 8)]}[dist.get_world_size()][dist.get_rank()]
    return rows[cut]


def step(folder, reference, rows, optimizer, micro_batch_tokens, loss="grpo"):
    """One update of a freshly loaded policy."""
    policy = load_policy(folder, shard=True)
    before = weights(policy)
    optimizer = optimizer(policy.model.parameters())
    config = Config(beta=0.04, loss=loss, max_grad_norm=1e6, micro_batch_tokens=micro_batch_tokens)
    batches, num_real = even_micro_batches(policy, [r for r, _ in rows], [a for _, a in rows],
                                           micro_batch_tokens)
    metrics = update(policy, optimizer, batches, num_real, reference_logps(reference, batches, 1.0),
                     config)
    images = ["pixel_values" in batch.inputs for batch in batches[:num_real]]
    after = weights(policy)
    return policy, {"metrics": metrics, "weights": after, "num": len(batches), "num_real": num_real,
                    "images": images, "moved": {name: after[name] - before[name] for name in after}}


class Asked(Exception):
    """What `fully_shard` was asked for."""


def options_on_gpus(config):
    """The options that model.py gives to fully_shard on a GPU; nothing is sharded or put there."""
    def ask(unit, **options):
        raise Asked(options)
    try:
        with patch("model.fully_shard", ask):
            _empty_shards(config, torch.device("cuda"), {})
    except Asked as asked:
        return asked.args[0]


def in_bfloat16(folder, frozen_head=False):
    """Sharded and computing in bf16, as on GPUs, beside a whole copy in fp32 and one in bf16.

    Log-probs and vision features of one batch, and by how much each gradient is off that in fp32.
    """
    whole, half = load_policy(folder), load_policy(folder)
    for p in half.model.parameters():  # not the buffers, which from_pretrained leaves in fp32 too
        p.data = p.data.bfloat16()
    options = options_on_gpus(whole.model.config)
    with patch("model.fully_shard", lambda unit, **_: fully_shard(unit, **options)):
        sharded = load_policy(folder, shard=True)
    torch.manual_seed(0)  # noise: among equal patches positions make no difference
    noise = torch.randint(256, (84, 112, 3), dtype=torch.uint8)
    shown = task(0, "Why?", Image.fromarray(noise.numpy()))
    recorded = replay(whole, lambda _: CHAIN[-1:])
    batch = collate(whole, roll_out(whole, [shown], Tools(), LIMITS, sampler=recorded)[0], [0.0])
    logps, features, gradients = [], [], []
    for policy in (sharded, whole, half):
        policy.model.model.visual.register_forward_hook(
            lambda module, args, output: features.append(output.pooler_output.detach()))
        policy.model.lm_head.weight.requires_grad_(not frozen_head)
        values, _ = action_logps(policy, batch, 1.0)
        values.sum().backward()
        logps.append(values.detach())
        named = policy.model.named_parameters()
        gradients.append({name: whole_tensor(p.grad) for name, p in named if p.grad is not None})
    ours, expected, _ = gradients
    assert ours.keys() == expected.keys()
    with patch("model.fully_shard", lambda unit, **_: fully_shard(unit, **options)), \
            patch("model.pass_dtype", lambda device: torch.bfloat16), torch.no_grad():
        copy = copy_policy(sharded)
        logps.append(action_logps(copy, batch, 1.0)[0])
    assert {p.dtype for p in copy.model.parameters()} == {torch.bfloat16}
    return {"logps": logps, "features": features, "dtypes": {g.dtype for g in ours.values()},
            "off": {name: ((ours[name] - expected[name]).norm() / expected[name].norm()).item()
                    for name in expected if expected[name].any()}}


class LiveBytes(TorchDispatchMode):
    """The bytes of all tensors that are alive, and their peak: `held` ones, and what operations return.

    The peak is kept once it is set to 0. Sizes are asked for after every operation, as FSDP2 frees and refills storages in
    place. device: "cpu", or "meta" for those of FakeTensorMode ("cpu" leaves out the fake ones with which DTensor computes
    shapes).
    """

    def __init__(self, held=(), device="cpu"):
        super().__init__()
        self.device, self.storages, self.peak = device, {}, None
        for tensor in held:
            self.hold(tensor)

    def hold(self, tensor):
        storage = tensor.untyped_storage()
        if storage.device.type == self.device:
            self.storages[storage._cdata] = weakref.ref(storage)

    def now(self):
        self.storages = {key: ref for key, ref in self.storages.items() if ref() is not None}
        return sum(ref().nbytes() for ref in self.storages.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again with the tensors of this rank
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.hold(tensor)
        if self.peak is not None:
            self.peak = max(self.peak, self.now())
        return result


def group_of_samples(policy, number, group_size, tokens):
    """A group with one image of 12 x 16 patches in its prompt."""
    picture = Image.effect_noise((224, 168), 60 + number).convert("RGB")
    image = encode_image(policy, picture)
    ids = encode_prompt(policy, "What is on the sign? " * 4, image)
    return [Rollout({}, ids + [300 + i] * tokens, [0] * len(ids) + [1] * tokens, [0.0] * (len(ids) + tokens), [image])
            for i in range(group_size)]


def memory(folder, checkpointing):
    """Bytes on this rank: of shards, of the gathered copy, and the peak of an update beyond weights and moments."""
    with LiveBytes() as live:
        policy = load_policy(folder, shard=True, gradient_checkpointing=checkpointing)
        parameters = list(policy.model.parameters())
        with gathered(policy):
            copy = sum(p.untyped_storage().nbytes() for p in policy.model.parameters())
        config, batches = Config(max_grad_norm=1e6), []
        for number in range(2):
            rows = group_of_samples(policy, number, 4, 40)
            batches.append(collate(policy, rows, [1.0, -1.0, 0.5, -0.5]))
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
        update(policy, optimizer, batches[:1], 1, [None], config)  # makes the moments
        before, live.peak = live.now(), 0
        with patch.object(optimizer, "zero_grad"):  # or the gradients would be gone
            update(policy, optimizer, batches, 2, [None, None], config)
        step = live.peak - before
    [(prompt, samples)] = batches[0].segments

    def local(tensors):
        return sum(tensor.to_local().nbytes for tensor in tensors)
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return {"weights": local(parameters), "gradients": local(p.grad for p in parameters), "moments": local(moments),
            "copy": copy, "update": step, "left": live.now() - before, "prompt": prompt, "sample": samples[0]}


def main(model, reference, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    label = f"{dist.get_world_size()}-{dist.get_rank()}"

    def keep(part, value):
        torch.save(value, Path(out) / f"{part}-{label}.pt")

    if reference.startswith("--memory"):
        keep("memory", memory(model, reference == "--memory=checkpointing"))
        dist.destroy_process_group()
        return
    keep("load", load(model))
    whole = load_policy(model)
    rows, teacher = rows_of(whole), load_policy(reference, shard=True)

    def sgd(parameters):  # what it moves is the gradient
        return torch.optim.SGD(parameters, lr=1.0)

    def adamw(parameters):
        return torch.optim.AdamW(parameters, lr=1e-4)

    for name, tokens in {"small": SMALL, "large": LARGE}.items():
        keep(f"gradient_{name}", step(model, teacher, rows, sgd, tokens)[1])
    for loss in ("dr_grpo", "dapo"):
        keep(f"gradient_{loss}", step(model, teacher, rows, sgd, LARGE, loss)[1])
    made = []

    def adamw_kept(parameters):
        made.append(adamw(parameters))
        return made[-1]
    last = dist.get_rank() == dist.get_world_size() - 1  # the others' numbers are sound
    bad = [(r, float("inf")) for r, _ in rows] if last else rows
    keep("not_finite", step(model, teacher, bad, adamw_kept, LARGE)[1]
         | {"state": len(made[0].state)})
    policy, result = step(model, teacher, rows, adamw, SMALL)
    keep("adamw", result)
    copy = copy_policy(policy)
    batches, _ = even_micro_batches(policy, [r for r, _ in rows], [a for _, a in rows], LARGE)
    with torch.no_grad():
        logps = [action_logps(p, batches[0], 1.0)[0] for p in (policy, copy)]
    for p in (policy, copy):
        p.model.reshard()
    keep("copy", {"weights": weights(copy), "here": here(copy), "logps": logps})
    export(policy, Path(out) / f"exported-{dist.get_world_size()}")
    dist.barrier()
    keep("bfloat16_tied", in_bfloat16(model))
    keep("bfloat16_untied", in_bfloat16(reference))
    keep("bfloat16_frozen_head", in_bfloat16(reference, frozen_head=True))
    if dist.get_world_size() == 2:
        keep("sample", sample_and_score(model, whole))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
