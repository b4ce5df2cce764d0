"""Words of messages."""


def counted(number, noun):
    """A number with its noun: 1 epoch, 2 epochs, 2 processes."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"
