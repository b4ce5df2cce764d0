"""A model's words taken over: by another data set, and with new ones by another run."""

import dataclasses
from pathlib import Path

import torch

import checkpoints
import contract
import embeddings
from groundwork.errors import UserError
from groundwork.files import read_json
from groundwork.wording import counted
from word_maps import check_same, check_word_map, is_extension
from word_rules import unsayable


def read_word_map(path):
    """Word -> index, of a WORDMAP file, .json, or of a checkpoint or its folder. Raises
    UserError."""
    if Path(path).suffix == ".json":
        word_map = read_json(path)
    else:
        try:
            word_map = checkpoints.load_checkpoint(path).get("word_map")
        except UserError as error:
            raise UserError(
                f"--word_map takes a WORDMAP_….json, a checkpoint or its folder: {error}"
            ) from error
        if word_map is None:
            raise UserError(f"{path} holds no word map: name its WORDMAP file")
    check_word_map(word_map, path)
    return word_map


def check_words(own, word_map, base, extend):
    """Raises UserError unless a checkpoint's word map is that of the data set `base`, or, where it
    is to be extended, all of it is in that one."""
    if extend and is_extension(word_map, own):
        return
    if extend:
        hint = ": create_input_files.py --word_map with this checkpoint and --extend_vocabulary"
        hint += " makes input files with its words and new ones"
    elif is_extension(word_map, own):
        hint = ": --extend_vocabulary adds the new words"
    else:
        hint = ": create_input_files.py --word_map with this checkpoint keeps to its words"
    message = f"the checkpoint is of another vocabulary than {base}'s word map{{}}{hint}"
    check_same(own, word_map, message)


@torch.no_grad()
def extend(decoder, own, word_map):
    """A decoder with the weights of another, and with words that it has not.

    All that the other has is as it was, bit for bit. Each value of a new word's rows, in the
    embedding and in the output layer, is drawn from a normal distribution with the mean and
    standard deviation that the known words' have, as `embeddings.complete` does.

    Args:
        decoder: the one that has fewer words.
        own: its words, word -> index, and `word_map` those that there are to be: see
            `word_maps.is_extension`.

    Raises:
        UserError: a tensor of the decoder has as many values as words in another way than rows.
    """
    config = dataclasses.replace(decoder.config, vocab_size=len(word_map))
    larger = contract.build_decoder(decoder.name, config)
    never = {own[word] for word in unsayable(own)}
    weights = decoder.state_dict()
    for name, tensor in larger.state_dict().items():
        weight, rows = weights[name], len(own)
        if tensor.shape != weight.shape:
            if (len(weight), len(tensor)) != (rows, len(word_map)):
                raise UserError(
                    f"the decoder {decoder.name!r} cannot be extended: {name} is {(*weight.shape,)}"
                )
            known = enumerate(weight.view(rows, -1).numpy())
            known = {index: row for index, row in known if index not in never}
            tensor.copy_(embeddings.complete(known, len(tensor)).view_as(tensor))
            tensor = tensor[:rows]
        tensor.copy_(weight)
    new = counted(len(word_map) - len(own), "new word")
    print(f"the vocabulary of {len(own)} words is extended by {new}")
    return larger.eval()
