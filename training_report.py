"""What a run says of itself: lines for people, the log, the curves, TensorBoard."""

import dataclasses
import math

import attention_report
import pictures
import regions
from attention_pictures import draw_attention
from config import ModelConfig
from datasets import as_photographed, open_images
from groundwork import distributed, tensorboard_log
from groundwork.files import check_writable
from groundwork.logs import write_log


class Reports:
    """Follows a run. Only the main process writes.

    Args:
        state: the run's `RunState`.
        files: its `RunFiles`.
        with_events: whether to write for TensorBoard, too.
        regions_file: for TensorBoard, path and words of `regions.read_regions`; without a path
            those that the data set itself has.
    """

    def __init__(self, state, files, with_events=False, regions_file=(None, ())):
        self.state, self.files = state, files
        self.with_events, self.events, self.regions_file = with_events, None, regions_file

    def check(self, references):
        """Raises UserError where log, curves or events cannot be written, or regions are not to be
        had.

        Args:
            references: gives those of the validation images.
        """
        paths = [self.files.log, pictures.curves_path(self.files.log)]
        for path in paths + [self.files.events / "events"] * self.with_events:
            check_writable(path)
        if self.with_events:
            known = references()
            self.regions = regions.find(known, *self.regions_file)
            self.english = attention_report.tells_nouns(known, self.state.rule)

    def open(self, data, data_folder):
        """Begins to follow a stage, whose `TrainingData` it takes, from where the run stands."""
        self.data, state = data, self.state
        if not (self.with_events and distributed.is_main) or self.events is not None:
            return
        # Later points are of steps that will be done again, and, between an epoch's last step and
        # its validation, so are the scores.
        start = self._captions_seen(state.step) + (state.step < data.steps)
        self.images = open_images(data_folder, state.base, "VAL")
        self.events = tensorboard_log.EventLog(
            self.files.events, start, hyperparameters(state), state.records[-1]
        )

    def step(self, loss):
        """A step of training was done, and has been counted."""
        if self.events is not None:  # at the step's first caption, so before the epoch's end
            rates = self.state.updates.rates()
            self.events.step(self._captions_seen(self.state.step - 1) + 1, loss, rates)

    def epoch_events(self, record, captions):
        """An epoch was done: its record and the validation captions, for TensorBoard."""
        if self.events is not None:
            scalars = attention_report.scalars(captions, self.english, self.regions)
            examples = self._examples(captions)
            self.events.epoch(self._captions_seen(0), record, scalars, examples)

    def epoch(self, record, captions, improved):
        """The same for people and for programs: lines, log and curves."""
        if not distributed.is_main:
            return
        measure = self.state.config.select_by
        print(describe_epoch(record, self.state.best, improved, measure), flush=True)
        references = self.data.references
        for i in self.shown():
            print(f"  {references[i]['filename']}: {self.state.rule.join(captions[i].words)}")
            print(f"    human: {references[i]['captions'][0]}", flush=True)
        self.log()
        pictures.draw_curves(self.files.log)

    def log(self):
        """The whole log, as the checkpoint has it: none of its lines is lost or stands twice."""
        if distributed.is_main:
            write_log(self.files.log, self.state.log)

    def flush(self):
        """Returns when all that was written for TensorBoard is on the disk."""
        if self.events is not None:
            self.events.flush()

    def close(self):
        if self.events is not None:
            self.events.close()

    def measured(self):
        """The validation images of which it wants to know where the decoder looked."""
        return range(len(self.data.references)) if self.with_events else self.shown()

    def shown(self):
        """The three validation images that are examples."""
        count = len(self.data.references)
        return range(0, count, math.ceil(count / 3))

    def _captions_seen(self, steps):
        """Captions that the run has trained on, in the epochs of its log and in `steps` steps
        more: a measure that holds over all stages and their batch sizes; those drawn in place of
        them do not count."""
        return len(self.state.log) * self.data.caption_count + self.data.captions_in(steps)

    def _examples(self, captions):
        """(file name, a human caption, the model's, picture of its attention) of the examples."""
        for i in self.shown():
            reference, (words, alphas) = self.data.references[i], captions[i]
            image = as_photographed(self.images[i], reference)
            text = self.state.rule.join(words)
            picture = draw_attention(image, words, alphas, text=text)
            yield reference["filename"], reference["captions"][0], text, picture


def hyperparameters(state):
    """Those in force in a run, by name: a model that was loaded is as it was made, whatever the
    options."""
    network = state.network
    model = dataclasses.asdict(network.decoder.config)
    model |= {"encoder": network.encoder.name, "decoder": network.decoder.name}
    names = [field.name for field in dataclasses.fields(ModelConfig) if field.name in model]
    precision = "bfloat16" if network.amp else "float32"
    return (
        {name: model[name] for name in names}
        | dataclasses.asdict(state.config)
        | {"stage": state.options["stage"], "precision": precision}
    )


MEASURES = {"bleu4": "BLEU-4", "cider": "CIDEr-D", "loss": "validation loss"}  # of the best epoch


FORMS = {"top5": "top-5 {:.1%}", "reward": "reward {:.3f}"}  # of what objectives measure


def describe_means(values, measure):
    """The loss of training, and what the objective measures beside it, for people."""
    return f"loss {values['loss']:.3f}, {FORMS[measure].format(values[measure])}"


def describe_epoch(record, best, improved, measure):
    """An epoch's record, for people."""
    bleu = " / ".join(f"{100 * record[f'bleu{n}']:.1f}" for n in range(1, 5))
    cider = f", CIDEr-D {100 * record['cider']:.1f}" if "cider" in record else ""
    means = describe_means(record, "reward" if "reward" in record else "top5")
    ends = f", dangling ends {record['dangling']:.1%}" if "dangling" in record else ""
    value = f"{best['val_loss']:.3f}" if measure == "loss" else f"{100 * best[measure]:.1f}"
    return (
        f"epoch {record['epoch']}: {means}; "
        f"validation loss {record['val_loss']:.3f}, top-5 {record['val_top5']:.1%}, "
        f"BLEU-1 to BLEU-4: {bleu}{cider}{ends}, "
        + ("the best so far" if improved else f"best {MEASURES[measure]} {value}")
        + f"; {record['captions_per_second']:.0f} captions/s, {record['seconds']:.0f} s"
    )
