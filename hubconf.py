"""What `torch.hub.load` offers of this project; the names of its modules are left to others."""

from groundwork.isolation import own_modules

with own_modules(keep=False):
    from captioner import Captioner

dependencies = ["torch", "torchvision", "numpy", "PIL", "filelock", "h5py", "matplotlib"]
dependencies += ["timm", "tqdm"]


def captioner(checkpoint, device=None, amp="auto", word_map=None, look=None):
    """A trained model that captions images: see `Captioner.load` and `Captioner.caption`. The
    checkpoint is a file, or the folder of its run, or a list of them, which caption together.

    model = torch.hub.load("path/to/the/clone", "captioner", "BEST_….pth.tar", source="local")
    for caption in model.caption(["x.jpg"]):
        print(caption.text)
    """
    return Captioner.load(checkpoint, device, amp, word_map, look)
