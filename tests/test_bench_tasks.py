"""The synthetic tasks: rows that can be solved, in one way only, by looking where the task says."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.cli import main
from bench.learn.copying import SEPARATOR, CopyTask
from bench.learn.mqar import MQARTask
from bench.learn.passkey import FIRST_FILLER, KEY, QUESTION, PasskeyTask
from bench.learn.presets import SYNTHETIC, TINY
from bench.learn.task import IGNORED
from bench.learn.train import Twin

TASKS = (MQARTask(pairs=4, vocabulary=64), CopyTask(), PasskeyTask())
tasks = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


@tasks
def test_rows_follow_from_seed_and_step_alone(task):
    first, again = (task.training(3, 2, 40) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:2], again[:2], strict=True))
    assert not torch.equal(first.inputs, task.training(4, 2, 40).inputs)
    assert not torch.equal(first.inputs, type(task)(**vars(task) | {"seed": 1}).training(3, 2, 40).inputs)
    held_out = torch.cat([batch.inputs for batch in task.validation(5, 2, 40)])
    assert held_out.shape == (5, 40) and task.prompt(40).shape == (1, 40)
    assert held_out.max() < task.vocabulary and first.inputs.max() < task.vocabulary


@given(st.integers(1, 9), st.integers(0, 30), st.integers(0, 1000))
def test_mqar_asks_each_pair_once(pairs, spare, step):
    task = MQARTask(pairs=pairs, vocabulary=48)
    batch = task.training(step, 3, 4 * pairs + 2 + spare)
    for row, labels in zip(batch.inputs.tolist(), batch.labels.tolist(), strict=True):
        told = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(told) == pairs and all(1 <= key < 24 <= value < 48 for key, value in told.items())
        asked = {i: label for i, label in enumerate(labels) if label != IGNORED}
        assert sorted(row[i] for i in asked) == sorted(told) and min(asked) >= 2 * pairs + 2
        assert all(label == told[row[i]] for i, label in asked.items())
        assert all(token == 0 for i, token in enumerate(row) if i >= 2 * pairs and i not in asked)


def test_mqar_asks_near_the_pairs_more_often():
    batch = MQARTask(pairs=1).training(0, 4000, 404)
    gap = ((batch.labels != IGNORED).int().argmax(1) - 4) // 2
    weights = torch.arange(1, 201, dtype=torch.float64) ** (0.01 - 1)
    expected = weights[0] / weights.sum()
    assert (gap == 0).double().mean().item() == pytest.approx(expected.item(), rel=0.1)
    assert gap.max() > 150


@given(st.integers(3, 60), st.integers(0, 1000))
def test_a_copy_repeats_the_row(tokens, step):
    batch = CopyTask().training(step, 2, tokens)
    length = tokens // 2
    assert (batch.inputs[:, length] == SEPARATOR).all() and (batch.inputs[:, :length] > SEPARATOR).all()
    assert (batch.labels[:, :length] == IGNORED).all()
    asked = batch.labels[:, length:]
    assert torch.equal(asked[:, :length], batch.inputs[:, : asked.shape[1]][:, :length])


@given(st.floats(0, 1), st.integers(11, 80))
def test_the_passkey_lies_at_its_depth(depth, tokens):
    task = PasskeyTask()
    batch = task.at_depths(torch.full((2,), depth, dtype=torch.float64), tokens, torch.Generator())
    place = round(depth * (tokens - 11))
    assert (batch.inputs[:, place] == KEY).all() and (batch.inputs[:, -5] == QUESTION).all()
    assert torch.equal(batch.labels[:, -5:], batch.inputs[:, place + 1 : place + 6])
    assert (batch.labels[:, :-5] == IGNORED).all()
    assert (batch.inputs >= FIRST_FILLER).sum() == 2 * (tokens - 11)


def test_rows_too_short_are_refused():
    with pytest.raises(ValueError, match="at least 18 tokens for 4 pairs"):
        MQARTask(pairs=4).training(0, 1, 17)
    with pytest.raises(ValueError, match="pairs: expected 1 to 3"):
        MQARTask(pairs=4, vocabulary=8)
    with pytest.raises(ValueError, match="at least 11 tokens"):
        PasskeyTask().training(0, 1, 10)
    with pytest.raises(ValueError, match="at least 3 tokens"):
        CopyTask().training(0, 1, 2)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_the_command_trains_on_a_synthetic_task(name, tmp_path, capsys):
    options = ["--task", name, "--preset", "tiny", "--tokens", "768", "--attention", "nsa", "moba", "nsa-no-selected"]
    main(["learn", *options, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["task"] == name and [row["attention"] for row in result["rows"]] == options[7:]
    for row in result["rows"]:
        assert 0 <= row["accuracy"][-1][1] <= 1 and row["continuation"] is None
        assert None in row["position_bits"] and max(x for x in row["position_bits"] if x is not None) > 0
    printed = capsys.readouterr().out
    assert "accuracy" in printed and f"bits/{result['unit']}" in printed and "continues" not in printed
    assert f"{result['random_hits']:.3f} where free slots are filled at random" in printed
    assert (tmp_path / "selection.png").exists() and not (tmp_path / "attention.png").exists()


def test_accuracy_is_the_share_of_labels_found():
    task = CopyTask(vocabulary=8)
    twin = Twin("full", replace(TINY, context=12), task.vocabulary, torch.device("cpu"))

    def knows_the_first_answer_only(inputs, places):
        answers = torch.full_like(places, SEPARATOR)
        answers[places == 6] = inputs[:, 0]
        return torch.nn.functional.one_hot(answers, task.vocabulary).float()

    twin.network = knows_the_first_answer_only
    twin.evaluate(task.validation(5, 2, 12))
    assert twin.progress.accuracy == [(0, pytest.approx(1 / 6))]


def test_options_of_another_task_are_refused(tmp_path, capsys):
    for options in (["--task", "copy", "--pairs", "2"], ["--task", "mqar", "--packed"]):
        with pytest.raises(SystemExit):
            main(["learn", *options, "--preset", "tiny", "--out", str(tmp_path)])
        assert f"{options[2]} is an option of --task" in capsys.readouterr().err
