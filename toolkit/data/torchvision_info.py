"""Static information about the classification data sets of torchvision. Imports no library."""

from __future__ import annotations

from typing import NamedTuple

Lists = tuple[str | bool, str | bool | None, str | bool | None]
"""Values of an argument such as ``split`` or ``train`` that select the training, validation and test images.

None if there is no such list.
"""

_TRAIN: tuple[Lists, ...] = ((True, None, False),)
_TRAIN_TEST: tuple[Lists, ...] = (("train", None, "test"),)
_TRAIN_VAL: tuple[Lists, ...] = (("train", "val", None),)
_ALL: tuple[Lists, ...] = (("train", "val", "test"),)


class TorchvisionSet(NamedTuple):
    """A data set class in torchvision.datasets."""

    description: str
    classes: int | None
    """Number of classes; None if it depends on the arguments."""
    size: int | None
    """Height and width of all images in pixels; None if they differ."""
    channels: int
    lists: tuple[Lists, ...]
    """Official splits, the default first; () if the images are not split."""
    selector: str = "split"
    """Argument of the class that selects a split."""

    def lists_for(self, train: str | None) -> Lists | None:
        """Return the official splits whose training images ``train`` selects (None: the default); None without any."""
        return next((lists for lists in self.lists if train in (None, lists[0])), None)


TORCHVISION_SETS = {
    "CIFAR10": TorchvisionSet("objects (Krizhevsky 2009)", 10, 32, 3, _TRAIN, "train"),
    "CIFAR100": TorchvisionSet("objects (Krizhevsky 2009)", 100, 32, 3, _TRAIN, "train"),
    "CLEVRClassification": TorchvisionSet("number of objects in a scene (Johnson et al. 2017)", 8, None, 3, _TRAIN_VAL),
    "Caltech256": TorchvisionSet("objects (Griffin et al. 2007)", 257, None, 3, ()),
    "CelebA": TorchvisionSet(
        "attributes of faces, several per image (Liu et al. 2015)", 40, None, 3, (("train", "valid", "test"),)
    ),
    "Country211": TorchvisionSet(
        "country of a photograph (Radford et al. 2021)", 211, None, 3, (("train", "valid", "test"),)
    ),
    "DTD": TorchvisionSet("textures (Cimpoi et al. 2014)", 47, None, 3, _ALL),
    "EMNIST": TorchvisionSet("handwritten letters and digits (Cohen et al. 2017)", None, 28, 1, _TRAIN, "train"),
    "EuroSAT": TorchvisionSet("land use in satellite images (Helber et al. 2019)", 10, 64, 3, ()),
    "FER2013": TorchvisionSet("facial expressions (Goodfellow et al. 2013)", 7, 48, 1, _TRAIN_TEST),
    "FGVCAircraft": TorchvisionSet(
        "aircraft (Maji et al. 2013)", None, None, 3, (("train", "val", "test"), ("trainval", None, "test"))
    ),
    "FashionMNIST": TorchvisionSet("articles of clothing (Xiao et al. 2017)", 10, 28, 1, _TRAIN, "train"),
    "Flowers102": TorchvisionSet("flowers (Nilsback & Zisserman 2008)", 102, None, 3, _ALL),
    "Food101": TorchvisionSet("dishes (Bossard et al. 2014)", 101, None, 3, _TRAIN_TEST),
    "GTSRB": TorchvisionSet("traffic signs (Stallkamp et al. 2012)", 43, None, 3, _TRAIN_TEST),
    "INaturalist": TorchvisionSet(
        "species (Van Horn et al. 2018, 2021)",
        None,
        None,
        3,
        (
            ("2021_train", "2021_valid", None),
            ("2021_train_mini", "2021_valid", None),
            ("2017", None, None),
            ("2018", None, None),
            ("2019", None, None),
        ),
        "version",
    ),
    "ImageNet": TorchvisionSet("objects (Russakovsky et al. 2015)", 1000, None, 3, _TRAIN_VAL),
    "Imagenette": TorchvisionSet("ten classes of ImageNet (Howard 2019)", 10, None, 3, _TRAIN_VAL),
    "KMNIST": TorchvisionSet("cursive Japanese characters (Clanuwat et al. 2018)", 10, 28, 1, _TRAIN, "train"),
    "MNIST": TorchvisionSet("handwritten digits (LeCun et al. 1998)", 10, 28, 1, _TRAIN, "train"),
    "Omniglot": TorchvisionSet("handwritten characters (Lake et al. 2015)", None, 105, 1, ()),
    "OxfordIIITPet": TorchvisionSet(
        "breeds of cats and dogs (Parkhi et al. 2012)", None, None, 3, (("trainval", None, "test"),)
    ),
    "PCAM": TorchvisionSet("tissue with and without tumor (Veeling et al. 2018)", 2, 96, 3, _ALL),
    "Places365": TorchvisionSet(
        "scenes (Zhou et al. 2017)",
        365,
        None,
        3,
        (("train-standard", "val", None), ("train-challenge", "val", None)),
    ),
    "QMNIST": TorchvisionSet("handwritten digits (Yadav & Bottou 2019)", 10, 28, 1, _TRAIN, "train"),
    "RenderedSST2": TorchvisionSet("sentiment of rendered sentences (Radford et al. 2021)", 2, 448, 3, _ALL),
    "SEMEION": TorchvisionSet("handwritten digits (UCI)", 10, 16, 1, ()),
    "STL10": TorchvisionSet("objects (Coates et al. 2011)", 10, 96, 3, _TRAIN_TEST),
    "SUN397": TorchvisionSet("scenes (Xiao et al. 2010)", 397, None, 3, ()),
    "SVHN": TorchvisionSet(
        "house numbers (Netzer et al. 2011)", 10, 32, 3, (("train", None, "test"), ("extra", None, "test"))
    ),
    "StanfordCars": TorchvisionSet("cars (Krause et al. 2013)", 196, None, 3, _TRAIN_TEST),
    "USPS": TorchvisionSet("handwritten digits (Hull 1994)", 10, 16, 1, _TRAIN, "train"),
}
"""Information by class name."""

PROVIDED_BY_USER = ("FER2013", "ImageNet", "StanfordCars")
"""Data sets that torchvision cannot download."""
