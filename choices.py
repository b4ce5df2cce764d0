"""Which options of the model go together: found out before anything is read, downloaded or written,
from the registries and a decoder without memory."""

import dataclasses

import checkpoints  # noqa: F401 -- it imports every decoder's module
import embeddings
import vocabulary
from attentions import ATTENTIONS
from config import ModelConfig
from contract import DECODERS, build_decoder, config_fields, make_config
from groundwork.devices import shapes_only
from groundwork.errors import UserError, in_a_line
from groundwork.options import as_flags
from training_options import SCST_OPTIONS

# Of the model's options, those that a checkpoint that is continued may have otherwise
DROPOUTS = ("dropout", "embed_dropout")
FROZEN = ("decoder", "scst")  # stages that leave the encoder as it is
# And those that say how its words were begun, which its weights tell no more
BEGUN = tuple(vocabulary.LAYERS)


def check(values, typed):
    """Raises UserError where the options of a new model cannot be, or not together.

    Args:
        values: all options, by name.
        typed: those typed, by name, without those of a recipe.
    """
    name, attention = values["decoder"], None
    _check_known("decoder", name, DECODERS)
    fields = config_fields(name)
    if "attention" in fields:
        attention = values["attention"] or fields["attention"].default
        _check_known("attention", attention, ATTENTIONS)
    check_own(typed, name, attention)
    whole = "fc" in values["encoder_stages"].split()
    if whole and attends(name, attention):
        way = "--attention none or --decoder merge" if attention else "--decoder merge"
        raise UserError(
            "--encoder_stages fc is one vector of the whole image, in which an attention has no "
            f"places to look at: give --encoder_stages last, or {way}"
        )
    if whole and (size := typed.get("encoded_image_size")):
        raise UserError(
            f"--encoded_image_size {size}: --encoder_stages fc is one vector of the whole image, "
            "which has no grid: leave it out"
        )
    _check_sizes(values, typed)


def check_training(values, typed):
    """Raises UserError where options of training have no effect, or not together.

    Args:
        values: all options, by name.
        typed: those typed, by name.
    """
    idle = {name: typed[name] for name in SCST_OPTIONS if name in typed}
    if idle and values["stage"] != "scst":
        raise UserError(f"{as_flags(idle)}: leave it out, as it is for --stage scst")
    sampling = {name: typed[name] for name in sorted(typed) if name.startswith("sampling_")}
    if sampling and not values["scheduled_sampling"]:
        raise UserError(f"{as_flags(sampling)}: that is of --scheduled_sampling: give it, too")
    if values["scheduled_sampling"] and hasattr(ATTENTIONS.get(values["attention"]), "LOOKS"):
        raise UserError(
            f"--scheduled_sampling: the attention {values['attention']} draws places, which learn "
            "from true words alone: leave the option out, or give another --attention"
        )
    if typed.get("scheduled_sampling") and values["stage"] == "scst":
        raise UserError(
            "--scheduled_sampling: the stage scst reads no true words, in whose place others might "
            "come: leave the option out"
        )
    changes = (typed.get("augment") or "").split()
    if "none" in changes and len(changes) > 1:
        raise UserError(f"--augment {' '.join(changes)}: none goes without other changes")
    if typed.get("accumulate", 1) > 1 and values["stage"] == "scst":
        raise UserError(
            "--accumulate: how many words the next batches' captions will have is not known before "
            "they are drawn: leave the option out, or give a larger --scst_batch_size"
        )
    if "augment" in typed and values["stage"] in FROZEN and values["cache_features"] == "auto":
        raise UserError(
            f"{as_flags({'augment': typed['augment']})}: this stage reads cached features, no "
            "images: give --stage finetune, --cache_features off, or --views in its place"
        )


def check_own(typed, decoder, attention):
    """Raises UserError where options of the model are typed that have no effect on it.

    Args:
        typed: by name, without those of a recipe.
        decoder: name.
        attention: name; None: the decoder has no such choice.
    """
    idle = {field.name for field in dataclasses.fields(ModelConfig)} - config_fields(decoder).keys()
    idle -= {"encoder", "encoder_stages", "decoder", *BEGUN}
    _refuse(typed, idle, f"the decoder {decoder} has no such choice", "another --decoder")
    if attention:
        reason = f"the attention {attention} has no such choice"
        _refuse(typed, idle_fields(attention), reason, "another --attention")
    if not attends(decoder, attention) and typed.get("alpha_c"):
        reason = "this model has no attention to weigh"
        _refuse(typed, {"alpha_c"}, reason, "an --attention or --decoder that has it")


def attends(decoder, attention):
    """Whether the decoder of that name looks at places, with the attention of that name, if any."""
    return (ATTENTIONS[attention] if attention else DECODERS[decoder]).attends


def idle_fields(attention):
    """Of the fields that attentions have in a decoder's configuration, those that one is made
    without."""
    every = {field for kind in ATTENTIONS.values() for field in kind.fields}
    return every - set(ATTENTIONS[attention].fields)


def in_force(encoder, decoder):
    """Those of the model's options that the encoder and decoder in use have, by name."""
    values = dataclasses.asdict(decoder.config)
    values |= {"encoder": encoder.name, "decoder": decoder.name}
    values["encoder_stages"] = " ".join(encoder.stages)
    return {f.name: values[f.name] for f in dataclasses.fields(ModelConfig) if f.name in values}


def check_unchanged(asked, typed, in_force, before):
    """Raises UserError where other model options are asked for than those of a checkpoint's model.

    Args:
        asked: options by name, those of a recipe among them.
        typed: as they were typed, with `recipe` where one was.
        in_force: see the function of this name.
        before: the options of the checkpoint's run.
    """
    attention = in_force.get("attention")
    check_own(typed, in_force["decoder"], attention)
    free = {*DROPOUTS, *(idle_fields(attention) if attention else ())}
    fixed = {name: value for name, value in in_force.items() if name not in free}
    fixed |= {name: before.get(name, getattr(ModelConfig(), name)) for name in BEGUN}
    if "encoder_weights" in before:
        fixed["encoder_weights"] = before["encoder_weights"]
    other = {name: asked[name] for name in fixed if asked.get(name, fixed[name]) != fixed[name]}
    if other:
        none = [f"no --{name}" for name in other if fixed[name] is None]
        theirs = ", ".join(filter(None, [as_flags({n: fixed[n] for n in other}), *none]))
        untyped = other.keys() - typed.keys()
        recipe = f", or --recipe {typed['recipe']}, which has it" if untyped else ""
        raise UserError(
            f"{as_flags(other)}: the model is the checkpoint's, with {theirs}: leave it "
            f"out{recipe}, or train another model in another --output_folder"
        )


def _check_known(option, name, registry):
    if name not in registry:
        known = ", ".join(registry)
        raise UserError(f"--{option} {name}: there is no such {option}: known are {known}")


def _refuse(typed, idle, reason, other):
    """Raises UserError where options are typed that are idle for a reason; `other` has them."""
    if found := {name: typed[name] for name in sorted(idle) if typed.get(name) is not None}:
        raise UserError(
            f"{as_flags(found)}: {reason}: leave it out, or give {other} (--list has the options "
            "of each)"
        )


def _check_sizes(values, typed):
    """Builds the decoder without memory, for a vocabulary and features that stand for any."""
    name, source, typed_dim = values["decoder"], values["embeddings"], values["embed_dim"]
    dim = typed_dim if source is None else embeddings.count_values(source)
    if typed_dim not in (None, dim):
        raise UserError(
            f"--embed_dim {typed_dim}: the vectors of {source} have {dim} values: leave the option "
            "out"
        )
    own = values | {"vocab_size": 3, "encoder_dim": 1, "embed_dim": dim}
    own = {key: own[key] for key in config_fields(name) if own.get(key) is not None}
    try:
        with shapes_only():
            decoder = build_decoder(name, make_config(name, own))
    except (ValueError, RuntimeError) as error:  # of PyTorch, where no memory could be so large
        shown = {"decoder", "attention", "embeddings", *own} & typed.keys()
        flags = as_flags({key: typed[key] for key in typed if key in shown})
        origin = f"; the {dim} values of a word are those of {source}" if source else ""
        raise UserError(f"{flags or f'--decoder {name}'}: {in_a_line(error)}{origin}") from error
    vocabulary.check_layers(decoder, [option for option in BEGUN if values[option]])
