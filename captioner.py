"""From pictures to captions in Python: the one way in, which the scripts use themselves.

from captioner import Captioner
model = Captioner.load("BEST_checkpoint_….pth.tar")
for caption in model.caption(["x.jpg", image, array], beam_size=5):
    print(caption.text, caption.log_prob)
"""

from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from operator import itemgetter
from os import PathLike

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from groundwork.isolation import own_modules

with own_modules():  # a user's process may have other modules of these names
    import checkpoints
    import choosing
    from attention_pictures import draw_attention
    from contract import Decoder
    from encoders import Encoder
    from ensemble import Encoders, Ensemble
    from groundwork import images as image_files
    from groundwork.devices import autocast, choose_device, has_fast_bfloat16
    from groundwork.errors import UserError
    from groundwork.files import read_json
    from groundwork.wording import counted
    from word_maps import check_same, check_word_map
    from word_rules import rule_of

BEAM = choosing.Search()  # as everyone searches who says nothing else


@dataclass(frozen=True)
class Caption:
    """A caption, and where the model looked."""

    words: list[str]
    log_prob: float  # Σ log p of the words and of <end>, natural logarithm
    alphas: Tensor | None  # (len(words), L) float32 on the CPU; None of a decoder without attention
    consensus: float | None = None  # mean CIDEr-D, 0 to 10, to the others of `rerank`
    fit: str = "squeeze"  # how the image was made the square in which the model looked
    text: str | None = None  # the words joined, as their rule has it; None: with blanks between

    def __post_init__(self):
        if self.text is None:
            object.__setattr__(self, "text", " ".join(self.words))

    def draw(self, image, numbers=False):
        """The picture of where the model looked for each word.

        Args:
            image: what was captioned, as `Captioner.caption` takes it.
            numbers: whether each word has, in per cent, the share of the image that its attention
                is spread over, and the share of the attention that its strongest place has.

        Returns:
            RGB PIL.Image, 1320 pixels wide or less.
        """
        picture = image_files.framed(to_picture(image), self.fit)
        return draw_attention(picture, self.words, self.alphas, numbers, self.text)


@dataclass
class Captioner:
    """A trained model, or several that caption together, ready to caption."""

    encoder: Encoder | Encoders
    decoder: Decoder
    word_map: dict[str, int]  # in the order of the indices
    image_size: int  # side of the squares that the encoder is given, the largest of several, pixels
    device: torch.device
    amp: bool  # compute in bfloat16
    about: dict  # the checkpoint without its weights: options, stage, epoch, scores, log, …
    look: str | None = None  # of `decoder.looks`; None: as it usually looks
    others: Sequence[dict] = ()  # what the further checkpoints of an ensemble are `about`
    fit: str = "squeeze"  # of `FITS`, how images are made the squares

    @classmethod
    def load(cls, path, device=None, amp="auto", word_map=None, look=None):
        """The model of a checkpoint file, or the ensemble of several.

        An ensemble says each word by the mean of its models' probabilities; what concerns the data
        that it was trained on is told by the first.

        Args:
            path: written by train.py, or of the older published form; of a folder, for the BEST
                checkpoint in it; or a list of them, for an ensemble.
            device: "cuda", "cuda:1", "cpu"; None: CUDA when present, else the CPU.
            amp: "auto" computes in bfloat16 where the device is faster in it, "off" in float32.
            word_map: path of a WORDMAP file, for a checkpoint that holds no word map; of one that
                does it must be the same.
            look: how a model of hard attention looks: "soft", at the expected context, as it does
                without; "argmax", at the likeliest place; "sample", at one drawn at random. Of an
                ensemble those of hard attention look so.

        Raises:
            UserError: a file is missing or damaged, the word map is of another vocabulary, as are
                models of one ensemble, or none can look so.
        """
        paths = path if isinstance(path, list | tuple) else [path]
        if not paths:
            raise UserError("no checkpoint is named: give one path or several")
        for named in paths:
            if not isinstance(named, str | PathLike):
                raise UserError(f"a checkpoint is named by its path, not by {named!r}")
        if amp not in ("auto", "off"):
            raise UserError(f"amp {amp!r} is not auto or off")
        device = choose_device(device)
        encoders, decoders, words, sizes, abouts = zip(
            *(_read(named, word_map) for named in paths), strict=True
        )
        _check_same(paths, words, [about["fit"] for about in abouts])
        encoder, decoder = encoders[0], decoders[0]
        if len(paths) > 1:
            encoder, decoder = Encoders(encoders, sizes), Ensemble(decoders)
        if look is not None:
            _check_look(" + ".join(map(str, paths)), look, decoder.looks)
            decoder.set_look(look)
        amp = amp == "auto" and has_fast_bfloat16(device)
        encoder.to(device, memory_format=torch.channels_last)
        encoder.freeze(torch.bfloat16 if amp else torch.float32)
        about, *others = abouts
        decoder = decoder.to(device).eval()
        size, fit = max(sizes), about["fit"]
        return cls(encoder, decoder, words[0], size, device, amp, about, look, others, fit)

    @cached_property
    def rule(self):
        """The `word_rules.Rule` of its words."""
        return rule_of(self.word_map)

    @property
    def abouts(self):
        """What the checkpoint, or each of several, is `about`."""
        return [self.about, *self.others]

    def side_for(self, side):
        """The side at which to give the encoder images that are kept as squares of `side`: its own,
        but as they are where it is several, which bring them to different sizes themselves."""
        several = isinstance(self.encoder, Encoders) and len(set(self.encoder.sizes)) > 1
        return side if several else self.image_size

    def caption(
        self,
        images,
        beam_size=5,
        n=None,
        temperature=None,
        max_words=choosing.MAX_LENGTH,
        length_penalty=0.0,
        batch_size=32,
        seed=None,
        **further,
    ):
        """Captions images, a batch at a time as they are asked for.

        Args:
            images: one or an iterable of paths, PIL.Images, uint8 arrays (H, W, 3) or uint8 tensors
                (3, H, W), RGB, of any size.
            beam_size: partial captions kept at each step.
            n: how many captions of an image, or fewer: of the beam, so `beam_size` at most, the
                best first; or as many drawn, the likeliest first.
            temperature: above 0, words are drawn at random with p^(1 / temperature) instead of
                searched for.
            max_words: of a caption, at most.
            length_penalty: α: captions are compared by log p / length^α.
            batch_size: images captioned together.
            seed: of what is drawn; None: of words another draw each time, of the places of
                `look` the same.
            further: `choosing.Search` has them: `top_k`, `top_p`, `beam_groups`,
                `diversity_penalty`, `min_words`, `no_repeat_ngram`, `must_include`, `rerank`,
                `candidates`.

        Yields:
            a `Caption` for each image, or where `n` is given, a list of them.

        Raises:
            UserError: an image cannot be read, a number cannot be, options do not go together, or
                the model has not the words.
        """
        search = choosing.Search(
            beam_size=beam_size,
            temperature=temperature,
            max_words=max_words,
            length_penalty=length_penalty,
            **further,
        )
        choosing.check_number("batch_size", batch_size, int, 1, choosing.MANY)
        if n is not None:
            search.check_count(n)
        search.check_words(self.word_map)
        generator = self.generator(seed, search.draws or self.look == "sample")

        def found():
            for features in self.encode_ahead(self._batches(images, batch_size)):
                if self.look is not None:
                    self.decoder.set_look(self.look, seed or 0)
                captions = self.search(features, search, n or 1, generator)
                yield from captions if n is not None else (one for [one] in captions)

        return found()

    def _batches(self, images, batch_size):
        """uint8 (batch_size, 3, S, S) of images as `caption` takes them; where one cannot be read,
        those before it first."""
        squares = []
        for image in [images] if _is_one(images) else images:
            try:
                squares.append(self.square(to_picture(image)))
            except UserError:
                if squares:
                    yield torch.from_numpy(np.stack(squares))
                raise
            if len(squares) == batch_size:
                yield torch.from_numpy(np.stack(squares))
                squares = []
        if squares:
            yield torch.from_numpy(np.stack(squares))

    def square(self, picture):
        """What the encoder is given of an RGB PIL.Image: np.uint8 (3, S, S)."""
        return image_files.square(picture, self.image_size, self.fit)

    def generator(self, seed, draws=True):
        """A torch.Generator for what is drawn; None without a seed. Raises UserError for one that
        cannot be, or where nothing is drawn."""
        if seed is None:
            return None
        choosing.check_number("seed", seed, int, 0, 2**63 - 1)
        if not draws:
            raise UserError("seed is for what is drawn: give a temperature, top_k or top_p")
        return torch.Generator(self.device).manual_seed(seed)

    def autocast(self):
        """The context in which the model computes."""
        return autocast(self.device, self.amp)

    def encode_ahead(self, batches: Iterable[Tensor]):
        """`Encoder.features` of batches of images: on CUDA each computed while the one before it
        is in use; on a CPU, whose cores are busy either way, when it is asked for.

        Args:
            batches: uint8 (n, 3, S, S) each.

        Yields:
            (n, g, g, D) in the compute precision, on the model's device; of an ensemble
            `ensemble.Features`.
        """

        @torch.inference_mode()
        def encode(images):
            with self.autocast():
                return self.encoder.features(images.to(self.device, non_blocking=True))

        batches = iter(batches)
        if self.device.type != "cuda":
            yield from map(encode, batches)
            return

        caller = torch.cuda.current_stream(self.device)

        def encode_aside(images):
            self._aside.wait_stream(caller)  # which may have made the images
            with torch.cuda.stream(self._aside):
                features = encode(images)
            self._aside.synchronize()
            return features

        # the first is encoded here: nothing is in use yet
        ready = deque(map(encode, islice(batches, 1)))
        with ThreadPoolExecutor(1) as pool:
            while ready:
                try:
                    following = [pool.submit(encode_aside, own) for own in islice(batches, 1)]
                except Exception:  # images that cannot be read: those before them first
                    yield ready.popleft()
                    raise
                yield ready.popleft()
                ready.extend(future.result() for future in following)

    @cached_property
    def _aside(self):
        """The CUDA stream on which batches are encoded ahead. One, as PyTorch keeps memory for each
        stream."""
        return torch.cuda.Stream(self.device)

    def search(self, features, search=BEAM, n=1, generator=None):
        """Captions of features from `encode_ahead`: for each image a list of `n` or fewer.

        Args:
            search: a `choosing.Search` whose `check_words` knows the model's.
            generator: from `generator`.
        """
        with self.autocast():
            found = choosing.find(self.decoder, features, self.word_map, search, n, generator)
        said = partial(_in_words, words=list(self.word_map), rule=self.rule, fit=self.fit)
        return [list(map(said, captions)) for captions in found]


def _read(path, word_map):
    """Encoder, decoder, words, image size, and what it says of itself, of a checkpoint."""
    checkpoint = checkpoints.load_checkpoint(path)
    encoder, decoder = checkpoints.build_models(checkpoint)
    words = _words(path, checkpoint.get("word_map"), word_map, decoder.config.vocab_size)
    weights = ("encoder", "decoder", "optimizer")
    about = {key: value for key, value in checkpoint.items() if key not in weights}
    return encoder, decoder, words, checkpoint["image_size"], about


def _check_same(paths, words, fits):
    """Raises UserError unless the checkpoints at `paths` have one word map, and one fit."""
    for path, own, fit in zip(paths, words, fits, strict=True):
        if fit != fits[0]:
            raise UserError(
                f"{path} is for images of --fit {fit}, and {paths[0]} of --fit {fits[0]}: models "
                "that caption together see the same"
            )
        check_same(
            own,
            words[0],
            f"{path} is of another vocabulary than {paths[0]}{{}}: models that caption together "
            "have the same word map",
        )


def _words(path, own, named, count):
    """Word -> index in the order of the indices, of a checkpoint.

    Args:
        own: what the checkpoint at `path` holds, or None.
        named: path of a WORDMAP file, or None.
        count: of the words that its decoder can say.

    Raises:
        UserError: there is none, it is of another vocabulary, or the two differ.
    """
    if own is None and named is None:
        raise UserError(f"{path} holds no word map: name its WORDMAP file by word_map (--word_map)")
    words, source = (own, path) if named is None else (read_json(named), named)
    check_word_map(words, source)
    if len(words) != count:
        raise UserError(
            f"{source} is of another vocabulary ({counted(len(words), 'word')}) than the decoder "
            f"of {path} ({count})"
        )
    if own is not None:
        check_same(
            words,
            own,
            f"{named} is of another vocabulary than {path}{{}}, which holds its own: leave it out",
        )
    return dict(sorted(words.items(), key=itemgetter(1)))


def _check_look(path, look, looks):
    """Raises UserError unless the decoder of the checkpoint at `path` can look so."""
    if not looks:
        raise UserError(
            f"{path} looks in one way alone, as its attention is not hard: leave look (--look) out"
        )
    if look not in looks:
        raise UserError(f"look {look!r} is none of {', '.join(looks)}")


def _in_words(caption, words, rule, fit):
    """A `Caption` of a `choosing.Caption`, words being those of the vocabulary in its order."""
    own = [words[i] for i in caption.words]
    return Caption(own, *caption[1:], fit=fit, text=rule.join(own))


def _is_one(images):
    """Whether it is one image; what is no image at all is refused as one."""
    if isinstance(images, str | bytes | PathLike | Image.Image) or not isinstance(images, Iterable):
        return True
    return isinstance(images, np.ndarray | Tensor) and images.ndim < 4


def to_picture(image):
    """An upright RGB PIL.Image of what `Captioner.caption` takes. Raises UserError."""
    if isinstance(image, str | PathLike):
        return image_files.open_image(image)
    if isinstance(image, Image.Image):
        try:
            return image_files.to_rgb(image)
        except Exception as error:  # on damaged pixels Pillow raises nearly anything
            raise UserError(f"cannot read an image: {error or type(error).__name__}") from error
    if isinstance(image, Tensor) and image.device.type != "meta":
        image = image.movedim(0, -1).cpu().numpy() if image.dim() == 3 else image.cpu().numpy()
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,):
        kind = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image)
        raise UserError(
            "an image is a path, a PIL.Image, a uint8 array (H, W, 3) or a uint8 tensor "
            f"(3, H, W), not {kind}"
        )
    return to_picture(Image.fromarray(image))
