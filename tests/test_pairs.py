"""Retrieval (the published AAN files) and citation pairs of one's own."""

import numpy as np
import pytest

from chela.config import DataConfig
from chela.data import PairSplit
from chela.data.ragged import Sequences
from data_kit import PAIRS, PAPERS, load_task, shared, write_citations, write_retrieval  # pyrefly: ignore

WRITERS = {"retrieval": write_retrieval, "citations": write_citations}


def test_each_side_of_a_pair_is_padded_to_its_own_longest():
    documents = Sequences(np.arange(1, 7, dtype=np.uint8), np.array([1, 3, 6]), limit=2)  # [1], [2, 3], [4, 5]
    split = PairSplit(documents, np.array([0, 1]), np.array([0, 2]), np.array([1, 0]))
    batch = split.batch(np.array([1, 0]))
    assert batch.inputs.tolist() == [[2, 3], [1, 0]]
    assert batch.second is not None
    assert batch.second.tolist() == [[4, 5], [1, 0]]
    assert batch.mask is not None
    assert batch.mask.tolist() == [[True, True], [True, False]]
    assert batch.labels.tolist() == [0, 1]
    assert split.lengths().tolist() == [1, 2]
    alone = split.batch(np.array([1]))
    assert alone.mask is None
    assert alone.second_mask is None


@pytest.mark.parametrize("name", WRITERS)
def test_pairs_are_read_as_bytes(name, tmp_path):
    WRITERS[name](tmp_path)
    task = load_task(DataConfig(task=name, root=tmp_path))
    assert (task.kind, task.vocab, task.classes, task.max_length) == ("two-tower", 257, 2, 4000)
    for split in (task.train, task.val, task.test):
        assert len(split) == len(PAIRS)
        for row, (label, a, b) in enumerate(PAIRS):
            batch = split.batch(np.array([row]))
            assert int(batch.labels[0]) == label
            assert bytes((batch.inputs[0] - 1).to(dtype=batch.inputs.dtype).tolist()) == PAPERS[a].encode()[:4000]
            assert bytes((batch.second[0] - 1).tolist()) == PAPERS[b].encode()[:4000]
    assert len(task.train.documents.ends) == len(PAPERS), "a paper is kept once"
    assert int(np.diff(task.train.documents.ends, prepend=0).max()) == 10_000
    assert ("AAN" in task.note) == (name == "retrieval") or "not AAN" in task.note
    assert load_task(DataConfig(task=name, root=tmp_path, max_length=7)).train.lengths().tolist() == [7, 7, 7, 5]


def test_a_set_of_another_size_is_not_called_the_published_one(tmp_path):
    write_retrieval(tmp_path)
    note = load_task(DataConfig(task="retrieval", root=tmp_path)).note
    assert "4 training pairs, where the published data have 147,086" in note


@pytest.mark.parametrize("name", WRITERS)
def test_pairs_are_read_as_characters(name, tmp_path):
    WRITERS[name](tmp_path)
    task = load_task(DataConfig(task=name, root=tmp_path, encoding="characters"))
    known = sorted(set("".join(PAPERS.values())))
    assert task.vocab == 3 + len(known)
    batch = task.train.batch(np.array([0]))
    assert batch.inputs[0].tolist() == [3 + known.index(c) for c in PAPERS["A"]] + [2]
    assert task.decode(batch.second[0].numpy()) == PAPERS["B"]
    longest = task.train.batch(np.array([2])).inputs[0]
    assert len(longest) == 4000
    assert longest[-1] == 2


def test_more_than_is_kept_of_a_paper_is_refused(tmp_path):
    write_retrieval(tmp_path)
    with pytest.raises(ValueError, match="only 10,000 bytes of a paper are kept"):
        load_task(DataConfig(task="retrieval", root=tmp_path, max_length=10_001))


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("1.0\tA\tB\tonly one text\n", r"new_aan_pairs\.eval\.tsv line 5 has 4 fields instead of label, id1, id2"),
        ("2\tA\tB\tone\tother\n", r"new_aan_pairs\.eval\.tsv line 5: the label is '2', wanted 0 or 1"),
    ],
)
def test_wrong_pairs_are_named(line, part, tmp_path):
    path = write_retrieval(tmp_path) / "new_aan_pairs.eval.tsv"
    path.write_text(path.read_text() + line)
    with pytest.raises(ValueError, match=part):
        load_task(DataConfig(task="retrieval", root=tmp_path))
    assert not list((tmp_path / "prepared").iterdir())


def test_an_empty_file_of_pairs_is_refused(tmp_path):
    (write_retrieval(tmp_path) / "new_aan_pairs.test.tsv").write_text("")
    with pytest.raises(ValueError, match="no pairs for the test split"):
        load_task(DataConfig(task="retrieval", root=tmp_path))


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("train\t1\tA\tB", "train\t1\tA\tE", r"pairs\.tsv line 2: no paper has the id 'E'"),
        ("train\t1\tA\tB", "dev\t1\tA\tB", r"pairs\.tsv line 2 is not split, label, citing and cited"),
        ("train\t1\tA\tB", "train\tyes\tA\tB", r"pairs\.tsv line 2: the label is 'yes'"),
        ("split\tlabel", "part\tlabel", r"pairs\.tsv line 1 is not split"),
    ],
)
def test_wrong_citations_are_named(old, new, part, tmp_path):
    path = write_citations(tmp_path) / "pairs.tsv"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=part):
        load_task(DataConfig(task="citations", root=tmp_path))


def test_a_cut_off_archive_of_papers_is_named(tmp_path):
    path = write_citations(tmp_path) / "docs.jsonl.xz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"docs\.jsonl\.xz is damaged"):
        load_task(DataConfig(task="citations", root=tmp_path))


def test_the_real_citations(tmp_path):
    (tmp_path / "citations").symlink_to(shared("acl_citation_pairs"))
    task = load_task(DataConfig(task="citations", root=tmp_path))
    assert [len(task.train), len(task.val), len(task.test)] == [3672, 460, 404]
    assert [int(split.labels.sum()) for split in (task.train, task.val, task.test)] == [1836, 230, 202]
    assert len(task.train.documents.ends) == 1386
    assert task.baselines["majority class"] == 0.5
    assert "not AAN" in task.note
    as_characters = load_task(DataConfig(task="citations", root=tmp_path, encoding="characters"))
    assert as_characters.vocab == 466
