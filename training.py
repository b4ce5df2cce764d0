"""Training from stage to stage and epoch to epoch."""

import signal
import sys
import time

import torch

import checkpoints
import diversity
import engine
import metrics
import rewards
import self_critical
import vocabulary
from config import SCHEDULES
from datasets import CaptionDataset
from groundwork import distributed
from groundwork.errors import UserError
from groundwork.progress import progress
from groundwork.signals import Stop
from groundwork.wording import counted
from objectives import CrossEntropy
from optimization import rates_of
from run_state import RunFiles, RunState
from sampling import ScheduledSampling, own_share
from training_data import TrainingData
from training_report import MEASURES, Reports, describe_means
from word_rules import unsayable

SKIPS = 5  # steps without finite gradients, in a row, after which training stops


class Training:
    """Carries a run through its stages.

    Args:
        state: where the run stands.
        files: where it writes.
        data_folder: with the input files.
        cache: whether to keep the frozen encoder's output on disk, if there is room.
        save_every: ("minutes", n) or ("steps", n), between checkpoints inside an epoch.
        workers: processes that read batches ahead, None for the device's usual.
        events: whether to write for TensorBoard.
        karpathy_json: as `datasets.CaptionDataset` takes it.
        prune: whether to remove cached features of other encoders and views.
        regions_file: as `Reports` takes it.
    """

    def __init__(
        self,
        state: RunState,
        files: RunFiles,
        data_folder,
        cache=True,
        save_every=("minutes", 10),
        workers=None,
        events=False,
        karpathy_json=None,
        prune=False,
        regions_file=(None, ()),
    ):
        self.state, self.files, self.data_folder = state, files, data_folder
        self.cache, self.save_every, self.workers = cache, save_every, workers
        self.karpathy_json, self.prune = karpathy_json, prune
        self.reports = Reports(state, files, events, regions_file)
        self.began = time.monotonic()

    def run(self, stages, checkpoint=None, source=None, anew=False):
        """Trains through the stages.

        Args:
            stages: of `checkpoints.STAGES`, those that are still to be done, in order.
            checkpoint: to go on from, in the stage that it was saved in.
            source: its path, beside which its run's best may be.
            anew: whether what an earlier run left in the folder is given up.
        """
        if distributed.is_main:  # before features are cached, and an older run is given up
            self.reports.check(self._references)
        try:
            self._check_room(stages, anew)
            for stage in stages:
                self._begin(stage)
                first = stage == stages[0]
                self._check_room([stage], anew and first)  # features may have taken it
                if first and anew and distributed.is_main:
                    self.files.clear()
                if first and checkpoint:
                    self._go_on(checkpoint, source)
                self.reports.open(self.data, self.data_folder)
                # at a signal a checkpoint is saved and the process ends; before, while features
                # are cached, it ends at once, and nothing is lost
                with Stop() as self.stop:
                    self._fit()
        finally:
            self.reports.close()

    def _references(self):
        """Those of the validation images, before a stage is open."""
        folder, json = self.data_folder, self.karpathy_json
        return CaptionDataset(folder, self.state.base, "VAL", karpathy_json=json).references

    def _check_room(self, stages, anew):
        if distributed.is_main:
            self.files.check_room(max(map(self.state.checkpoint_size, stages)), anew)

    def _begin(self, stage):
        """Opens a stage; after another one, from the best checkpoint that it left."""
        state = self.state
        if state.stage is not None:
            with distributed.main_first():  # which wrote it
                best = checkpoints.load_checkpoint(self.files.best)
                state.network.decoder.load_state_dict(best["decoder"])
            print(f"fine-tuning starts from epoch {best['epoch']} of {self.files.best}")
        state.begin(stage)
        self.data = TrainingData(
            self.data_folder,
            state.base,
            state.network,
            state.config,
            stage,
            self.cache,
            self.workers,
            self.karpathy_json,
            self.prune,
        )
        state.image_size, state.fit = self.data.image_size, self.data.fit
        self.objective, self.grad_clip = _objective_of(state, self.data)

    def _go_on(self, checkpoint, source):
        """Takes over where an earlier run stood: in this stage, or in the one before."""
        with distributed.main_first():
            self.state.adopt_best(self.files, source)
        if checkpoint["stage"] == self.state.stage:
            self.state.restore(checkpoint, self.data)
        self.reports.log()

    def _fit(self):
        """Epochs until the stage's last, or until none has been better for long."""
        state, config, network = self.state, self.state.config, self.state.network
        precision = "bfloat16" if network.amp else "float32"
        print(
            f"stage {state.stage}: {counted(self.data.image_count, 'image')}, {precision} on "
            f"{network.device}"
        )
        while state.epoch < config.epochs and state.waited < config.stop_after:
            started = time.perf_counter() - state.seconds
            rates = rates_of(state.optimizer).values()
            record = {"stage": state.stage, "epoch": state.epoch + 1}
            record |= zip(("lr", "encoder_lr"), rates, strict=False)  # the second in fine-tuning
            record |= self._train_epoch(started)
            scores, captions = self._validate()
            record |= scores
            record["seconds"] = round(time.perf_counter() - started, 1)
            improved = state.end_epoch(record)
            # before the checkpoint, which says that it has been done
            self.reports.epoch_events(record, captions)
            self._save(improved)
            self.reports.epoch(record, captions, improved)
            stopping = torch.tensor(float(bool(self.stop.signal)), device=network.device)
            if distributed.add_up(stopping):
                self._leave()
        if state.epoch >= config.epochs:
            done = "epoch is" if state.epoch == 1 else "epochs are"
            print(f"stage {state.stage}: its {state.epoch} {done} done")
        else:
            measure, waited = MEASURES[config.select_by], counted(state.waited, "epoch")
            print(f"stage {state.stage}: stopped, no better {measure} for {waited}")

    def _train_epoch(self, started):
        """The steps of an epoch that are still to do; its mean loss and accuracy, its speed."""
        state = self.state
        self.data.set_epoch(state.epoch + 1, state.step)
        saved = time.monotonic()

        def flags():
            unit, interval = self.save_every
            minutes = (time.monotonic() - saved) / 60
            due = (state.step + 1) % interval == 0 if unit == "steps" else minutes >= interval
            return [bool(self.stop.signal), due]

        def after_step(step):
            nonlocal saved
            stopping, due = step.flags
            self._count(step)
            # first, as a narrow terminal cuts the end off
            means = describe_means(state.means, self.objective.measure)
            bar.set_description_str(f"epoch {state.epoch + 1}: {means}", refresh=False)
            bar.set_postfix_str(f"{self._rate(started):.0f} captions/s", refresh=False)
            bar.update()
            if stopping or (due and not state.skipped):  # else the weights may be spoilt
                state.seconds = time.perf_counter() - started
                self._save()
                saved = time.monotonic()
            if stopping:
                self._leave()

        with progress(
            total=self.data.steps, initial=state.step, desc=f"epoch {state.epoch + 1}", unit="step"
        ) as bar:
            try:
                engine.train_epoch(
                    state.network,
                    self.data.train,
                    self.objective,
                    state.optimizer,
                    self.grad_clip,
                    state.means,
                    flags,
                    after_step,
                    self.data.accumulate,
                )
            except engine.AnomalyError as error:
                raise UserError(f"{state.place(state.step + 1)}: {error}") from error
        rate = self._rate(started)
        means = state.means.add_up(state.network.device)
        found = {name: means[name] for name in means.sums}
        if isinstance(self.objective, ScheduledSampling):
            found["own_words"] = round(self.objective.share(), 4)  # of the words read, at its end
        return found | {"captions_per_second": round(rate, 1)}

    def _count(self, step):
        """Counts a step; stops where many in a row were skipped."""
        state = self.state
        state.step += 1
        self.reports.step(step.loss)
        if step.fault is None:
            state.skipped = 0
            return
        state.skipped += 1
        print(f"{state.place(state.step)}, skipped: {step.fault}", flush=True)
        if state.skipped == SKIPS:
            kept = " and ".join(map(str, self.files.kept()))
            raise UserError(
                f"{SKIPS} steps in a row skipped, the last because {step.fault}: stopped; "
                + (f"{kept} are kept; " if kept else "")
                + "try a lower learning rate or --amp off; --detect_anomaly finds the operation"
            )

    def _rate(self, started):
        """Captions per second in this epoch, by all processes."""
        done = self.data.epoch_captions * self.state.step / self.data.steps
        return done / (time.perf_counter() - started)

    def _validate(self):
        """Scores of the validation split, and its captions.

        At a signal it is given up, to be done again after resuming; several processes finish it.
        """
        state = self.state

        def batches():
            for batch in progress(self.data.val, desc="validation", unit="batch", leave=False):
                if self.stop.signal and distributed.world_size == 1:
                    self._save()
                    self._leave()
                yield batch

        loss, top5, captions = engine.validate(
            state.judged, batches(), _likelihood(state), state.word_map, self.reports.measured()
        )
        texts = [state.rule.join(caption.words) for caption in captions]
        scores = _scores(self.data.references, texts, state.rule.split)
        return {"val_loss": loss, "val_top5": top5} | scores, captions

    def _save(self, improved=False):
        self.reports.flush()
        seconds = time.monotonic() - self.began
        self.state.save(self.files, self.data.order(), seconds, improved)

    def _leave(self):
        """Ends the process at a signal, once the checkpoint is written."""
        state = self.state
        number = self.stop.signal or signal.SIGTERM  # another process may have it
        print(
            f"stopped by {signal.Signals(number).name} after {counted(state.epoch, 'epoch')} and "
            f"{counted(state.step, 'step')} of stage {state.stage}: go on from "
            f"{self.files.newest} with --resume",
            flush=True,
        )
        distributed.wait()
        sys.exit(128 + number)


def _likelihood(state, label_smoothing=0.0):
    """What stages before the self-critical one minimise; the validation loss is without label
    smoothing."""
    return CrossEntropy(
        state.config.alpha_c, label_smoothing, vocabulary.barred(state.network.decoder)
    )


def _objective_of(state, data):
    """What a stage minimises, of the `TrainingData` that it reads, and how its gradients are
    clipped."""
    config, truth = state.config, _likelihood(state, state.config.label_smoothing)
    if state.stage != "scst":
        return _with_own_words(state, truth), config.grad_clip
    people = data.train.dataset
    corpus = self_critical.references(people.captions, people.lengths)
    objective = self_critical.SelfCritical(
        rewards.make(rewards.parse(config.reward), corpus),
        state.word_map,
        int(people.lengths.max()) - 2,  # without <start> and <end>
        config.samples,
        config.cross_entropy_share,
        truth,
    )
    return objective, config.scst_grad_clip


def _with_own_words(state, truth):
    """The same of a `CrossEntropy`, where words of the model's own are to be read."""
    config = state.config
    if not config.scheduled_sampling:
        return truth
    k = config.sampling_k or SCHEDULES[config.scheduled_sampling]

    def share():
        since = state.updates.count - config.sampling_start
        return own_share(config.scheduled_sampling, since, k, config.sampling_max)

    never = [state.word_map[word] for word in (*unsayable(state.word_map), "<end>")]
    never = torch.tensor(never, device=state.network.device)
    return ScheduledSampling(**vars(truth), share=share, never=never)


def _scores(references, captions, split):
    """What the log has of an epoch's greedy captions, texts, by name."""
    references = [reference["captions"] for reference in references]
    bleu = metrics.bleu(references, captions, split).scores
    scores = {f"bleu{n}": score for n, score in enumerate(bleu, start=1)}
    scores["cider"] = metrics.cider(references, captions, split)
    return scores | diversity.of_greedy(captions, metrics.are_english(references), split)
