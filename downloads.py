"""Published data sets fetched from where their authors put them."""

import hashlib


def file_name(address):
    """Where the image of an address lies, below the folder of images: "3f/3f…a1.jpg", by the
    address's SHA-256, whatever the image's format. A reader of addresses leaves out those that have
    no file there: they could not be fetched."""
    digest = hashlib.sha256(address.strip().encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return f"{digest[:2]}/{digest}.jpg"
