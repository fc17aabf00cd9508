import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chela import data
from chela.config import DataConfig
from chela.data.listops import as_text, root_operator
from chela.data.listops_trees import CLOSE, IDS, SYMBOLS, draw, evaluate, generate, trees_of

load_task: Any = data.load_task  # its splits have the fields of their own kind

TINY = DataConfig(task="listops", min_length=16, max_length=128, examples=2000)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7", 7),
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
        ("[MIN 5 3 ]", 3),
        ("[MED 1 9 4 ]", 4),
        ("[MED 1 4 ]", 2),  # 2.5 is cut
        ("[SM 9 9 9 ]", 7),
        ("[FIRST 3 1 2 ]", 3),
        ("[LAST 3 1 2 ]", 2),
        ("[SM [MED 8 9 ] [MAX 1 1 ] [FIRST 5 ] ]", 4),
    ],
)
def test_evaluator_knows_the_published_operators(expression, value):
    assert evaluate(expression.split()) == value


@pytest.mark.parametrize("expression", ["", "[MAX", "[MAX 1", "]", "[MAX ]", "1 2", "[MAX 1 ] ]", "[AVG 1 2 ]", "10"])
def test_evaluator_refuses_what_is_no_expression(expression):
    with pytest.raises(ValueError):
        evaluate(expression.split())


trees = st.recursive(
    st.integers(0, 9),
    lambda children: st.tuples(
        st.sampled_from(["[MIN", "[MAX", "[MED", "[SM"]), st.lists(children, min_size=2, max_size=5)
    ),
    max_leaves=30,
)


def independent(tree):
    if isinstance(tree, int):
        return tree
    operator, arguments = tree
    values = [independent(argument) for argument in arguments]
    return {"[MIN": min(values), "[MAX": max(values), "[MED": int(np.median(values)), "[SM": sum(values) % 10}[operator]


def written(tree):
    return str(tree) if isinstance(tree, int) else " ".join([tree[0], *map(written, tree[1]), "]"])


@given(tree=trees)
def test_evaluator_agrees_with_an_independent_one(tree):
    assert evaluate(written(tree).split()) == independent(tree)


def test_generated_values_are_the_evaluators():
    stream = trees_of(0, 0, 0, 2000)
    for tokens, value in (next(stream) for _ in range(300)):
        assert evaluate([SYMBOLS[token] for token in tokens]) == value


def depth(tokens):
    deepest = level = 0
    for token in tokens:
        level += (IDS["[MIN"] <= token <= IDS["[SM"]) - (token == CLOSE)
        deepest = max(deepest, level)
    return deepest


def test_draws_follow_the_published_rules():
    """The shares of leaves, arguments and acceptances, within five standard errors of the rules'."""
    uniform, n = random.Random(1).random, 6000
    drawn = [draw(uniform, 1999) for _ in range(n)]
    leaves = sum(tree is not None and len(tree[0]) == 1 for tree in drawn)
    assert abs(leaves / n - 0.75) < 5 * math.sqrt(0.75 * 0.25 / n)
    accepted = [tree for tree in drawn if tree is not None and len(tree[0]) > 500]
    assert abs(len(accepted) / n - 0.082) < 5 * math.sqrt(0.082 * 0.918 / n)
    assert all(depth(tokens) == 9 for tokens, _ in accepted)
    root_arguments = []
    for tokens, _ in (tree for tree in drawn if tree is not None and len(tree[0]) > 1):
        level = count = 0
        for token in tokens[1:-1]:
            level -= token == CLOSE
            count += level == 0 and token != CLOSE
            level += IDS["[MIN"] <= token <= IDS["[SM"]
        root_arguments.append(count)
    assert set(root_arguments) <= set(range(2, 11))


@pytest.mark.slow
def test_full_length_trees_have_the_known_statistics():
    """Measured on 20,000 trees by an independent program: mean 1035, median 953, labels 0 and 9 at 17 % each."""
    trees = generate(3000, seed=1, shorter=500, longer=2000, processes=1)
    lengths = np.array([len(tokens) for tokens, _ in trees])
    labels = np.array([value for _, value in trees])
    assert lengths.min() > 500
    assert lengths.max() < 2000
    assert abs(lengths.mean() - 1035) < 5 * lengths.std() / math.sqrt(len(trees))
    share = np.bincount(labels, minlength=10) / len(trees)
    for label in (0, 9):
        assert abs(share[label] - 0.17) < 5 * math.sqrt(0.17 * 0.83 / len(trees))
    roots = np.array([tokens[0] for tokens, _ in trees])
    table = np.zeros((len(SYMBOLS), 10))
    np.add.at(table, (roots, labels), 1)
    assert abs(table.max(1).sum() / len(trees) - 0.363) < 5 * math.sqrt(0.363 * 0.637 / len(trees)) + 0.005


def test_trees_are_distinct_and_do_not_depend_on_the_processes():
    arguments: dict[str, Any] = {"seed": 5, "shorter": 16, "longer": 64}
    alone = generate(1200, processes=1, **arguments)
    assert generate(1200, processes=2, **arguments) == alone
    assert len({tokens for tokens, _ in alone}) == 1200
    assert all(16 < len(tokens) < 64 for tokens, _ in alone)
    assert generate(1200, processes=1, **(arguments | {"seed": 6})) != alone


def test_too_few_trees_within_the_limits_are_refused():
    with pytest.raises(ValueError, match="fewer than 5000 distinct trees of 1 to 1 tokens"):
        generate(5000, seed=0, shorter=0, longer=2, processes=1)


def test_the_task_is_generated_once_and_cached(tmp_path):
    lines = []
    task = load_task(replace(TINY, root=tmp_path), progress=lines.append)
    assert lines
    assert [len(task.train), len(task.val), len(task.test)] == [1920, 40, 40]
    assert (task.vocab, task.classes, task.inputs) == (16, 10, "tokens")
    assert task.max_length <= 128
    for split in (task.train, task.val, task.test):
        for row in range(10):
            assert evaluate(as_text(split[row]).split()) == split.labels[row]
    lines.clear()
    again = load_task(replace(TINY, root=tmp_path), progress=lines.append)
    assert not lines
    assert np.array_equal(again.train.tokens, task.train.tokens)
    other = load_task(replace(TINY, root=tmp_path, seed=1))
    assert not np.array_equal(other.train[0], task.train[0])


def test_the_root_operator_baseline_is_counted_from_the_data(tmp_path):
    task = load_task(replace(TINY, root=tmp_path))
    best = {}
    for root in {int(task.train[i][0]) for i in range(len(task.train))}:
        labels = [int(task.train.labels[i]) for i in range(len(task.train)) if task.train[i][0] == root]
        best[root] = max(range(10), key=lambda label: labels.count(label))
    hits = sum(best[int(task.test[i][0])] == task.test.labels[i] for i in range(len(task.test)))
    assert root_operator(task.train, task.test) == hits / len(task.test)
    assert task.baselines["root operator only"] == hits / len(task.test)


def published(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "val", "test"):
        text = "Source\tTarget\n" + "".join(f"{source}\t{target}\n" for source, target in rows)
        (folder / f"basic_{name}.tsv").write_text(text)


def test_published_files_are_read_instead(tmp_path):
    rows = [("( ( ( [MAX 3 ) 5 ) ] )", 5), ("( ( ( [SM ( ( ( [MIN 9 ) 8 ) ] ) ) 7 ) ] )", 5), ("4", 4)]
    published(tmp_path / "listops", rows)
    task = load_task(DataConfig(task="listops", root=tmp_path))
    assert "published files in listops; 3 training trees, where the published data have 96,000" in task.note
    assert as_text(task.train[0]) == "[MAX 3 5 ]"
    assert as_text(task.test[1]) == "[SM [MIN 9 8 ] 7 ]"
    assert task.val.labels.tolist() == [5, 5, 4]
    assert task.max_length == 7


@pytest.mark.parametrize(
    ("row", "part"),
    [
        (("[MAX 3 5 ]", 3), r"basic_train\.tsv line 2: the target is '3', but the expression's value is 5"),
        (("[MAX 3 5", 5), "line 2: the expression is cut off"),
        (("[MAX 3 x ]", 3), "line 2: unknown symbol 'x'"),
    ],
)
def test_wrong_lines_are_named(row, part, tmp_path):
    published(tmp_path, [row])
    with pytest.raises(ValueError, match=part):
        load_task(DataConfig(task="listops", root=tmp_path))


def test_files_without_the_header_are_refused(tmp_path):
    published(tmp_path, [("1", 1)])
    (tmp_path / "basic_val.tsv").write_text("1\t1\n")
    with pytest.raises(ValueError, match="does not begin with the header"):
        load_task(DataConfig(task="listops", root=tmp_path))


def test_a_file_that_is_no_text_is_named(tmp_path):
    published(tmp_path, [("1", 1)])
    (tmp_path / "basic_val.tsv").write_bytes(b"Source\tTarget\n\xff\t1\n")
    with pytest.raises(ValueError, match=r"basic_val\.tsv is damaged"):
        load_task(DataConfig(task="listops", root=tmp_path))


def test_a_part_of_the_published_files_is_never_taken_for_none(tmp_path):
    published(tmp_path / "listops", [("1", 1)])
    (tmp_path / "listops" / "basic_val.tsv").unlink()
    with pytest.raises(ValueError, match=r"listops/basic_val\.tsv is missing: put all of basic_train\.tsv, "):
        load_task(DataConfig(task="listops", root=tmp_path))


@pytest.mark.parametrize(("changes", "part"), [({"examples": 9}, "examples is 9"), ({"min_length": 128}, "lengths")])
def test_limits_without_room_are_refused(changes, part, tmp_path):
    with pytest.raises(ValueError, match=part):
        load_task(replace(TINY, root=tmp_path, **changes))
